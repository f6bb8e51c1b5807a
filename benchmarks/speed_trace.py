"""Is tracing in one batch three times as fast as one pipeline call a state, for the same map, in constant memory?

    python benchmarks/speed_trace.py [--quick] [--json]

One prompt of `icons`, one seed, both maps: every (sublayer, position) of the text encoder, every layer of the UNet.

lockstep  `trace.text_encoder` and `trace.unet` as a user calls them: the states' rows share a batch with one clean and
          one corrupted row.
naive     as in public scripts: one call of the diffusers pipeline a state, with explicit `prompt_embeds` and
          `latents` and a batch of three pictures (clean, corrupted, restored), hooks set by hand, decoded and scored.
kind      a naive loop without repeated work: the clean and the corrupted picture are drawn once, in one call, and each
          further call draws one restored picture. For the UNet it stores all activations of the clean run, so its
          memory grows with the steps. Its ratio to lockstep is the saving of larger batches alone.

All three draw with the same scheduler, steps, guidance, start noise and scorer, and use two threads. They alternate, so
that other work on the machine slows all of them equally; each ratio (`ratio_*` to naive, `ratio_*_kind` to kind) is
that of the medians (of an even number, the lower one). `max_difference` is the largest difference of any score in the
maps. `memory_growth` is the peak of 10, 20 and 50 steps, largest over smallest, minus 1: of live tensors, counted
operation by operation, and of a new process's resident memory; the larger of both. `--quick` traces two layers of the
text encoder, takes fewer steps and repeats, and leaves out the new processes.
Writes `benchmarks/results/speed_trace.json`; with `--quick`, into `runs/benchmarks`.
"""

import argparse
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

# Read when torch is imported: on a busy machine threads that spin for long cost ten times the time; on an idle one not.
os.environ.setdefault("GOMP_SPINCOUNT", "30000")

import torch
from torch import Tensor
from torch.nn import Module

import overpaint as op
from overpaint.files import to_json, write_json
from overpaint.model import sites
from overpaint.scorers import judge
from overpaint.trace import ROLES, Drawing, Effects, Noise, TextStates, UNetStates
from overpaint.trace.corruption import Corruption, corruptions, role_positions
from overpaint.trace.memory import peak_bytes

RESULTS = Path(__file__).parent / "results"
THREADS = 2
Map = list[tuple[float, float, float]]  # clean, corrupted and restored score of each state


@dataclass(frozen=True)
class Case:
    """Model, scorer, one corrupted prompt and the number of steps, equal for all ways."""

    model: op.TextToImage
    scorer: judge.Judge
    corruption: Corruption
    steps: int

    def scores(self, embeds: Tensor) -> list[float]:
        """Return the scores of one call of the diffusers pipeline for `embeds`, shape (R, L, D)."""
        rows, model = len(embeds), self.model
        images = model.pipe(
            prompt_embeds=embeds,
            negative_prompt_embeds=model.encode([""]).expand(rows, -1, -1),
            latents=model.initial_latents([0]).repeat(rows, 1, 1, 1),
            num_inference_steps=self.steps,
            guidance_scale=model.guidance_scale,
            output_type="pt",
        ).images
        return self.scorer.score(images.float().cpu(), [self.corruption.probe] * rows).tolist()

    @torch.no_grad()
    def encode(self, state: tuple[Module, int] | None = None) -> Tensor:
        """Return clean, corrupted and restored text features, shape (3, L, D)."""
        encoder, span = self.model.text_encoder, self.corruption.span

        def noise(_: Module, __: Any, output: Tensor) -> Tensor:
            output = output.clone()
            output[1:, span.start : span.end] += self.corruption.noise.to(output)
            return output

        def restore(output: Tensor) -> None:
            assert state is not None
            output[2, state[1]] = output[0, state[1]]

        with (
            hooked(encoder.get_input_embeddings(), noise),
            hooked(state[0] if state else encoder, in_place(restore) if state else None),
        ):
            return encoder(self.corruption.ids.to(encoder.device).expand(3, -1))[0]


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

    scores: Map = []
    for module in modules:
        with hooked(module, in_place(restore)):
            scores.append(tuple(case.scores(embeds)))
    return scores


def kind_unet(case: Case, modules: Sequence[Module]) -> Map:
    embeds = case.encode()
    outputs: dict[Module, list[Tensor]] = {module: [] for module in modules}

    def store(module: Module, _: Any, output: Any) -> None:  # clean rows: 0 without text, 2 with it
        outputs[module].append((output[0] if isinstance(output, tuple) else output)[[0, 2]])

    handles = [module.register_forward_hook(store) for module in modules]
    ends = case.scores(embeds[:2])
    for handle in handles:
        handle.remove()
    scores: Map = []
    for module in modules:
        states = iter(outputs[module])

        def restore(output: Tensor, states: Iterator[Tensor] = states) -> None:
            output.copy_(next(states))

        with hooked(module, in_place(restore)):
            scores.append((*ends, *case.scores(embeds[2:])))
    return scores


def lockstep(case: Case, trace: str, only: Any) -> Effects:
    options = {"drawing": Drawing(case.steps, solver="own"), "scorer": case.scorer.score}
    probes = [case.corruption.probe]
    if trace == "text":
        states = TextStates(only=only)
        return op.trace.text_encoder(case.model, probes, states=states, controls="none", **options)
    return op.trace.unet(case.model, probes, states=UNetStates(only=only), **options)


def scores_of(effects: Effects) -> Map:
    names = ("score_clean", "score_corrupted", "score_restored")
    return list(zip(*(effects.table[name].to_pylist() for name in names), strict=True))


def ways(case: Case, *, quick: bool) -> dict[str, Callable[[], Map]]:
    """Return each way to draw each map."""
    layers = len(sites.find_text(case.model.text_encoder)) // 2
    indices = (0, layers - 1) if quick else range(layers)
    named = {site.name: site for site in sites.find(case.model)}
    states = [
        (site, role, position)
        for site in named.values()
        if site.part == "text" and site.index in indices
        for role, position in role_positions(case.corruption, ROLES)
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
    """Return the median seconds of each way, their ratios, and the largest difference of their maps."""
    draws = ways(case, quick=quick)
    case.scores(case.encode()[:1])  # allocate once what the first call of any way would allocate
    seconds: dict[str, list[float]] = {name: [] for name in draws}
    maps: dict[str, Map] = {}
    for repeat in range(repeats):
        for name, draw in draws.items():
            if quick and repeat and name.startswith("kind"):
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
    """Trace two states of each map in `steps` steps."""
    short = Case(case.model, case.scorer, case.corruption, steps)
    lockstep(short, "unet", ["unet.resnet.0", "unet.cross_attn.0"])
    lockstep(short, "text", {("text.0.mlp", "eos"), ("text.0.self_attn", "eos")})


def memory(case: Case, *, quick: bool) -> dict[str, Any]:
    """Return the peaks in MiB, and their growth with the number of steps."""
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
    model, scorer = op.load("icons"), judge.load()
    model.pipe.set_progress_bar_config(disable=True)
    probe = op.probes.load("style")[2]
    (corruption,), _ = corruptions(model, [probe], Noise())
    return Case(model, scorer, corruption, steps)


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
    parser.add_argument("--quick", action="store_true", help="fewer states, steps and repeats")
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
        "prompt": case.corruption.probe.prompt,
        "concept": case.corruption.probe.concept,
        "seed": 0,
        "repeats": repeats,
        "quick": arguments.quick,
        "threads": THREADS,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "load_average": os.getloadavg()[0],
    }
    folder = Path("runs/benchmarks") if arguments.quick else RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "speed_trace.json", {"result": result, "protocol": protocol}, indent=2)
    if arguments.json:
        print(to_json(result))


if __name__ == "__main__":
    main()
