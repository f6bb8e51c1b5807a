"""DiffGrad with torch's gradient scaling, sharded tensors, compilers and CUDA graphs."""

import copy
import importlib.util
import math
import shutil
import sys

import pytest
import torch
import torch.distributed as dist
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

from overpaint.optim import DiffGrad, torch_internals

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
    plain, scaled = (parameters(torch.float32) for _ in range(2))
    run(plain, 3, **path, **options)
    optimizer = DiffGrad(scaled, **path, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    scaler.scale(torch.zeros(()))
    for t in range(1, 4):
        set_gradients(scaled, t, scale=2.0**16)
        before = [p.grad.clone() for p in scaled]
        if unscaled_first:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if path == FUSED and not unscaled_first:
            assert all(torch.equal(p.grad, g) for p, g in zip(scaled, before, strict=True))
    assert largest_difference(plain, scaled) <= (
        1e-9 if options.get("decoupled_weight_decay") else 0
    )
    weights = copy.deepcopy([p.detach() for p in scaled])
    states = copy.deepcopy(optimizer.state_dict())["state"]
    for bad in (math.inf, math.nan):
        set_gradients(scaled, 4)
        scaled[1].grad[0, 0] = bad
        scaler.step(optimizer)
        scaler.update()
        assert all_equal(weights, scaled)
        for i, state in optimizer.state_dict()["state"].items():
            assert all(torch.equal(states[i][name], state[name]) for name in state)


@pytest.fixture(scope="module")
def mesh():
    from torch.distributed.device_mesh import DeviceMesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield DeviceMesh("cpu", [0])
    dist.destroy_process_group()


@pytest.mark.parametrize("path", [{}, *PATHS], ids=str)
@pytest.mark.parametrize("placed", ["shard", "replicate"])
@pytest.mark.parametrize("options", [{}, {"dfc": 3, "weight_decay": 0.1}], ids=str)
def test_steps_of_sharded_tensors_equal_those_of_plain_ones(mesh, path, placed, options):
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    def share(tensor):
        return distribute_tensor(tensor, mesh, [Shard(0) if placed == "shard" else Replicate()])

    plain = parameters()
    sharded = [nn.Parameter(share(p.detach())) for p in plain]
    optimizer = DiffGrad(sharded, **path, **options)
    for t in range(1, 6):
        for i, p in enumerate(sharded):
            p.grad = share(draw(*p.shape, seed=100 * t + i))
        optimizer.step()
    run(plain, 5, **path, **options)
    assert largest_difference(plain, [p.full_tensor() for p in sharded]) <= 1e-15


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_a_distributed_checkpoint_initialises_the_state_and_changes_no_weight(mesh, path):
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    net = nn.Linear(3, 2)
    before = [p.detach().clone() for p in net.parameters()]
    optimizer = DiffGrad(net.parameters(), lr=0.1, **path)
    saved = get_optimizer_state_dict(net, optimizer)
    assert all_equal(before, net.parameters())
    assert set(saved["state"]["weight"]) == {"step", "exp_avg", "exp_avg_sq", "previous_grad"}
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
def test_a_compiled_step_equals_the_eager_one_and_is_compiled_once(path, backend):
    torch._dynamo.reset()
    eager, compiled = (parameters(torch.float32)[:2] for _ in range(2))
    one, other = (
        DiffGrad(params, lr=torch.tensor(0.01), weight_decay=0.1, **path)
        for params in (eager, compiled)
    )
    step = torch.compile(other.step, backend=backend)
    for t in range(1, 7):
        for some in (eager, compiled):
            if t == 1:
                set_gradients(some, t)
            else:  # in the same memory, as in a training loop with a CUDA graph
                for i, p in enumerate(some):
                    p.grad.copy_(draw(*p.shape, seed=100 * t + i))
        other.param_groups[0]["lr"].fill_(0.01 / t)
        one.param_groups[0]["lr"].fill_(0.01 / t)
        one.step()
        with torch.compiler.set_stance("default" if t <= 2 else "fail_on_recompile"):
            step()
    assert largest_difference(eager, compiled) <= 1e-6
    assert one.state[eager[0]]["step"] == other.state[compiled[0]]["step"] == 6


def test_the_foreach_path_can_be_traced():
    torch._dynamo.reset()
    eager, traced = parameters(), parameters()
    run(eager, 3, **FOREACH)
    optimizer = DiffGrad(traced, **FOREACH)
    step = torch.compile(optimizer.step, backend="eager")
    for t in range(1, 4):
        set_gradients(traced, t)
        step()
    assert largest_difference(eager, traced) <= 1e-12


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_capturable_on_a_cpu_raises(path):
    with pytest.raises(RuntimeError, match="`capturable=True` needs .* move the model there"):
        run(parameters(), 1, capturable=True, **path)


def test_fallbacks_for_the_private_functions_of_torch(monkeypatch):
    for name in ("_use_grad_for_differentiable", "_default_to_fused_or_foreach"):
        monkeypatch.delattr(sys.modules["torch.optim.optimizer"], name)
    spec = importlib.util.spec_from_file_location(
        "torch_internals_without", torch_internals.__file__
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert not module.prefers_lists(parameters()) and not torch_internals.prefers_lists(
        parameters()
    )

    class Plain(DiffGrad):
        step = module.grad_if_differentiable(DiffGrad.step.__wrapped__.__wrapped__)

    ours, theirs = parameters(), parameters()
    run(ours, 3)
    run(theirs, 3, make=Plain)
    assert all_equal(ours, theirs)


@pytest.mark.parametrize("path", [FOREACH, FUSED], ids=str)
def test_fallback_for_torchs_grouping_by_device_and_dtype(path, monkeypatch):
    ours, theirs = ([*parameters(torch.float32), *parameters()] for _ in range(2))
    run(ours, 3, **path)
    numbers = list(torch.arange(6.0))
    grouped = torch_internals.group_by_device_and_dtype([ours, numbers])
    monkeypatch.delattr(torch.optim.Optimizer, "_group_tensors_by_device_and_dtype")
    for groups in (grouped, torch_internals.group_by_device_and_dtype([ours, numbers])):
        assert sorted([int(i) for i in group[1]] for group in groups) == [[0, 1, 2], [3, 4, 5]]
    run(theirs, 3, **path)
    assert all_equal(ours, theirs)


@gpu
@needs_gpu
@pytest.mark.parametrize("path", [{}, *PATHS], ids=str)
@pytest.mark.parametrize("capturable", [False, True])
def test_steps_on_a_gpu_equal_those_on_a_cpu(path, capturable):
    on_cpu, on_gpu = parameters(), [nn.Parameter(p.detach().cuda()) for p in parameters()]
    run(on_cpu, 10)
    run(on_gpu, 10, capturable=capturable, **path)
    assert largest_difference(on_cpu, [p.cpu() for p in on_gpu]) <= 1e-10


@gpu
@needs_gpu
@pytest.mark.parametrize("path", PATHS, ids=str)
def test_a_replayed_cuda_graph_equals_an_eager_run(path):
    eager, held = ([nn.Parameter(p.detach().cuda()) for p in parameters()] for _ in range(2))
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
    assert largest_difference([p.cpu() for p in eager], [p.cpu() for p in held]) <= 1e-12


@gpu
@needs_gpu
def test_an_overflow_on_a_gpu_is_skipped():
    params = [nn.Parameter(p.detach().cuda()) for p in parameters(torch.float32)]
    optimizer = DiffGrad(params, **FUSED)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**16)
    scaler.scale(torch.zeros((), device="cuda"))
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.full_like(p, math.inf)
    scaler.step(optimizer)
    assert all_equal(before, params)
    assert all(optimizer.state[p]["step"].item() == 0 for p in params)
