"""Time of a step of DiffGrad, relative to torch's Adam on the same path and to two other implementations.

    python benchmarks/speed_diffgrad.py [--quick] [--json] [--threads N]

Three sets of float32 parameters: `small` (300 of 1,024 numbers), `mixed` (161 of 10 to 65,536, 3.5 million in all, as
in a network) and `big` (one of 8.4 million). The implementations take steps in turn, so that other load slows all of
them, and the medians are compared. `loop`, `foreach` and `fused` are the time of DiffGrad's step divided by that of
`torch.optim.Adam` with the same option, on the mixed set; `_small` and `_big` mark the other sets.
`fused_to_adam_foreach` divides by Adam's foreach step, `foreach_to_pytorch_optimizer` by pytorch_optimizer's (below 1
is faster), and `to_torch_optimizer` is our loop over its loop. `compiled_big` is `torch.compile(optimizer.step)` over
Adam's fused kernel; it is left out with `--quick`.

With one thread, the default, the time is the processor time of the process; with more it is wall time. The lower bound
is 36 / 28 = 1.29, the ratio of the bytes that must be read and written. Writes
`benchmarks/results/speed_diffgrad.json`; with `--quick`, into `runs/benchmarks`.
"""

import argparse
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

from overpaint import __version__, files
from overpaint.optim import DiffGrad
from overpaint.train import card

RESULTS = Path(__file__).parent / "results"
SETS = {
    "small": (1024,) * 300,
    "mixed": (65_536, 64, 256) * 53 + (4096, 10),
    "big": (8_388_608,),
}
STEPS = {"small": 80, "mixed": 40, "big": 15}
Steps = dict[str, Callable[[], Any]]


def parameters(sizes: tuple[int, ...]) -> list[nn.Parameter]:
    """Return parameters with gradients."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(n, generator=generator)) for n in sizes]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)
    return params


def implementations(sizes: tuple[int, ...]) -> Steps:
    """Return the step of each implementation, each on its own parameters."""
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


def compiled(sizes: tuple[int, ...]) -> Steps:
    """Return the compiled step, if a C++ compiler is installed; the first call compiles."""
    if not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        return {}
    optimizer = DiffGrad(parameters(sizes), lr=torch.tensor(1e-3))
    return {"compiled": torch.compile(optimizer.step)}


def medians(steps: Steps, *, count: int, clock: Callable[[], float]) -> dict[str, float]:
    """Return the median milliseconds of a step of each implementation, taken in turn."""
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(count + 2):
        for name, step in steps.items():
            start = clock()
            step()
            if turn > 1:  # the first steps create the state, and compile
                taken[name].append(1000 * (clock() - start))
    return {name: statistics.median(values) for name, values in taken.items()}


def ratios(ms: dict[str, float], ending: str) -> dict[str, float]:
    """Return the ratios for one set of parameters; their names end in `ending`."""
    values = {kind: ms[kind] / ms[f"adam {kind}"] for kind in ("loop", "foreach", "fused")}
    values["fused_to_adam_foreach"] = ms["fused"] / ms["adam foreach"]
    values["foreach_to_pytorch_optimizer"] = ms["foreach"] / ms["pytorch_optimizer foreach"]
    values["loop_to_pytorch_optimizer"] = ms["loop"] / ms["pytorch_optimizer loop"]
    values["to_torch_optimizer"] = ms["loop"] / ms["torch_optimizer loop"]
    if "compiled" in ms:
        values["compiled"] = ms["compiled"] / ms["adam fused"]
    return {name + ending: round(value, 3) for name, value in values.items()}


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
        steps = implementations(SETS[name])
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
    facts = {"result": result, "protocol": protocol}
    files.write_json(folder / "speed_diffgrad.json", facts, indent=2)
    if arguments.json:
        print(files.to_json(result))


if __name__ == "__main__":
    main()
