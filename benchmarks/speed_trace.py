"""Is tracing in lockstep three times as fast as one pipeline call a state, for the same map, in constant memory?

    python benchmarks/speed_trace.py [--quick] [--json]

One prompt of `icons`, one seed, both maps: every (sublayer, position) of the text encoder, every layer of the UNet.

lockstep  `trace.text_encoder` and `trace.unet` as a user calls them: the states' rows share a batch with one clean and
          one corrupted row.
naive     what public scripts do: one call of the stock diffusers pipeline a state, with explicit `prompt_embeds` and
          `latents` and a batch of three pictures (clean, corrupted, restored), hooks set by hand, decoded and scored.
kind      a naive loop that saves what it can: the clean and the corrupted picture are drawn once, in one call, and each
          further call draws one restored picture. For the UNet it keeps all activations of the clean run, so its memory
          grows with the steps. What lockstep saves beside it is the saving of larger batches alone.

All three draw with the same scheduler, steps, guidance, start noise and judge, and get two threads. They take turns, so
that a busy neighbour slows all; each ratio (`ratio_*` to naive, `ratio_*_kind` to kind) is that of the medians (of an
even number, the lower one). `max_difference` is the largest difference of any score in the maps. `memory_growth` is the
peak of 10, 20 and 50 steps, largest over smallest, minus 1: of live tensors, counted operation by operation, and of a
fresh process's resident memory; the worse of both. `--quick` traces two layers of the text encoder, takes fewer steps
and turns, and leaves out the fresh processes.
Writes `benchmarks/results/speed_trace.json`; with `--quick`, into `runs/benchmarks`.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Read when torch is imported: beside a busy neighbour threads that spin for long cost tenfold; alone they do not.
os.environ.setdefault("GOMP_SPINCOUNT", "30000")

import torch
from torch import Tensor
from torch.nn import Module

import overpaint as op
from overpaint.model import sites
from overpaint.scorers import judge as features
from overpaint.trace import Effects, corruption
from overpaint.trace.memory import peak_bytes

RESULTS = Path(__file__).parent / "results"
THREADS = 2
Map = list[tuple[float, float, float]]  # clean, corrupted and restored score of each state


@dataclass(frozen=True)
class Case:
    """What all ways draw: one corrupted prompt from one seed."""

    model: op.TextToImage
    judge: features.Judge
    made: corruption.Corruption
    steps: int

    def scores(self, embeds: Tensor) -> list[float]:
        """Return the scores of one call of the stock pipeline, shape of `embeds` (R, L, D)."""
        rows, model = len(embeds), self.model
        images = model.pipe(
            prompt_embeds=embeds,
            negative_prompt_embeds=model.encode([""]).expand(rows, -1, -1),
            latents=model.initial_latents([0]).repeat(rows, 1, 1, 1),
            num_inference_steps=self.steps,
            guidance_scale=model.guidance_scale,
            output_type="pt",
        ).images
        return self.judge.score(images.float().cpu(), [self.made.probe] * rows).tolist()

    @torch.no_grad()
    def encode(self, state: tuple[Module, int] | None = None) -> Tensor:
        """Return clean, corrupted and restored text features, shape (3, L, D)."""
        encoder, span = self.model.text_encoder, self.made.span

        def noise(_: Module, __: Any, output: Tensor) -> Tensor:
            output = output.clone()
            output[1:, span.start : span.end] += self.made.noise.to(output)
            return output

        def restore(output: Tensor) -> None:
            assert state is not None
            output[2, state[1]] = output[0, state[1]]

        with (
            hooked(encoder.get_input_embeddings(), noise),
            hooked(state[0] if state else encoder, in_place(restore) if state else None),
        ):
            return encoder(self.made.ids.to(encoder.device).expand(3, -1))[0]


@contextmanager
def hooked(module: Module, hook: Callable[..., Any] | None) -> Iterator[None]:
    handle = module.register_forward_hook(hook) if hook else None
    try:
        yield
    finally:
        if handle:
            handle.remove()


def in_place(change: Callable[[Tensor], None]) -> Callable[..., Any]:
    """Return a forward hook that changes a copy of the module's output, or of its first element."""

    def hook(_: Module, __: Any, output: Any) -> Any:
        first = (output[0] if isinstance(output, tuple) else output).clone()
        change(first)
        return (first, *output[1:]) if isinstance(output, tuple) else first

    return hook


def naive_text(case: Case, states: Sequence[tuple[Module, int]]) -> Map:
    return [tuple(case.scores(case.encode(state))) for state in states]


def kind_text(case: Case, states: Sequence[tuple[Module, int]]) -> Map:
    ends = case.scores(case.encode()[:2])
    return [(*ends, *case.scores(case.encode(state)[2:])) for state in states]


def naive_unet(case: Case, modules: Sequence[Module]) -> Map:
    embeds = case.encode()

    def restore(output: Tensor) -> None:  # unconditional rows 0 to 2, conditional rows 3 to 5
        output[2], output[5] = output[0], output[3]

    found: Map = []
    for module in modules:
        with hooked(module, in_place(restore)):
            found.append(tuple(case.scores(embeds)))
    return found


def kind_unet(case: Case, modules: Sequence[Module]) -> Map:
    embeds = case.encode()
    kept: dict[Module, list[Tensor]] = {module: [] for module in modules}

    def keep(module: Module, _: Any, output: Any) -> None:  # clean rows: 0 without text, 2 with it
        kept[module].append((output[0] if isinstance(output, tuple) else output)[[0, 2]])

    handles = [module.register_forward_hook(keep) for module in modules]
    ends = case.scores(embeds[:2])
    for handle in handles:
        handle.remove()
    found: Map = []
    for module in modules:
        states = iter(kept[module])

        def restore(output: Tensor, states: Iterator[Tensor] = states) -> None:
            output.copy_(next(states))

        with hooked(module, in_place(restore)):
            found.append((*ends, *case.scores(embeds[2:])))
    return found


def lockstep(case: Case, trace: str, only: Any) -> Effects:
    options = {"only": only, "steps": case.steps, "score": case.judge.score}
    if trace == "text":
        return op.trace.text_encoder(
            case.model, [case.made.probe], control=False, solver="own", **options
        )
    return op.trace.unet(case.model, [case.made.probe], solver="own", **options)


def scores_of(effects: Effects) -> Map:
    names = ("score_clean", "score_corrupted", "score_restored")
    return list(zip(*(effects.table[name].to_pylist() for name in names), strict=True))


def ways(case: Case, *, quick: bool) -> dict[str, Callable[[], Map]]:
    """Return each way to draw each map."""
    layers = len(sites.find_text(case.model.text_encoder)) // 2
    kept = (0, layers - 1) if quick else range(layers)
    named = {site.name: site for site in sites.find(case.model)}
    states = [
        (site, role, position)
        for site in named.values()
        if site.part == "text" and site.index in kept
        for role, position in corruption.places(case.made, corruption.ROLES)
    ]
    traced = [site for site in named.values() if site.part == "unet"]
    text = [(site.module(case.model), position) for site, _, position in states]
    unet = [site.module(case.model) for site in traced]
    roles = {(site.name, role) for site, role, _ in states}
    return {
        "lockstep text": lambda: scores_of(lockstep(case, "text", roles)),
        "naive text": lambda: naive_text(case, text),
        "kind text": lambda: kind_text(case, text),
        "lockstep unet": lambda: scores_of(lockstep(case, "unet", [s.name for s in traced])),
        "naive unet": lambda: naive_unet(case, unet),
        "kind unet": lambda: kind_unet(case, unet),
    }


def difference(one: Map, other: Map) -> float:
    return float((torch.tensor(one) - torch.tensor(other)).abs().max())


def measure(case: Case, *, quick: bool, repeats: int) -> dict[str, Any]:
    """Return the medians of each way in seconds, their ratios, and how far their maps are apart."""
    found = ways(case, quick=quick)
    case.scores(case.encode()[:1])  # what is made once, at the first call, is nobody's
    seconds: dict[str, list[float]] = {name: [] for name in found}
    maps: dict[str, Map] = {}
    for turn in range(repeats):
        for name, draw in found.items():
            if quick and turn and name.startswith("kind"):
                continue
            start = time.perf_counter()
            maps[name] = draw()
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median_low(numbers) for name, numbers in seconds.items()}
    result: dict[str, Any] = {}
    for trace in ("text", "unet"):
        ours = medians[f"lockstep {trace}"]
        result[f"ratio_{trace}"] = round(medians[f"naive {trace}"] / ours, 2)
        result[f"ratio_{trace}_kind"] = round(medians[f"kind {trace}"] / ours, 2)
        result[f"states_{trace}"] = len(maps[f"naive {trace}"])
        for name in ("lockstep", "naive", "kind"):
            result[f"{name}_{trace}_seconds"] = round(medians[f"{name} {trace}"], 3)
    result["max_difference"] = max(
        difference(maps[f"lockstep {trace}"], maps[f"{name} {trace}"])
        for trace in ("text", "unet")
        for name in ("naive", "kind")
    )
    return result


def few(case: Case, steps: int) -> None:
    """Trace two states of each map in so many steps."""
    short = Case(case.model, case.judge, case.made, steps)
    lockstep(short, "unet", ["unet.resnet.0", "unet.cross_attn.0"])
    lockstep(short, "text", {("text.0.mlp", "eos"), ("text.0.self_attn", "eos")})


def memory(case: Case, *, quick: bool) -> dict[str, Any]:
    """Return the peaks in MiB, and by how much they grow with the steps."""
    counts = (2, 4, 10) if quick else (10, 20, 50)
    tensors = [peak_bytes(lambda n=n: few(case, n)) / 2**20 for n in counts]
    result = {f"tensors_mib_{n}": round(peak, 2) for n, peak in zip(counts, tensors, strict=True)}
    growth = [max(tensors) / min(tensors) - 1]
    if not quick:
        command = [sys.executable, __file__, "--resident"]
        resident = [float(subprocess.check_output([*command, str(n)], text=True)) for n in counts]
        result |= {f"resident_mib_{n}": round(r, 1) for n, r in zip(counts, resident, strict=True)}
        growth.append(max(resident) / min(resident) - 1)
    return {**result, "memory_growth": round(max(growth), 4)}


def load(steps: int) -> Case:
    model, judge = op.load("icons"), features.load()
    model.pipe.set_progress_bar_config(disable=True)
    probe = op.probes.load("style")[2]
    (made,), _ = corruption.corruptions(model, [probe], noise_samples=1, sigma="3std")
    return Case(model, judge, made, steps)


def write(folder: Path, name: str, result: dict[str, Any], protocol: dict[str, Any]) -> None:
    """Write the full result beside its place, then rename it."""
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / f".{name}.part"
    beside.write_text(json.dumps({"result": result, "protocol": protocol}, indent=2) + "\n")
    os.replace(beside, folder / f"{name}.json")


def table(result: dict[str, Any]) -> str:
    lines = ["| map | states | lockstep | naive | kind | naive / lockstep | kind / lockstep |"]
    lines.append("|---|---|---|---|---|---|---|")
    for trace in ("text", "unet"):
        seconds = " | ".join(
            f"{result[f'{n}_{trace}_seconds']:.1f} s" for n in ("lockstep", "naive", "kind")
        )
        ratios = f"{result[f'ratio_{trace}']:.1f} | {result[f'ratio_{trace}_kind']:.1f}"
        lines.append(f"| {trace} | {result[f'states_{trace}']} | {seconds} | {ratios} |")
    peaks = ", ".join(f"{k}: {v}" for k, v in result.items() if "_mib_" in k)
    lines.append(f"\nlargest difference of a score: {result['max_difference']:.1e}; {peaks}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer states, steps and turns")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--repeats", type=int, default=3, help="rounds of the full run")
    parser.add_argument("--resident", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    start = time.perf_counter()
    torch.set_num_threads(THREADS)
    case = load(steps=2 if arguments.quick else 10)
    if arguments.resident:
        few(case, arguments.resident)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    repeats = 2 if arguments.quick else arguments.repeats
    result = measure(case, quick=arguments.quick, repeats=repeats)
    result |= memory(case, quick=arguments.quick)
    result["seconds"] = round(time.perf_counter() - start, 1)
    print(table(result))
    protocol = {
        **case.model.protocol(steps=case.steps, guidance_scale=case.model.guidance_scale),
        "prompt": case.made.probe.prompt,
        "concept": case.made.probe.concept,
        "seed": 0,
        "repeats": repeats,
        "quick": arguments.quick,
        "threads": THREADS,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "load_average": os.getloadavg()[0],
    }
    folder = Path("runs/benchmarks") if arguments.quick else RESULTS
    write(folder, "speed_trace", result, protocol)
    if arguments.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
