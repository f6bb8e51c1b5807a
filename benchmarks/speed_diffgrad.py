"""How long does a step of DiffGrad take, beside torch's Adam of the same kind and two other implementations?

    python benchmarks/speed_diffgrad.py [--quick] [--json] [--threads N]

Three sets of float32 parameters: `small` (300 of 1,024 numbers), `mixed` (161 of 10 to 65,536, 3.5 million in all, as
a network has them) and `big` (one of 8.4 million). In each all ways take a step in turn, so that a busy neighbour slows
all, and the medians are compared. `loop`, `foreach` and `fused` are DiffGrad's step over that of `torch.optim.Adam`
with the same option, on the mixed set; the same with `_small` and `_big` on the others. `fused_to_adam_foreach` is over
Adam's step with lists, `foreach_to_pytorch_optimizer` over pytorch_optimizer's (below 1 is faster), and
`to_torch_optimizer` is our loop over its loop. `compiled_big` is `torch.compile(optimizer.step)` over Adam's fused
kernel; not with `--quick`.

With one thread, the default, time is that of the processor spent by the process; with more it is the clock's. The floor
is 36 / 28 = 1.29, the bytes that must move. Writes `benchmarks/results/speed_diffgrad.json`; with `--quick`, into
`runs/benchmarks`.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Adam

from overpaint import __version__
from overpaint.optim import DiffGrad
from overpaint.train import card

RESULTS = Path(__file__).parent / "results"
SETS = {
    "small": (1024,) * 300,
    "mixed": (65_536, 64, 256) * 53 + (4096, 10),
    "big": (8_388_608,),
}
STEPS = {"small": 80, "mixed": 40, "big": 15}
Ways = dict[str, Callable[[], Any]]


def parameters(sizes: tuple[int, ...]) -> list[nn.Parameter]:
    """Return parameters with gradients."""
    generator = torch.Generator().manual_seed(0)
    found = [nn.Parameter(torch.randn(n, generator=generator)) for n in sizes]
    for p in found:
        p.grad = torch.randn(p.shape, generator=generator)
    return found


def ways(sizes: tuple[int, ...]) -> Ways:
    """Return a step of each implementation, each on parameters of its own."""
    import pytorch_optimizer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch_optimizer

    return {
        "adam loop": Adam(parameters(sizes), foreach=False).step,
        "adam foreach": Adam(parameters(sizes), foreach=True).step,
        "adam fused": Adam(parameters(sizes), fused=True).step,
        "loop": DiffGrad(parameters(sizes), foreach=False).step,
        "foreach": DiffGrad(parameters(sizes), foreach=True).step,
        "fused": DiffGrad(parameters(sizes), fused=True).step,
        "pytorch_optimizer loop": pytorch_optimizer.DiffGrad(parameters(sizes), foreach=False).step,
        "pytorch_optimizer foreach": pytorch_optimizer.DiffGrad(
            parameters(sizes), foreach=True
        ).step,
        "torch_optimizer loop": torch_optimizer.DiffGrad(parameters(sizes)).step,
    }


def compiled(sizes: tuple[int, ...]) -> Ways:
    """Return the compiled step, if there is a compiler for it; the first call compiles."""
    if not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        return {}
    optimizer = DiffGrad(parameters(sizes), lr=torch.tensor(1e-3))
    return {"compiled": torch.compile(optimizer.step)}


def medians(steps: Ways, *, count: int, clock: Callable[[], float]) -> dict[str, float]:
    """Return the median milliseconds of a step, each way in turn."""
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(count + 2):
        for name, step in steps.items():
            start = clock()
            step()
            if turn > 1:  # the first makes the state, and compiles
                taken[name].append(1000 * (clock() - start))
    return {name: statistics.median(values) for name, values in taken.items()}


def ratios(ms: dict[str, float], ending: str) -> dict[str, float]:
    """Return the figures of one set."""
    found = {kind: ms[kind] / ms[f"adam {kind}"] for kind in ("loop", "foreach", "fused")}
    found["fused_to_adam_foreach"] = ms["fused"] / ms["adam foreach"]
    found["foreach_to_pytorch_optimizer"] = ms["foreach"] / ms["pytorch_optimizer foreach"]
    found["loop_to_pytorch_optimizer"] = ms["loop"] / ms["pytorch_optimizer loop"]
    found["to_torch_optimizer"] = ms["loop"] / ms["torch_optimizer loop"]
    if "compiled" in ms:
        found["compiled"] = ms["compiled"] / ms["adam fused"]
    return {name + ending: round(value, 3) for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer steps, and no compiler")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clock = time.process_time if arguments.threads == 1 else time.perf_counter
    begun = os.getloadavg()[0]
    start = time.perf_counter()
    result: dict[str, float] = {}
    table: dict[str, dict[str, float]] = {}
    for name in ("mixed", "small", "big"):
        steps = ways(SETS[name])
        if name == "big" and not arguments.quick:
            steps |= compiled(SETS[name])
        ms = medians(steps, count=5 if arguments.quick else STEPS[name], clock=clock)
        result |= ratios(ms, "" if name == "mixed" else f"_{name}")
        table[name] = {way: round(value, 3) for way, value in ms.items()}
    print(f"{'ms a step':>26}" + "".join(f"{name:>10}" for name in table))
    for way in table["big"]:
        row = (table[name].get(way) for name in table)
        print(f"{way:>26}" + "".join(f"{'':>10}" if v is None else f"{v:10.2f}" for v in row))
    for name, value in result.items():
        print(f"{name:>34} {value:8.3f}")
    protocol = {
        "milliseconds": table,
        "steps": 5 if arguments.quick else STEPS,
        "clock": clock.__name__,
        "threads": arguments.threads,
        "device": "cpu",
        "seed": 0,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "quick": arguments.quick,
        "load_average": [begun, os.getloadavg()[0]],
        "seconds": round(time.perf_counter() - start, 1),
        "versions": {
            "overpaint": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "commit": card.commit(),
    }
    folder = Path("runs/benchmarks") if arguments.quick else RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / ".speed_diffgrad.part"
    beside.write_text(json.dumps({"result": result, "protocol": protocol}, indent=2) + "\n")
    os.replace(beside, folder / "speed_diffgrad.json")
    if arguments.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
