"""DiffGrad against a reference written out number by number, another implementation, and torch's Adam."""

import copy
import io
import math

import pytest
import torch
from torch import nn

from overpaint.optim import DiffGrad

PATHS = [False, True]  # foreach


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def leaves(dtype=torch.float64):
    shapes = ((3,), (4, 5), (2, 3, 2))
    return [nn.Parameter(draw(*s, seed=i, dtype=dtype)) for i, s in enumerate(shapes)]


def feed(params, t, *, scale=1.0):
    for i, p in enumerate(params):
        p.grad = scale * draw(*p.shape, seed=100 * t + i).to(p.dtype)


def run(params, steps=50, *, scale=1.0, start=1, make=DiffGrad, **options):
    optimizer = make(params, **options)
    for t in range(start, start + steps):
        feed(params, t, scale=scale)
        optimizer.step()
    return optimizer


def reference(theta, gradients, *, lr=1e-3, b1=0.9, b2=0.999, eps=1e-8, l2=0.0, decay=0.0):
    """The rule of the paper for one number, in plain Python."""
    m = v = last = 0.0
    for t, g in enumerate(gradients, start=1):
        g = g + l2 * theta
        theta = theta * (1 - lr * decay)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        friction = 1 / (1 + math.exp(-abs(last - g)))
        theta -= lr * friction * (m / (1 - b1**t)) / (math.sqrt(v / (1 - b2**t)) + eps)
        last = g
    return theta


def one(value=0.5, **options):
    p = nn.Parameter(torch.tensor([value], dtype=torch.float64))
    return p, DiffGrad([p], **options)


@pytest.mark.parametrize("foreach", PATHS)
@pytest.mark.parametrize("decay", [{}, {"l2": 0.5}, {"decay": 0.5}])
def test_fifty_steps_are_those_of_the_rule_written_out(foreach, decay):
    params = leaves()
    before = [p.detach().clone() for p in params]
    options = {"weight_decay": 0.5, "decoupled_weight_decay": "decay" in decay} if decay else {}
    run(params, foreach=foreach, lr=0.01, **options)
    for i, (p, old) in enumerate(zip(params, before, strict=True)):
        gradients = torch.stack([draw(*p.shape, seed=100 * t + i) for t in range(1, 51)])
        for k in range(p.numel()):
            series = gradients.flatten(1)[:, k].tolist()
            wanted = reference(old.flatten()[k].item(), series, lr=0.01, **decay)
            assert abs(p.flatten()[k].item() - wanted) <= 1e-12


def test_float32_stays_near_float64():
    exact, rounded = leaves(), [nn.Parameter(p.detach().float()) for p in leaves()]
    run(exact, lr=0.01)
    run(rounded, lr=0.01)
    for p, q in zip(exact, rounded, strict=True):
        assert float((p - q).detach().abs().max()) <= 5e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wide", [None, torch.float32])
def test_lists_and_loop_give_the_same_bytes(dtype, wide):
    options = {"lr": 0.01, "weight_decay": 0.1, "maximize": True, "state_dtype": wide}
    ends = []
    for foreach in PATHS:
        params = leaves(dtype)
        optimizer = run(params, 20, foreach=foreach, **options)
        ends.append([*params, *(optimizer.state[p]["previous_grad"] for p in params)])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize("decoupled", [False, True])
def test_the_official_place_of_epsilon_is_what_pytorch_optimizer_does(decoupled):
    other = pytest.importorskip("pytorch_optimizer").DiffGrad
    ours, theirs = leaves(), leaves()
    options = {"lr": 0.01, "weight_decay": 0.1, "eps": 1e-4}
    run(ours, decoupled_weight_decay=decoupled, eps_mode="official", **options)
    run(theirs, make=other, weight_decouple=decoupled, **options)
    for p, q in zip(ours, theirs, strict=True):
        assert float((p - q).detach().abs().max()) <= 1e-9  # it adds 1e-15 inside the root
    paper = leaves()
    run(paper, decoupled_weight_decay=decoupled, **options)
    assert not torch.allclose(paper[1], ours[1], rtol=0, atol=1e-7)


def test_a_constant_gradient_moves_by_the_closed_form_times_adam():
    p, optimizer = one(0.0)
    q = nn.Parameter(p.detach().clone())
    adam = torch.optim.Adam([q])
    for _ in range(30):
        p.grad, q.grad = (torch.full_like(p, 0.7) for _ in range(2))
        optimizer.step(), adam.step()
    ratio = (p / q).item()
    assert ratio == pytest.approx(0.5056062590722732, abs=1e-12)
    assert ratio == pytest.approx((torch.tensor(0.7).double().sigmoid().item() + 29 / 2) / 30)


@pytest.mark.parametrize("foreach", PATHS)
def test_without_friction_it_is_adam_and_the_moments_always_are(foreach):
    p, optimizer = one(foreach=foreach)
    q = nn.Parameter(p.detach().clone())
    adam = torch.optim.Adam([q])
    for t in range(12):
        before = (p.item(), q.item())
        for x in (p, q):
            x.grad = torch.full_like(x, 25.0 if t % 2 else -25.0)
        optimizer.step(), adam.step()
        assert t == 0 or p.item() - before[0] == pytest.approx(q.item() - before[1], abs=1e-12)
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.allclose(optimizer.state[p][name], adam.state[q][name], rtol=1e-14)


@pytest.mark.parametrize("g", [0.0, 1e-9, 1e-3, 1.0, 50.0, -50.0])
def test_the_first_step(g):
    p, optimizer = one(0.0, lr=0.1)
    p.grad = torch.full_like(p, g)
    optimizer.step()
    wanted = -0.1 / (1 + math.exp(-abs(g))) * g / (abs(g) + 1e-8)
    assert p.item() == pytest.approx(wanted, abs=1e-15)


# Gradients of the three functions of the paper's figure 4, and where 299 updates from -1 end.
CURVES = {
    "F1": (lambda x: 2 * x + 0.6 if x <= 0 else 2 * x - 0.4, -0.300071),
    "F2": (
        lambda x: (
            -40.0 if x <= -0.9 else 3 * x * x + math.sin(8 * x) + 8 * x * math.cos(8 * x)
        ),
        -0.642963,
    ),
    "F3": (
        lambda x: (
            2 * x if x <= -0.5 or x > 0.5 else 1.0 if x <= -0.4 else -0.875 if x <= 0
            else 0.875 if x <= 0.4 else -1.0
        ),
        0.013565,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CURVES)
def test_where_the_curves_of_the_paper_end(name):
    gradient, end = CURVES[name]
    p, optimizer = one(-1.0, lr=0.1, betas=(0.95, 0.999))
    for t in range(299):
        p.grad = torch.full_like(p, gradient(p.item()))
        optimizer.step()
        if t == 0:
            first = {"F1": -0.919782, "F2": -0.9, "F3": -0.911920}[name]
            assert p.item() == pytest.approx(first, abs=1e-6)
    assert p.item() == pytest.approx(end, abs=1e-5)


@pytest.mark.parametrize("foreach", PATHS)
def test_the_gradient_is_kept_by_value_and_never_written(foreach):
    fresh, reused = leaves(), leaves()
    run(fresh, 20, foreach=foreach, weight_decay=0.3)
    optimizer = DiffGrad(reused, foreach=foreach, weight_decay=0.3)
    for p in reused:
        p.grad = torch.zeros_like(p)
    for t in range(1, 21):
        for i, p in enumerate(reused):
            p.grad.copy_(draw(*p.shape, seed=100 * t + i))
        given = [p.grad.clone() for p in reused]
        optimizer.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(reused, given, strict=True))
        for p in reused:
            assert optimizer.state[p]["previous_grad"].data_ptr() != p.grad.data_ptr()
            p.grad.fill_(math.nan)
    assert all(torch.equal(p, q) for p, q in zip(fresh, reused, strict=True))


@pytest.mark.parametrize("foreach", PATHS)
@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_climbing_f_is_descending_minus_f(foreach, decay):
    down, up = leaves(), leaves()
    run(down, 20, foreach=foreach, weight_decay=decay)
    run(up, 20, scale=-1.0, foreach=foreach, weight_decay=decay, maximize=True)
    assert all(torch.equal(p, q) for p, q in zip(down, up, strict=True))


def test_groups_are_separate_optimisers():
    together, apart = leaves(), leaves()
    first = {"lr": 0.1, "weight_decay": 0.2}
    second = {"betas": (0.5, 0.9), "eps_mode": "official", "eps": 1e-3}
    optimizer = DiffGrad([{"params": together[:1], **first}, {"params": together[1:], **second}])
    others = [DiffGrad(apart[:1], **first), DiffGrad(apart[1:], **second)]
    for t in range(1, 11):
        feed(together, t), feed(apart, t)
        for one_of in (optimizer, *others):
            one_of.step()
    assert all(torch.equal(p, q) for p, q in zip(together, apart, strict=True))


@pytest.mark.parametrize("foreach", PATHS)
def test_a_late_parameter_has_its_own_first_step(foreach):
    early, late = (nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(2))
    optimizer = DiffGrad([early, late], lr=0.1, foreach=foreach)
    for _ in range(100):
        early.grad = torch.ones_like(early)
        optimizer.step()
    assert late not in optimizer.state
    late.grad = torch.full_like(late, 2.0)
    optimizer.step()
    assert late.item() == pytest.approx(-0.1 / (1 + math.exp(-2.0)), abs=1e-9)
    kept, late.grad = copy.deepcopy(optimizer.state[late]), None
    optimizer.step()
    assert all(torch.equal(kept[name], optimizer.state[late][name]) for name in kept)


@pytest.mark.parametrize("foreach", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_run_goes_on_to_the_bit(foreach, dtype):
    whole, halved = leaves(dtype), leaves(dtype)
    options = {"foreach": foreach, "lr": 0.01, "state_dtype": torch.float32}
    run(whole, 40, **options)
    saved = io.BytesIO()
    torch.save(run(halved, 20, **options).state_dict(), saved)
    saved.seek(0)
    resumed = DiffGrad(halved, **options)
    resumed.load_state_dict(torch.load(saved, weights_only=True))
    for t in range(21, 41):
        feed(halved, t)
        resumed.step()
    assert all(torch.equal(p, q) for p, q in zip(whole, halved, strict=True))
    assert resumed.state[halved[0]]["exp_avg"].dtype == torch.float32


def test_copies_and_pickles_carry_the_state():
    params = leaves()
    optimizer = run(params, 5)
    again = copy.deepcopy(optimizer)
    theirs = again.param_groups[0]["params"]
    for some, by in ((params, optimizer), (theirs, again)):
        feed(some, 6)
        by.step()
    assert all(torch.equal(p, q) for p, q in zip(params, theirs, strict=True))


def test_states_of_other_optimisers_are_taken_up():
    theirs, ours = leaves(), leaves()
    adam = run(theirs, 5, make=torch.optim.Adam)
    optimizer = DiffGrad(ours)
    optimizer.load_state_dict(adam.state_dict())
    state = optimizer.state[ours[0]]
    assert state["step"] == 5 and torch.equal(state["previous_grad"], torch.zeros_like(ours[0]))
    assert torch.equal(state["exp_avg"], adam.state[theirs[0]]["exp_avg"])
    with pytest.raises(ValueError, match="saved with `amsgrad`.* start a new run"):
        optimizer.load_state_dict(
            run(leaves(), 1, make=torch.optim.Adam, amsgrad=True).state_dict()
        )
    plain = optimizer.state_dict()
    for values in plain["state"].values():
        values["step"] = 7  # as the authors' code counts
    optimizer.load_state_dict(plain)
    assert torch.equal(optimizer.state[ours[0]]["step"], torch.tensor(7.0))


def test_a_run_of_pytorch_optimizer_goes_on():
    other = pytest.importorskip("pytorch_optimizer").DiffGrad
    whole, halved = leaves(), leaves()
    run(whole, 30, make=other, weight_decay=0.1)
    saved = run(halved, 15, make=other, weight_decay=0.1).state_dict()
    optimizer = DiffGrad(halved, eps_mode="official")
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["decoupled_weight_decay"] is True
    for t in range(16, 31):
        feed(halved, t)
        optimizer.step()
    for p, q in zip(whole, halved, strict=True):
        assert float((p - q).detach().abs().max()) <= 1e-12


@pytest.mark.parametrize("foreach", PATHS)
def test_friction_of_half_precision_is_computed_in_float32(foreach):
    p = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    optimizer = DiffGrad([p], lr=1.0, foreach=foreach)
    p.grad = torch.full_like(p, 0.004)
    optimizer.step()
    wanted = torch.tensor(-1 / (1 + math.exp(-0.004)), dtype=torch.bfloat16)
    assert abs(p.item() - wanted.item()) <= 2 * 2**-9
    kept = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    wide = DiffGrad([kept], lr=1e-3, foreach=foreach, state_dtype=torch.float32)
    for t in range(200):
        kept.grad = torch.full_like(kept, 0.5 if t % 3 else -0.25)
        before = kept.item()
        m = wide.state[kept]["exp_avg"].item() if t else 0.0
        v = wide.state[kept]["exp_avg_sq"].item() if t else 0.0
        last = wide.state[kept]["previous_grad"].item() if t else 0.0
        wide.step()
        g = kept.grad.item()
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        root = math.sqrt(v / (1 - 0.999 ** (t + 1))) + 1e-8
        move = m / (1 - 0.9 ** (t + 1)) / root / (1 + math.exp(-abs(last - g)))
        exact = torch.tensor(before - 1e-3 * move).bfloat16().item()
        assert abs(kept.item() - exact) <= 2**-7 * abs(exact)


@pytest.mark.parametrize("foreach", PATHS)
def test_a_complex_parameter_is_two_real_ones(foreach):
    p = nn.Parameter(torch.complex(draw(5, seed=1), draw(5, seed=2)))
    q = nn.Parameter(torch.view_as_real(p.detach()).clone())
    optimizers = [DiffGrad([x], foreach=foreach, weight_decay=0.1) for x in (p, q)]
    for t in range(5):
        q.grad = draw(5, 2, seed=10 + t)
        p.grad = torch.view_as_complex(q.grad.clone())
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(torch.view_as_real(p.detach()), q.detach())


@pytest.mark.parametrize("foreach", PATHS)
def test_scalars_empty_and_strided_tensors(foreach):
    strided = draw(2, 3, 4, 4).to(memory_format=torch.channels_last)
    params = [nn.Parameter(t) for t in (torch.tensor(1.0).double(), draw(0, 3), strided)]
    plain = [nn.Parameter(p.detach().clone().contiguous()) for p in params]
    optimizer = run(params, 5, foreach=foreach)
    run(plain, 5, foreach=foreach)
    assert all(torch.equal(p, q) for p, q in zip(params, plain, strict=True))
    for name in ("exp_avg", "previous_grad"):
        kept = optimizer.state[params[2]][name]
        assert kept.is_contiguous(memory_format=torch.channels_last)


def test_a_closure_is_run_with_gradients_and_its_loss_returned():
    p, optimizer = one(3.0, lr=0.5)

    def closure():
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert optimizer.step(closure).item() == 9.0
    assert p.item() == pytest.approx(3 - 0.5 / (1 + math.exp(-6.0)), abs=1e-8)


@pytest.mark.parametrize("foreach", PATHS)
def test_a_scaled_loss_is_unscaled_and_an_overflow_changes_nothing(foreach):
    plain, scaled = (leaves(torch.float32) for _ in range(2))
    run(plain, 3, foreach=foreach)
    optimizer = DiffGrad(scaled, foreach=foreach)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    scaler.scale(torch.zeros(()))
    for t in range(1, 4):
        feed(scaled, t, scale=2.0**16)
        scaler.step(optimizer)
        scaler.update()
    assert all(torch.equal(p, q) for p, q in zip(plain, scaled, strict=True))
    kept = copy.deepcopy(optimizer.state_dict()["state"])
    feed(scaled, 4, scale=math.inf)
    scaler.step(optimizer)
    for i, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(kept[i][name], state[name]) for name in state)


def test_autograd_goes_through_two_steps():
    def two_steps(theta, first, second):
        p = theta.clone()
        optimizer = DiffGrad([torch.zeros_like(theta)], lr=0.1, differentiable=True)
        optimizer.param_groups[0]["params"] = [p]
        for gradient in (first, second):
            p.grad = gradient
            optimizer.step()
        return p

    given = [draw(4, seed=s).requires_grad_() for s in (1, 2, 3)]
    assert torch.autograd.gradcheck(two_steps, given)


def test_a_rate_of_zero_moves_nothing_and_a_tensor_rate_can_be_turned():
    p, optimizer = one(1.0, lr=0.0)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert p.item() == 1.0
    q, by_tensor = one(1.0, lr=torch.tensor(0.1, dtype=torch.float64))
    q.grad = torch.ones_like(q)
    by_tensor.step()
    assert q.item() == pytest.approx(1 - 0.1 / (1 + math.exp(-1)), abs=1e-8)


def test_it_learns():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1))
    x = draw(64, 2, dtype=torch.float32)
    y = x[:, :1] * x[:, 1:]
    optimizer = DiffGrad(net.parameters(), lr=0.02)
    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        loss = (net(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]


def test_state_is_twelve_bytes_a_parameter():
    p = nn.Parameter(torch.zeros(1000))
    state = run([p], 1).state[p]
    assert sum(t.numel() * t.element_size() for n, t in state.items() if n != "step") == 12_000
    assert set(state) == {"step", "exp_avg", "exp_avg_sq", "previous_grad"}


def test_a_sparse_gradient_is_refused():
    table = nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"sparse gradients: .*SparseAdam"):
        DiffGrad(table.parameters()).step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "`lr` must be 0 or more, got -1.0"),
        ({"lr": math.nan}, "`lr` must be 0 or more, got nan"),
        ({"eps": -1e-8}, "`eps` must be 0 or more"),
        ({"weight_decay": -0.1}, "`weight_decay` must be 0 or more"),
        ({"betas": (1.0, 0.9)}, r"`betas` must be two numbers in \[0, 1\), got .* is usual"),
        ({"eps_mode": "adam"}, "`eps_mode` must be 'paper' or 'official', got 'adam'. Leave it"),
        ({"state_dtype": torch.int8}, "`state_dtype` must be a floating-point dtype.*Try float32"),
        ({"foreach": True, "differentiable": True}, "exclude each other: .*Leave `foreach` out"),
        ({"lr": torch.ones(2)}, r"one element, got shape \(2,\): give groups their own"),
        ({"lr": torch.tensor(0.1), "foreach": True}, "`capturable=True` only: give a number"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    p = nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match=message):
        DiffGrad([p], **options)
    with pytest.raises(ValueError, match=message):
        DiffGrad([{"params": [p], **options}])


def test_capturing_on_a_cpu_is_refused():
    with pytest.raises(RuntimeError, match="`capturable=True` needs .* move the model there"):
        run(leaves(), 1, capturable=True)
