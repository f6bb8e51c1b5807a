"""What DiffGrad keeps: gradients by value, state by parameter, and the states of other optimisers."""

import copy
import io
import math
import pickle
import statistics
import time

import pytest
import torch
from gradients import FUSED, LISTS, LOOP, PATHS, draw, feed, gap, leaves, run, same
from torch import nn

from overpaint.optim import DiffGrad


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("reuse", ["buffer", "zero_grad", "overwritten"])
def test_the_gradient_is_kept_by_value(path, reuse):
    fresh, reused = leaves(), leaves()
    run(fresh, 20, **path)
    optimizer = DiffGrad(reused, **path)
    for p in reused:
        p.grad = torch.zeros_like(p)
    for t in range(1, 21):
        if reuse == "zero_grad":
            optimizer.zero_grad(set_to_none=False)
        for i, p in enumerate(reused):
            drawn = draw(*p.shape, seed=100 * t + i)
            p.grad.add_(drawn) if reuse == "zero_grad" else p.grad.copy_(drawn)
        optimizer.step()
        for p in reused:
            kept = optimizer.state[p]["previous_grad"]
            assert torch.equal(kept, p.grad) and kept.data_ptr() != p.grad.data_ptr()
            if reuse == "overwritten":
                p.grad.fill_(math.nan)
    assert same(fresh, reused)


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("dfc", [0, 5])
@pytest.mark.parametrize(
    "options",
    [{"weight_decay": 0.3}, {"weight_decay": 0.3, "decoupled_weight_decay": True}, {"maximize": True}],
    ids=str,
)  # fmt: skip
def test_the_gradient_is_never_written_and_decay_counts(path, dfc, options):
    params, plain = leaves(), leaves()
    optimizer = DiffGrad(params, dfc=dfc, **options, **path)
    for t in range(1, 4):
        feed(params, t)
        given = [p.grad.clone() for p in params]
        optimizer.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(params, given, strict=True))
    run(plain, 3, dfc=dfc, **path)
    assert gap(params, plain) > 1e-4


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_run_goes_on_to_the_bit(path, dtype):
    whole, halved = leaves(dtype), leaves(dtype)
    options = {**path, "lr": 0.01, "state_dtype": torch.float32}
    run(whole, 40, **options)
    saved = io.BytesIO()
    torch.save(run(halved, 20, **options).state_dict(), saved)
    saved.seek(0)
    resumed = DiffGrad(halved, **options)
    resumed.load_state_dict(torch.load(saved, weights_only=True))
    for t in range(21, 41):
        feed(halved, t)
        resumed.step()
    assert same(whole, halved)
    assert resumed.state[halved[0]]["exp_avg"].dtype == torch.float32


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("again", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_and_pickles_carry_the_state(again, path):
    params = leaves()
    optimizer = run(params, 5, **path)
    other = again(optimizer)
    theirs = other.param_groups[0]["params"]
    assert theirs[0] is not params[0]
    for some, by in ((params, optimizer), (theirs, other)):
        feed(some, 6)
        by.step()
    assert same(params, theirs)
    assert other._step_supports_amp_scaling == bool(path.get("fused"))


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.AdamW])
def test_the_state_of_adam_is_taken_up(path, make):
    theirs, ours = leaves(), leaves()
    adam = run(theirs, 5, make=make)
    optimizer = DiffGrad(ours)
    saved = copy.deepcopy(adam.state_dict())
    saved["param_groups"][0].update(path)
    optimizer.load_state_dict(saved)
    state = optimizer.state[ours[0]]
    assert state["step"] == 5 and torch.equal(state["previous_grad"], torch.zeros_like(ours[0]))
    assert torch.equal(state["exp_avg"], adam.state[theirs[0]]["exp_avg"])
    group = optimizer.param_groups[0]
    assert group["decoupled_weight_decay"] == (make is torch.optim.AdamW)
    before = [p.detach().clone() for p in ours]
    feed(ours, 6)
    optimizer.step()
    grad, moved = ours[0].grad, before[0] * (1 - 1e-3 * group["weight_decay"]) - ours[0]
    m = 0.9 * adam.state[theirs[0]]["exp_avg"] + 0.1 * grad
    v = 0.999 * adam.state[theirs[0]]["exp_avg_sq"] + 0.001 * grad.square()
    root = (v / (1 - 0.999**6)).sqrt() + 1e-8
    wanted = 1e-3 * grad.abs().sigmoid() * m / (1 - 0.9**6) / root  # friction as at a first step
    assert torch.allclose(moved.detach(), wanted, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("name", ["amsgrad", "ams_bound", "rectify", "adanorm", "adam_debias"])
def test_states_of_another_rule_are_refused(name):
    saved = run(leaves(), 1, make=torch.optim.Adam).state_dict()
    saved["param_groups"][0][name] = True
    with pytest.raises(ValueError, match=f"saved with `{name}`.* start a new run"):
        DiffGrad(leaves()).load_state_dict(saved)


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_a_run_of_the_authors_code_and_of_torch_optimizer_goes_on(path):
    other = pytest.importorskip("torch_optimizer").DiffGrad
    whole, halved = leaves(), leaves()
    run(whole, 30, make=other, weight_decay=0.1)
    saved = run(halved, 15, make=other, weight_decay=0.1).state_dict()
    assert saved["state"][0]["step"] == 15  # an int, as in the authors' code, whose keys these are
    optimizer = DiffGrad(halved, eps_mode="official", **path)
    optimizer.load_state_dict(saved)
    for t in range(16, 31):
        feed(halved, t)
        optimizer.step()
    assert gap(whole, halved) <= 1e-14
    assert optimizer.param_groups[0]["decoupled_weight_decay"] is False


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_a_run_of_pytorch_optimizer_goes_on(path):
    other = pytest.importorskip("pytorch_optimizer").DiffGrad
    whole, halved = leaves(), leaves()
    run(whole, 30, make=other, weight_decay=0.1)
    saved = run(halved, 15, make=other, weight_decay=0.1).state_dict()
    saved["param_groups"][0].update(path)
    optimizer = DiffGrad(halved, eps_mode="official")
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["decoupled_weight_decay"] is True
    assert "step" not in optimizer.param_groups[0]
    for t in range(16, 31):
        feed(halved, t)
        optimizer.step()
    assert gap(whole, halved) <= 1e-12


def test_state_is_twelve_bytes_a_parameter():
    p = nn.Parameter(torch.zeros(1000))
    state = run([p], 1).state[p]
    assert sum(t.numel() * t.element_size() for n, t in state.items() if n != "step") == 12_000
    assert set(state) == {"step", "exp_avg", "exp_avg_sq", "previous_grad"}


@pytest.mark.parametrize(("path", "most"), [(LISTS, 0.3), (FUSED, 0.3), (LOOP, 1.05)], ids=str)
def test_a_step_needs_little_memory_beside_its_state(path, most):
    p = nn.Parameter(torch.zeros(2**21))
    p.grad = torch.ones_like(p)
    optimizer = DiffGrad([p], **path)
    optimizer.step()
    with torch.profiler.profile(profile_memory=True) as seen:
        optimizer.step()
    held = peak = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert 0 < peak <= most * 4 * p.numel()


@pytest.mark.parametrize(("path", "most"), [(LOOP, 2.3), (LISTS, 2.5), (FUSED, 4.0)], ids=str)
def test_a_step_takes_little_longer_than_that_of_adam(path, most):
    params = [[nn.Parameter(torch.zeros(1024)) for _ in range(100)] for _ in range(2)]
    ours, adam = DiffGrad(params[0], **path), torch.optim.Adam(params[1], **path)
    for p in (*params[0], *params[1]):
        p.grad = draw(1024, dtype=torch.float32)
    ratios = []
    for _ in range(15):
        starts = []
        for optimizer in (ours, adam):
            start = time.process_time()
            optimizer.step()
            starts.append(time.process_time() - start)
        ratios.append(starts[0] / starts[1])
    assert statistics.median(ratios) <= most
