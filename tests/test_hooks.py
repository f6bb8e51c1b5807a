import pytest
import torch
from torch import nn

from overpaint.model import hooks


@pytest.fixture
def net():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


class Pair(nn.Module):
    """Returns a tuple, as CLIP's self-attention does."""

    def forward(self, x):
        return x + 1, "weights"


def hook_count(model):
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks)
        for m in model.modules()
    )


def test_record_appends_each_call_in_order(net):
    x, y = torch.randn(2, 5, 3, dtype=torch.float64)
    with hooks.record([net[2], net[0]]) as (last, first):
        net(x)
        net(y)
    assert torch.equal(first[0], net[0](x))
    assert torch.equal(first[1], net[0](y))
    assert torch.equal(last[1], net(y))
    assert hook_count(net) == 0


def test_record_returns_copies():
    layer = nn.Identity()
    x = torch.zeros(3)
    with hooks.record([layer]) as (seen,):
        layer(x)
    x += 1
    assert torch.equal(seen[0], torch.zeros(3))


def test_record_inputs_returns_float32_copies(net):
    x = torch.randn(5, 3, dtype=torch.float64)
    with hooks.record_inputs(net[2]) as seen:
        net(x)
    assert seen[0].dtype == torch.float32
    assert torch.equal(seen[0], net[1](net[0](x)).float())
    assert hook_count(net) == 0


def test_record_inputs_with_stop_ends_the_forward_pass_before_the_module_runs(net):
    reached = []
    with hooks.record_inputs(net[1], stop=True) as seen, hooks.record([net[1], net[2]]) as later:
        net(torch.ones(1, 3, dtype=torch.float64))
        reached.append("after the forward")
    assert len(seen) == 1
    assert later == [[], []]
    assert reached == []
    assert hook_count(net) == 0


def test_patch_replaces_outputs_counts_calls_and_removes_its_hooks(net):
    x = torch.randn(5, 3, dtype=torch.float64)
    before = net(x)
    with hooks.patch({net[0]: lambda out: 2 * out}) as calls:
        changed = net(x)
        net(x)
    assert torch.equal(changed, net[2](torch.tanh(2 * net[0](x))))
    assert calls[net[0]] == 2
    assert torch.equal(net(x), before)
    assert hook_count(net) == 0


def test_patch_does_not_change_the_rest_of_a_tuple():
    pair = Pair()
    with hooks.patch({pair: lambda out: out * 10}):
        assert pair(1) == (20, "weights")
    assert pair(1) == (2, "weights")


@pytest.mark.parametrize("manager", ["record", "record_inputs", "record_inputs_stop", "patch"])
def test_no_hook_is_left_after_an_exception(net, manager):
    context = {
        "record": lambda: hooks.record(list(net)),
        "record_inputs": lambda: hooks.record_inputs(net[0]),
        "record_inputs_stop": lambda: hooks.record_inputs(net[0], stop=True),
        "patch": lambda: hooks.patch({net[0]: lambda out: out}),
    }[manager]()
    with pytest.raises(RuntimeError, match="on purpose"), context:
        assert hook_count(net) > 0
        raise RuntimeError("on purpose")
    assert hook_count(net) == 0


def test_no_hook_is_left_when_a_replacement_raises(net):
    def fail(_):
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"), hooks.patch({net[0]: fail}):
        net(torch.ones(1, 3, dtype=torch.float64))
    assert hook_count(net) == 0


class Scaled(nn.Module):
    """Takes a keyword, as attention takes `encoder_hidden_states`."""

    def forward(self, x, *, factor=1.0):
        return x * factor


def test_patch_inputs_replaces_positions_and_keywords_and_counts(net):
    layer = Scaled()
    with hooks.patch_inputs({layer: lambda a, k: ((a[0] + 1,), {"factor": 3.0})}) as calls:
        assert torch.equal(layer(torch.ones(2), factor=2.0), torch.full((2,), 6.0))
        layer(torch.ones(2))
    assert calls == {layer: 2}
    assert torch.equal(layer(torch.ones(2)), torch.ones(2))
    assert hook_count(layer) == 0


def test_patch_inputs_leaves_no_hook_after_an_exception():
    layer = Scaled()
    with (
        pytest.raises(RuntimeError, match="stop"),
        hooks.patch_inputs({layer: lambda a, k: (a, k)}),
    ):
        raise RuntimeError("stop")
    assert hook_count(layer) == 0


def test_recorded_outputs_keep_their_gradient_without_copies(net):
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    module = next(m for m in net.modules() if isinstance(m, torch.nn.Linear))
    with hooks.record([module], copies=False) as (outputs,):
        net(x)
    assert outputs[0].requires_grad
    with hooks.record([module]) as (outputs,):
        net(x)
    assert not outputs[0].requires_grad
