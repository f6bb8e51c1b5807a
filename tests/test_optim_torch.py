"""DiffGrad in the company of torch's own machinery: scaled losses, sharded tensors, compilers and graphs."""

import copy
import importlib.util
import math
import shutil
import sys

import pytest
import torch
import torch.distributed as dist
from gradients import FUSED, LISTS, LOOP, PATHS, draw, feed, gap, leaves, run, same
from torch import nn

from overpaint.optim import DiffGrad, private

NEEDS_COMPILER = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("g++", "clang++", "c++")),
    reason="Inductor on a CPU needs a C++ compiler",
)
gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("unscaled_first", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "decoupled_weight_decay": True}], ids=str,
)  # fmt: skip
def test_a_scaled_loss_is_unscaled_and_an_overflow_changes_nothing(path, unscaled_first, options):
    plain, scaled = (leaves(torch.float32) for _ in range(2))
    run(plain, 3, **path, **options)
    optimizer = DiffGrad(scaled, **path, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    scaler.scale(torch.zeros(()))
    for t in range(1, 4):
        feed(scaled, t, scale=2.0**16)
        given = [p.grad.clone() for p in scaled]
        if unscaled_first:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if path == FUSED and not unscaled_first:
            assert all(torch.equal(p.grad, g) for p, g in zip(scaled, given, strict=True))
    assert gap(plain, scaled) <= (1e-9 if options.get("decoupled_weight_decay") else 0)
    kept = copy.deepcopy([p.detach() for p in scaled]), copy.deepcopy(optimizer.state_dict())
    for bad in (math.inf, math.nan):
        feed(scaled, 4)
        scaled[1].grad[0, 0] = bad
        scaler.step(optimizer)
        scaler.update()
        assert same(kept[0], scaled)
        for i, state in optimizer.state_dict()["state"].items():
            assert all(torch.equal(kept[1]["state"][i][name], state[name]) for name in state)


@pytest.fixture(scope="module")
def mesh():
    from torch.distributed.device_mesh import DeviceMesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield DeviceMesh("cpu", [0])
    dist.destroy_process_group()


@pytest.mark.parametrize("path", [{}, *PATHS], ids=str)
@pytest.mark.parametrize("placed", ["shard", "replicate"])
@pytest.mark.parametrize("options", [{}, {"dfc": 3, "weight_decay": 0.1}], ids=str)
def test_sharded_tensors_move_like_plain_ones(mesh, path, placed, options):
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    def share(tensor):
        return distribute_tensor(tensor, mesh, [Shard(0) if placed == "shard" else Replicate()])

    plain = leaves()
    sharded = [nn.Parameter(share(p.detach())) for p in plain]
    optimizer = DiffGrad(sharded, **path, **options)
    for t in range(1, 6):
        for i, p in enumerate(sharded):
            p.grad = share(draw(*p.shape, seed=100 * t + i))
        optimizer.step()
    run(plain, 5, **path, **options)
    assert gap(plain, [p.full_tensor() for p in sharded]) <= 1e-15


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_a_checkpoint_primes_the_state_and_moves_nothing(mesh, path):
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    net = nn.Linear(3, 2)
    before = [p.detach().clone() for p in net.parameters()]
    optimizer = DiffGrad(net.parameters(), lr=0.1, **path)
    found = get_optimizer_state_dict(net, optimizer)
    assert same(before, net.parameters())
    assert set(found["state"]["weight"]) == {"step", "exp_avg", "exp_avg_sq", "previous_grad"}
    assert optimizer.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize(
    ("path", "backend"),
    [
        (LOOP, "aot_eager"),
        (FUSED, "aot_eager"),
        pytest.param(LOOP, "inductor", marks=[pytest.mark.slow, NEEDS_COMPILER]),
    ],
    ids=str,
)
def test_a_compiled_step_is_the_eager_one_and_is_compiled_once(path, backend):
    torch._dynamo.reset()
    eager, compiled = (leaves(torch.float32)[:2] for _ in range(2))
    one, other = (
        DiffGrad(params, lr=torch.tensor(0.01), weight_decay=0.1, **path)
        for params in (eager, compiled)
    )
    step = torch.compile(other.step, backend=backend)
    for t in range(1, 7):
        for some in (eager, compiled):
            if t == 1:
                feed(some, t)
            else:  # the same memory, as a training loop that keeps its graph has it
                for i, p in enumerate(some):
                    p.grad.copy_(draw(*p.shape, seed=100 * t + i))
        other.param_groups[0]["lr"].fill_(0.01 / t)
        one.param_groups[0]["lr"].fill_(0.01 / t)
        one.step()
        with torch.compiler.set_stance("default" if t <= 2 else "fail_on_recompile"):
            step()
    assert gap(eager, compiled) <= 1e-6
    assert one.state[eager[0]]["step"] == other.state[compiled[0]]["step"] == 6


def test_lists_can_be_traced():
    torch._dynamo.reset()
    eager, traced = leaves(), leaves()
    run(eager, 3, **LISTS)
    optimizer = DiffGrad(traced, **LISTS)
    step = torch.compile(optimizer.step, backend="eager")
    for t in range(1, 4):
        feed(traced, t)
        step()
    assert gap(eager, traced) <= 1e-12


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_capturing_on_a_cpu_is_refused(path):
    with pytest.raises(RuntimeError, match="`capturable=True` needs .* move the model there"):
        run(leaves(), 1, capturable=True, **path)


def test_without_the_private_functions_of_torch_it_still_steps(monkeypatch):
    for name in ("_use_grad_for_differentiable", "_default_to_fused_or_foreach"):
        monkeypatch.delattr(sys.modules["torch.optim.optimizer"], name)
    spec = importlib.util.spec_from_file_location("private_without", private.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert not module.prefers_lists(leaves()) and not private.prefers_lists(leaves())

    class Plain(DiffGrad):
        step = module.grad_if_differentiable(DiffGrad.step.__wrapped__.__wrapped__)

    ours, theirs = leaves(), leaves()
    run(ours, 3)
    run(theirs, 3, make=Plain)
    assert same(ours, theirs)


@pytest.mark.parametrize("path", [LISTS, FUSED], ids=str)
def test_without_torchs_grouping_lists_are_still_of_one_dtype(path, monkeypatch):
    ours, theirs = ([*leaves(torch.float32), *leaves()] for _ in range(2))
    run(ours, 3, **path)
    numbers = list(torch.arange(6.0))
    grouped = private.group_alike([ours, numbers])
    monkeypatch.delattr(torch.optim.Optimizer, "_group_tensors_by_device_and_dtype")
    for found in (grouped, private.group_alike([ours, numbers])):
        assert sorted([int(i) for i in group[1]] for group in found) == [[0, 1, 2], [3, 4, 5]]
    run(theirs, 3, **path)
    assert same(ours, theirs)


@gpu
@needs_gpu
@pytest.mark.parametrize("path", [{}, *PATHS], ids=str)
@pytest.mark.parametrize("capturable", [False, True])
def test_a_gpu_takes_the_steps_of_a_cpu(path, capturable):
    near, far = leaves(), [nn.Parameter(p.detach().cuda()) for p in leaves()]
    run(near, 10)
    run(far, 10, capturable=capturable, **path)
    assert gap(near, [p.cpu() for p in far]) <= 1e-10


@gpu
@needs_gpu
@pytest.mark.parametrize("path", PATHS, ids=str)
def test_a_replayed_graph_takes_the_steps_of_an_eager_run(path):
    eager, held = ([nn.Parameter(p.detach().cuda()) for p in leaves()] for _ in range(2))
    run(eager, 8, capturable=True, **path)
    optimizer = DiffGrad(held, capturable=True, **path)
    for p in held:
        p.grad = torch.zeros_like(p)

    def load(t):
        for i, p in enumerate(held):
            p.grad.copy_(draw(*p.shape, seed=100 * t + i))

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for t in range(1, 4):
            load(t)
            optimizer.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    load(4)
    with torch.cuda.graph(graph):
        optimizer.step()
    for t in range(4, 9):
        load(t)
        graph.replay()
    assert gap([p.cpu() for p in eager], [p.cpu() for p in held]) <= 1e-12


@gpu
@needs_gpu
def test_an_overflow_on_a_gpu_is_skipped_without_waiting():
    params = [nn.Parameter(p.detach().cuda()) for p in leaves(torch.float32)]
    optimizer = DiffGrad(params, **FUSED)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**16)
    scaler.scale(torch.zeros((), device="cuda"))
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.full_like(p, math.inf)
    scaler.step(optimizer)
    assert same(before, params)
    assert all(optimizer.state[p]["step"].item() == 0 for p in params)
