"""The update rule of DiffGrad compared with a plain Python reference, other implementations and torch's Adam."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from gradients import (
    FOREACH,
    FUSED,
    LOOP,
    PATHS,
    all_equal,
    draw,
    largest_difference,
    one_number,
    parameters,
    run,
    set_gradients,
)
from torch import nn

from overpaint.optim import DiffGrad, friction
from overpaint.optim.friction_variants import inverse_friction

EXAMPLE = Path(__file__).parent.parent / "examples" / "diffgrad_curves.py"


def reference_friction(change, dfc, gradients):
    """Return the friction of one number, in plain Python; `gradients` are those of the whole tensor."""
    if dfc == 1:
        return 1 / (1 + math.exp(-change))
    if dfc == 2:
        return 9 / (1 + math.exp(-abs(change) / 2)) - 4
    if dfc >= 3:
        sizes = [abs(g) for g in gradients]
        mean = sum(sizes) / len(sizes)
        nu = math.sqrt(sum((s - mean) ** 2 for s in sizes) / len(sizes))
        factor = {3: nu, 4: nu**2, 5: math.sqrt(nu)}[dfc]
        return 1 / (1 + math.exp(mean - factor * abs(change)))
    return 1 / (1 + math.exp(-abs(change)))


def reference(
    start, gradients, *, lr=0.01, eps=1e-8, l2=0.0, decay=0.0, dfc=0, official=False, b1=0.9, b2=0.999
):  # fmt: skip
    """Return one tensor after the steps, in plain Python; `gradients` has a row of numbers for each step."""
    theta = list(start)
    m, v, last = ([0.0] * len(theta) for _ in range(3))
    for t, row in enumerate(gradients, start=1):
        row = [g + l2 * x for g, x in zip(row, theta, strict=True)]
        for i, g in enumerate(row):
            theta[i] *= 1 - lr * decay
            m[i], v[i] = b1 * m[i] + (1 - b1) * g, b2 * v[i] + (1 - b2) * g * g
            bias = math.sqrt(1 - b2**t)
            root = (math.sqrt(v[i]) + eps) / bias if official else math.sqrt(v[i]) / bias + eps
            theta[i] -= lr * reference_friction(last[i] - g, dfc, row) * (m[i] / (1 - b1**t)) / root
            last[i] = g
    return theta


def reference_error(params, before, **options):
    """Return the largest absolute difference of 50 steps from the reference."""
    error = 0.0
    for i, (p, old) in enumerate(zip(params, before, strict=True)):
        rows = [draw(*p.shape, seed=100 * t + i).flatten().tolist() for t in range(1, 51)]
        expected = torch.tensor(reference(old.flatten().tolist(), rows, **options))
        error = max(error, float((p.detach().flatten().double() - expected).abs().max()))
    return error


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def curves():
    spec = importlib.util.spec_from_file_location("diffgrad_curves", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("decay", [{}, {"l2": 0.5}, {"decay": 0.5}], ids=str)
@pytest.mark.parametrize("official", [False, True])
def test_fifty_steps_equal_the_reference(path, decay, official):
    params = parameters()
    before = [p.detach().clone() for p in params]
    options = {"weight_decay": 0.5, "decoupled_weight_decay": "decay" in decay} if decay else {}
    options["eps_mode"] = "official" if official else "paper"
    run(params, lr=0.01, eps=1e-4, **path, **options)
    assert reference_error(params, before, lr=0.01, eps=1e-4, official=official, **decay) <= 1e-12


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("dfc", range(1, 6))
def test_variants_of_the_friction_equal_the_reference(path, dfc):
    params = parameters()
    before = [p.detach().clone() for p in params]
    run(params, lr=0.01, dfc=dfc, weight_decay=0.5, **path)
    assert reference_error(params, before, lr=0.01, dfc=dfc, l2=0.5) <= 1e-12


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_float32_is_close_to_float64(path):
    exact, rounded = parameters(), [nn.Parameter(p.detach().float()) for p in parameters()]
    run(exact, lr=0.01, **path)
    run(rounded, lr=0.01, **path)
    assert largest_difference(exact, rounded) <= 5e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wide", [None, torch.float32])
@pytest.mark.parametrize("dfc", [0, 3])
def test_foreach_and_loop_are_equal_bit_for_bit(dtype, wide, dfc):
    options = {"weight_decay": 0.1, "maximize": True, "state_dtype": wide, "dfc": dfc}
    ends = []
    for path in (LOOP, FOREACH):
        params = parameters(dtype)
        optimizer = run(params, 20, lr=0.01, **path, **options)
        ends.append([*params, *(optimizer.state[p]["previous_grad"] for p in params)])
    assert all_equal(*ends)


@pytest.mark.parametrize("path", [FOREACH, FUSED], ids=str)
def test_steps_in_pieces_are_equal_bit_for_bit(path, monkeypatch):
    ends = []
    for piece in (2**19, 7):
        monkeypatch.setattr("overpaint.optim.batches.PIECE", piece)
        params = [*parameters(), nn.Parameter(draw(5, 4).t())]
        optimizer = run(params, 10, lr=0.01, weight_decay=0.1, **path)
        ends.append([*params, *(optimizer.state[p]["step"] for p in params)])
    assert all_equal(*ends)


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_the_official_epsilon_equals_torch_optimizer(path):
    other = pytest.importorskip("torch_optimizer").DiffGrad
    ours, theirs, paper = parameters(), parameters(), parameters()
    tiny = {"lr": 0.01, "scale": 1e-8}
    run(ours, eps_mode="official", **tiny, **path)
    run(theirs, make=other, **tiny)
    run(paper, **tiny, **path)
    assert largest_difference(ours, theirs) <= 1e-14
    assert largest_difference(ours, paper) > 1e-3
    run(ours, eps_mode="official", weight_decay=0.1, **path)
    run(theirs, make=other, weight_decay=0.1)
    assert largest_difference(ours, theirs) <= 1e-14


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("path", PATHS, ids=str)
def test_the_official_epsilon_equals_pytorch_optimizer(decoupled, path):
    other = pytest.importorskip("pytorch_optimizer").DiffGrad
    ours, theirs = parameters(), parameters()
    options = {"lr": 0.01, "weight_decay": 0.1, "eps": 1e-4}
    run(ours, decoupled_weight_decay=decoupled, eps_mode="official", **path, **options)
    run(theirs, make=other, weight_decouple=decoupled, **options)
    assert largest_difference(ours, theirs) <= 1e-9  # it adds 1e-15 inside the root


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_a_constant_gradient_gives_the_closed_form_times_adam(path):
    p, optimizer = one_number(0.0, **path)
    q = nn.Parameter(p.detach().clone())
    adam = torch.optim.Adam([q])
    for _ in range(30):
        p.grad, q.grad = (torch.full_like(p, 0.7) for _ in range(2))
        optimizer.step(), adam.step()
    ratio = (p / q).item()
    assert ratio == pytest.approx(0.5056062590722732, abs=1e-12)
    assert ratio == pytest.approx((torch.tensor(0.7).sigmoid().item() + 29 / 2) / 30, abs=1e-12)


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_with_friction_one_the_steps_equal_adam_and_so_do_the_moments(path):
    p, optimizer = one_number(**path)
    q = nn.Parameter(p.detach().clone())
    adam = torch.optim.Adam([q])
    for t in range(12):
        before = (p.item(), q.item())
        for x in (p, q):
            x.grad = torch.full_like(x, 25.0 if t % 2 else -25.0)
        optimizer.step(), adam.step()
        assert t == 0 or p.item() - before[0] == pytest.approx(q.item() - before[1], abs=1e-12)
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.allclose(optimizer.state[p][name], adam.state[q][name], rtol=1e-14, atol=0)


def test_the_fused_moments_equal_fused_adam_bit_for_bit():
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    mine, adam = run(ours, 10, **FUSED), run(theirs, 10, make=torch.optim.Adam, fused=True)
    for p, q in zip(ours, theirs, strict=True):
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(mine.state[p][name], adam.state[q][name])


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("g", [0.0, 1e-9, 1e-3, 1.0, 50.0, -50.0])
def test_the_first_step_equals_the_formula(g, path):
    p, optimizer = one_number(0.0, lr=0.1, **path)
    p.grad = torch.full_like(p, g)
    optimizer.step()
    expected = -0.1 / (1 + math.exp(-abs(g))) * g / (abs(g) + 1e-8)
    assert p.item() == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(
    ("name", "end", "first"),
    [("F1", -0.300071, -0.919782), ("F2", -0.642963, -0.9), ("F3", 0.013565, -0.911920)],
)
def test_end_points_on_the_functions_of_the_paper(curves, name, end, first):
    places = curves.descend(curves.CURVES[name], curves.RUNS["diffGrad"])
    assert len(places) == 300 and places[0] == -1
    assert places[1] == pytest.approx(first, abs=1e-6)
    assert places[-1] == pytest.approx(end, abs=1e-5)


@pytest.mark.parametrize(
    ("options", "f1", "f2", "spread"),
    [
        ({}, -0.300071, -0.642963, 0.0168),
        ({"dfc": 1}, -0.300231, -0.642927, 0.0018),
        ({"dfc": 2}, -0.300039, 0.000510, 0.1104),
        ({"lr": 0.2}, 0.199845, -0.000155, 0.0381),
    ],
    ids=str,
)
def test_end_points_of_the_variants(curves, options, f1, f2, spread):
    ends = {
        name: curves.descend(
            curve, lambda p: DiffGrad(p, **{"lr": 0.1, "betas": curves.BETAS, **options})
        )
        for name, curve in curves.CURVES.items()
    }
    assert ends["F1"][-1] == pytest.approx(f1, abs=1e-5)
    assert ends["F2"][-1] == pytest.approx(f2, abs=1e-5)
    assert torch.tensor(ends["F3"][-100:]).std(correction=0).item() == pytest.approx(
        spread, abs=1e-4
    )


def test_end_points_of_adam_at_half_the_rate_and_of_the_notebooks_gradient(curves):
    half = curves.RUNS["Adam, half the rate"]
    ends = [curves.descend(curve, half)[-1] for curve in curves.CURVES.values()]
    assert ends == pytest.approx([-0.300300, -0.643123, 0.002133], abs=1e-5)
    wrong = curves.descend(curves.NOTEBOOK_F2, curves.RUNS["diffGrad"])
    assert wrong[-1] == pytest.approx(-0.812145, abs=1e-5)


def test_the_example_writes_its_figure(curves, tmp_path):
    curves.draw(tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_ranges_of_the_friction_are_those_of_the_paper():
    change, gradient = 20 * draw(10_000, seed=1), 3 * draw(10_000, seed=2)
    shares = [friction(change, gradient, dfc) for dfc in range(6)]
    assert 0.5 <= shares[0].min() < 0.502 and 0.999 < shares[0].max() <= 1
    assert 0 < shares[1].min() < 0.001 and 0.999 < shares[1].max() <= 1
    assert 0.5 <= shares[2].min() < 0.51 and 4.99 < shares[2].max() <= 5
    least = (-gradient.abs().mean()).sigmoid()
    for xi in shares[3:]:
        assert least <= xi.min() < 0.5 and 0.999 < xi.max() <= 1
    assert torch.equal(shares[0], friction(-change, gradient))
    assert not torch.equal(shares[1], friction(-change, gradient, 1))
    with pytest.raises(ValueError, match="from 0 to 5, got 6"):
        friction(change, gradient, 6)


def test_inverse_friction_is_accurate():
    sizes = torch.cat([torch.logspace(-9, 2, 20_000), torch.tensor([0.0, math.inf])]).float()
    exact = (-sizes.double()).exp() + 1
    for change in (sizes, -sizes):
        assert ((inverse_friction(change) - exact) / exact).abs().max() <= 2.5e-7
    ends = inverse_friction(torch.tensor([0.0, math.inf, math.nan], dtype=torch.float32)).tolist()
    assert ends[:2] == [2.0, 1.0] and math.isnan(ends[2])


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_maximising_f_equals_minimising_minus_f(path, decay):
    down, up = parameters(), parameters()
    run(down, 20, weight_decay=decay, **path)
    run(up, 20, scale=-1.0, weight_decay=decay, maximize=True, **path)
    assert all_equal(down, up)


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_groups_equal_separate_optimisers(path):
    together, apart = parameters(), parameters()
    first = {"lr": 0.1, "weight_decay": 0.2, "dfc": 4}
    second = {"betas": (0.5, 0.9), "eps_mode": "official", "eps": 1e-3}
    groups = [{"params": together[:1], **first}, {"params": together[1:], **second}]
    optimizer = DiffGrad(groups, **path)
    others = [DiffGrad(apart[:1], **first, **path), DiffGrad(apart[1:], **second, **path)]
    for t in range(1, 11):
        set_gradients(together, t), set_gradients(apart, t)
        for each in (optimizer, *others):
            each.step()
    assert all_equal(together, apart)


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("mode", ["paper", "official"])
def test_a_parameter_without_earlier_gradients_has_its_own_first_step(path, mode):
    early, late = (nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizer = DiffGrad([early, late], lr=0.1, eps_mode=mode, **path)
    for _ in range(100):
        early.grad = torch.ones_like(early)
        optimizer.step()
    assert late not in optimizer.state
    late.grad = torch.full_like(late, 2.0)
    optimizer.step()
    assert late.item() == pytest.approx(-0.1 / (1 + math.exp(-2.0)), abs=1e-7)
    before = {name: value.clone() for name, value in optimizer.state[late].items()}
    late.grad = None
    optimizer.step()
    assert all(torch.equal(before[name], optimizer.state[late][name]) for name in before)


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_the_friction_is_computed_in_float32_for_half_precision(path):
    change = torch.tensor([0.004], dtype=torch.bfloat16)
    assert change.sigmoid().item() == 0.5  # what computing it in bfloat16 would give
    p = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    optimizer = DiffGrad([p], lr=2.007, **path)  # half of it rounds down, the true share rounds up
    p.grad = change
    optimizer.step()
    assert torch.tensor(-2.007 / 2).bfloat16().item() == -1
    assert p.item() == -1 - 2**-7


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_half_precision_is_rounded_once_in_each_step(path):
    p = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    optimizer = DiffGrad([p], lr=1e-3, state_dtype=torch.float32, **path)
    m = v = last = 0.0
    for t in range(1, 201):
        g = 0.5 if t % 3 else -0.25
        p.grad = torch.full_like(p, g)
        before = p.item()
        optimizer.step()
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        root = math.sqrt(v / (1 - 0.999**t)) + 1e-8
        move = m / (1 - 0.9**t) / root / (1 + math.exp(-abs(last - g)))
        exact = torch.tensor(before - 1e-3 * move).bfloat16().item()
        assert abs(p.item() - exact) <= 2**-7 * abs(exact)
        last = g


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_a_complex_parameter_equals_two_real_ones(path):
    p = nn.Parameter(torch.complex(draw(5, seed=1), draw(5, seed=2)))
    q = nn.Parameter(torch.view_as_real(p.detach()).clone())
    optimizers = [DiffGrad([x], weight_decay=0.1, **path) for x in (p, q)]
    for t in range(5):
        q.grad = draw(5, 2, seed=10 + t)
        p.grad = torch.view_as_complex(q.grad.clone())
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(torch.view_as_real(p.detach()), q.detach())


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_scalars_empty_and_strided_tensors(path):
    strided = draw(2, 3, 4, 4).to(memory_format=torch.channels_last)
    params = [nn.Parameter(t) for t in (torch.tensor(1.0), draw(0, 3), strided)]
    plain = [nn.Parameter(p.detach().clone(memory_format=torch.contiguous_format)) for p in params]
    optimizer = run(params, 5, **path)  # the gradients are contiguous, unlike the parameter
    run(plain, 5, **path)
    assert all_equal(params, plain)
    for name in ("exp_avg", "previous_grad"):
        buffer = optimizer.state[params[2]][name]
        assert buffer.is_contiguous(memory_format=torch.channels_last)


def test_two_steps_are_differentiable():
    def two_steps(theta, first, second):
        p = theta.clone()
        optimizer = DiffGrad([torch.zeros_like(theta)], lr=0.1, differentiable=True)
        optimizer.param_groups[0]["params"] = [p]
        for gradient in (first, second):
            p.grad = gradient
            optimizer.step()
        return p

    inputs = [draw(4, seed=s).requires_grad_() for s in (1, 2, 3)]
    assert torch.autograd.gradcheck(two_steps, inputs)


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_a_rate_of_zero_changes_nothing(path):
    p, optimizer = one_number(1.0, lr=0.0, **path)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert p.item() == 1.0


@pytest.mark.parametrize("path", [LOOP, FUSED], ids=str)
def test_a_tensor_rate_can_be_changed(path):
    p, optimizer = one_number(1.0, lr=torch.tensor(0.1), **path)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert p.item() == pytest.approx(1 - 0.1 / (1 + math.exp(-1)), abs=1e-8)
    optimizer.param_groups[0]["lr"].zero_()
    before = p.item()
    optimizer.step()
    assert p.item() == before


def test_a_closure_runs_with_gradients_and_step_returns_its_loss():
    p, optimizer = one_number(3.0, lr=0.5)

    def closure():
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert optimizer.step(closure).item() == 9.0
    assert p.item() == pytest.approx(3 - 0.5 / (1 + math.exp(-6.0)), abs=1e-8)


def test_accuracy_on_digits_is_that_of_adam_at_half_the_rate():
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    x = torch.tensor(digits.data / 16, dtype=torch.float32)
    y = torch.tensor(digits.target)
    shares = {}
    for name, make in (
        ("diffgrad", lambda p: DiffGrad(p, lr=1e-2)),
        ("adam", lambda p: torch.optim.Adam(p, lr=5e-3)),
    ):
        shares[name] = torch.tensor([accuracy(x, y, make, seed) for seed in range(5)])
    assert shares["diffgrad"].mean() > 0.9
    assert shares["diffgrad"].mean() >= shares["adam"].mean() - shares["adam"].std()


def accuracy(x, y, make, seed):
    """Return the accuracy of a small network on 360 held-out digits after 3 epochs."""
    torch.manual_seed(seed)
    order = torch.randperm(len(x))
    train, held = order[360:], order[:360]
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).float()
    optimizer = make(net.parameters())
    for _ in range(3):
        for rows in train[torch.randperm(len(train))].split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
    return (net(x[held]).argmax(1) == y[held]).double().mean().item()


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_a_sparse_gradient_raises(path):
    table = nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"sparse gradients: .*SparseAdam"):
        DiffGrad(table.parameters(), **path).step()


@pytest.mark.parametrize(
    ("options", "message", "kind"),
    [
        ({"lr": -1.0}, "`lr` must be 0 or more, got -1.0", ValueError),
        ({"lr": math.nan}, "`lr` must be 0 or more, got nan", ValueError),
        ({"eps": -1e-8}, "`eps` must be 0 or more", ValueError),
        ({"weight_decay": -0.1}, "`weight_decay` must be 0 or more", ValueError),
        ({"betas": (1.0, 0.9)}, r"`betas` must be two numbers in \[0, 1\), .* usual", ValueError),
        ({"dfc": 6}, "`dfc` must be a variant from 0 to 5, got 6. Omit it", ValueError),
        ({"eps_mode": "adam"}, "must be 'paper' or 'official', got 'adam'. Omit", ValueError),
        ({"state_dtype": torch.int8}, "must be a floating-point dtype.*Try float32", ValueError),
        ({"foreach": True, "differentiable": True}, "other: .*Omit `foreach`", ValueError),
        ({"lr": torch.ones(2)}, r"one element, got shape \(2,\): use parameter groups", ValueError),
        ({"lr": torch.tensor(0.1), "foreach": True}, "only with `capturable=True`: give", ValueError),
        ({"fused": True, "foreach": True}, "other: a step has one path. Omit", RuntimeError),
        ({"fused": True, "differentiable": True}, "kernel. Omit `fused`", RuntimeError),
        (
            {"fused": True, "capturable": True, "eps_mode": "official"},
            "reads the step count, .* use `foreach=True`",
            ValueError,
        ),
    ],
    ids=str,
)  # fmt: skip
def test_options_out_of_range_raise(options, message, kind):
    p = nn.Parameter(torch.zeros(1))
    with pytest.raises(kind, match=message):
        DiffGrad([p], **options)
    with pytest.raises(kind, match=message):
        DiffGrad([{"params": [p], **options}])
