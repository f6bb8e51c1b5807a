"""States of DiffGrad: copies of gradients, saving and loading, and states of other optimisers."""

import copy
import io
import math
import pickle

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
    parameters,
    run,
    set_gradients,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from overpaint.optim import DiffGrad


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("reuse", ["buffer", "zero_grad", "overwritten"])
def test_the_previous_gradient_is_stored_as_a_copy(path, reuse):
    fresh, reused = parameters(), parameters()
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
            stored = optimizer.state[p]["previous_grad"]
            assert torch.equal(stored, p.grad) and stored.data_ptr() != p.grad.data_ptr()
            if reuse == "overwritten":
                p.grad.fill_(math.nan)
    assert all_equal(fresh, reused)


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("dfc", [0, 5])
@pytest.mark.parametrize(
    "options",
    [{"weight_decay": 0.3}, {"weight_decay": 0.3, "decoupled_weight_decay": True}, {"maximize": True}],
    ids=str,
)  # fmt: skip
def test_gradients_are_never_written_and_options_have_an_effect(path, dfc, options):
    params, plain = parameters(), parameters()
    optimizer = DiffGrad(params, dfc=dfc, **options, **path)
    for t in range(1, 4):
        set_gradients(params, t)
        before = [p.grad.clone() for p in params]
        optimizer.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(params, before, strict=True))
    run(plain, 3, dfc=dfc, **path)
    assert largest_difference(params, plain) > 1e-4


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_is_equal_bit_for_bit(path, dtype):
    whole, halved = parameters(dtype), parameters(dtype)
    options = {**path, "lr": 0.01, "state_dtype": torch.float32}
    run(whole, 40, **options)
    saved = io.BytesIO()
    torch.save(run(halved, 20, **options).state_dict(), saved)
    saved.seek(0)
    resumed = DiffGrad(halved, **options)
    resumed.load_state_dict(torch.load(saved, weights_only=True))
    for t in range(21, 41):
        set_gradients(halved, t)
        resumed.step()
    assert all_equal(whole, halved)
    assert resumed.state[halved[0]]["exp_avg"].dtype == torch.float32


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("again", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_and_pickles_contain_the_state(again, path):
    params = parameters()
    optimizer = run(params, 5, **path)
    other = again(optimizer)
    theirs = other.param_groups[0]["params"]
    assert theirs[0] is not params[0]
    for each, its_optimizer in ((params, optimizer), (theirs, other)):
        set_gradients(each, 6)
        its_optimizer.step()
    assert all_equal(params, theirs)
    assert other._step_supports_amp_scaling == bool(path.get("fused"))


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.AdamW])
def test_the_state_of_adam_can_be_loaded(path, make):
    theirs, ours = parameters(), parameters()
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
    set_gradients(ours, 6)
    optimizer.step()
    grad, moved = ours[0].grad, before[0] * (1 - 1e-3 * group["weight_decay"]) - ours[0]
    m = 0.9 * adam.state[theirs[0]]["exp_avg"] + 0.1 * grad
    v = 0.999 * adam.state[theirs[0]]["exp_avg_sq"] + 0.001 * grad.square()
    root = (v / (1 - 0.999**6)).sqrt() + 1e-8
    expected = 1e-3 * grad.abs().sigmoid() * m / (1 - 0.9**6) / root  # friction as at a first step
    assert torch.allclose(moved.detach(), expected, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("name", ["amsgrad", "ams_bound", "rectify", "adanorm", "adam_debias"])
def test_states_of_another_update_rule_raise(name):
    saved = run(parameters(), 1, make=torch.optim.Adam).state_dict()
    saved["param_groups"][0][name] = True
    with pytest.raises(ValueError, match=f"saved with `{name}`.* start a new run"):
        DiffGrad(parameters()).load_state_dict(saved)


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_a_run_of_the_authors_code_and_of_torch_optimizer_can_be_resumed(path):
    other = pytest.importorskip("torch_optimizer").DiffGrad
    whole, halved = parameters(), parameters()
    run(whole, 30, make=other, weight_decay=0.1)
    saved = run(halved, 15, make=other, weight_decay=0.1).state_dict()
    assert saved["state"][0]["step"] == 15  # an int, as in the authors' code, whose keys these are
    optimizer = DiffGrad(halved, eps_mode="official", **path)
    optimizer.load_state_dict(saved)
    for t in range(16, 31):
        set_gradients(halved, t)
        optimizer.step()
    assert largest_difference(whole, halved) <= 1e-14
    assert optimizer.param_groups[0]["decoupled_weight_decay"] is False


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_a_run_of_pytorch_optimizer_can_be_resumed(path):
    other = pytest.importorskip("pytorch_optimizer").DiffGrad
    whole, halved = parameters(), parameters()
    run(whole, 30, make=other, weight_decay=0.1)
    saved = run(halved, 15, make=other, weight_decay=0.1).state_dict()
    saved["param_groups"][0].update(path)
    optimizer = DiffGrad(halved, eps_mode="official")
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["decoupled_weight_decay"] is True
    assert "step" not in optimizer.param_groups[0]
    for t in range(16, 31):
        set_gradients(halved, t)
        optimizer.step()
    assert largest_difference(whole, halved) <= 1e-12


def test_the_state_has_twelve_bytes_for_each_number():
    p = nn.Parameter(torch.zeros(1000))
    state = run([p], 1).state[p]
    assert sum(t.numel() * t.element_size() for n, t in state.items() if n != "step") == 12_000
    assert set(state) == {"step", "exp_avg", "exp_avg_sq", "previous_grad"}


@pytest.mark.parametrize(("path", "most"), [(FOREACH, 0.3), (FUSED, 0.3), (LOOP, 1.05)], ids=str)
def test_peak_memory_of_a_step(path, most):
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


class CallCounter(TorchDispatchMode):
    """Counts the calls of torch operations."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += 1
        return function(*args, **(kwargs or {}))


def operations(make, path):
    """Return the number of torch operations in a step on 100 parameters."""
    params = [nn.Parameter(torch.zeros(1024)) for _ in range(100)]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = make(params, **path)
    optimizer.step()
    with CallCounter() as counter:
        optimizer.step()
    return counter.calls


def test_a_step_has_little_more_operations_than_that_of_adam():
    assert operations(DiffGrad, LOOP) <= 1.5 * operations(torch.optim.Adam, LOOP)
    assert operations(DiffGrad, FOREACH) <= operations(torch.optim.Adam, FOREACH)
    # One operation allocates the steps of each parameter, which the kernel writes to.
    assert operations(DiffGrad, FUSED) <= 100 + 3 * operations(torch.optim.Adam, FUSED)
