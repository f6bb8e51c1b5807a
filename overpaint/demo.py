"""Run trace, edit, evaluation and report in one call, for `overpaint demo` and `make demo`.

All results are saved as data first. The page is drawn from the saved files only.
"""

import math
import platform
import shlex
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from overpaint import edit, evaluate, files, probes, report, scorers, trace
from overpaint.edit import Change
from overpaint.edit.methods.token_rows import edited_words
from overpaint.errors import check_seed
from overpaint.evaluate import predicted_drift
from overpaint.evaluate.results import Comparison
from overpaint.model import TextToImage
from overpaint.model.sampling import Progress
from overpaint.probes import Probe, questions
from overpaint.scorers import Judge
from overpaint.scorers.protocols import check_size

__all__ = ["FULL", "QUICK", "Size", "run"]

PREFERRED = "automatic"  # the method whose figures go into the summary
ROWS = "token rows"  # `rename`: what replacing the words of the prompt would do


@dataclass(frozen=True)
class Size:
    """Sample sizes: larger ones take longer and give narrower intervals."""

    text_probes: int  # prompts of the text trace; each draws one picture for every state
    unet_probes: int  # prompts of the UNet trace; each draws one picture for every site and source
    trace_steps: int  # denoising steps of a traced picture
    questions: int  # questions for each style, and half as many unseen wordings
    steps: int  # denoising steps of an evaluated picture


FULL = Size(text_probes=3, unet_probes=3, trace_steps=10, questions=24, steps=12)
QUICK = Size(text_probes=1, unet_probes=1, trace_steps=6, questions=4, steps=8)


def run(
    model: TextToImage,
    out: Path,
    *,
    erase: str = "openmoji style",
    replace: str = "noto style",
    size: Size = FULL,
    seed: int = 0,
    scorer: Judge | None = None,
    on_progress: Progress | None = None,
) -> dict[str, float]:
    """Run the loop on `model` and return the flat figures of `summary.json`.

    Args:
        model: The model; its weights are the same afterwards.
        out: Folder of the results; holds `report.html` and `summary.json` at the end.
        erase: The concept to erase.
        replace: The concept to put in its place.
        size: Sample sizes: `FULL`, `QUICK` or others.
        seed: Seed of all random draws.
        scorer: A judge; by default `icons-judge`.
        on_progress: Called with (done, total, label).

    Raises:
        ValueError: The judge has no label for `erase`, or the model cannot be traced or edited.
        OSError: `out` cannot be written.
    """
    seed = check_seed(seed)
    start = time.perf_counter()
    judge = scorers.load(device=model.device) if scorer is None else scorer
    check_size(judge, model)
    kind, label = questions.parse_concept(erase, judge.labels)
    out.mkdir(parents=True, exist_ok=True)
    on_progress = on_progress or (lambda done, total, label: None)

    changes, seconds = _changes(model, {erase: replace}, judge, seed, on_progress)
    changes[PREFERRED].save(out / "change.safetensors")
    _trace(
        model, judge, _choose_probes(kind, label, erase, judge.labels), size, seed, out, on_progress
    )
    comparison = evaluate.compare(
        model, {"no edit": None, **changes}, erase=erase, scorer=judge,
        size=size.questions, steps=size.steps, seed=seed,
        on_progress=lambda done, total, name: on_progress(done, total, f"evaluating, {name}"),
    )  # fmt: skip
    comparison.save(out)
    evaluated = questions.build(
        kind, label, labels=judge.labels, held_out=model.held_out, size=size.questions, seed=seed
    )
    predicted_drift.save(predicted_drift.predict(model, changes, evaluated, kind=kind), out)
    summary = _summary(comparison, judge)
    summary |= {"edit_seconds": seconds, "seconds": time.perf_counter() - start}
    rounded = {k: v if math.isnan(v) else round(v, 4) for k, v in summary.items()}
    files.write_json(out / "summary.json", rounded)
    files.write_json(
        out / "run.json",
        _run_facts(model, erase, replace, seed, size, comparison, changes[PREFERRED], out),
    )
    report.save(out)
    return summary


def _changes(
    model: TextToImage, pairs: Mapping[str, str], judge: Judge, seed: int, on_progress: Progress
) -> tuple[dict[str, Change], float]:
    """Return the changes to compare, and the seconds that the preferred one took."""
    preserved, evaluated = questions.split_concepts(judge.labels)
    options: dict[str, Any] = {
        "vocabulary": preserved, "without": evaluated,
        "on_progress": lambda done, total, _: on_progress(done, total, "editing"),
    }  # fmt: skip
    start = time.perf_counter()
    preferred = edit.auto(model, pairs, **options)
    seconds = time.perf_counter() - start
    return {
        "quickfix": edit.quickfix(model, pairs),
        PREFERRED: preferred,
        ROWS: edit.rename(model, pairs, any_token=True, collateral=False),
        "swap embedding": edit.swap_embedding(model, pairs),
        "random site": edit.random_site(model, pairs, seed=seed),
    }, seconds


def _choose_probes(
    kind: str, label: str, erase: str, labels: Mapping[str, Sequence[str]]
) -> tuple[Probe, ...]:
    """Return the probes of `kind`: those of the concept to erase, alternating with one of each other concept.

    For a concept without probes the questions of its label are used.
    """
    table = probes.load(kind)
    target = [p for p in table if p.label == label] or [
        Probe(f"demo-{kind}-{i:03d}", kind, question.prompt, erase, label)
        for i, question in enumerate(questions.build(kind, label, labels=labels, size=4))
        if question.role == "target" and question.prompt.lower().count(erase.lower()) == 1
    ]
    others = [p for p in table if p.label != label]
    count = max(len(target), 1)
    mixed = [p for i in range(count) for p in (*target[i : i + 1], *others[i::count][:1])]
    return tuple(mixed) or table


def _trace(
    model: TextToImage,
    judge: Judge,
    chosen: Collection[Probe],
    size: Size,
    seed: int,
    out: Path,
    on_progress: Progress,
) -> None:
    """Trace the text encoder and the UNet, and save the effects."""
    shared: dict[str, Any] = {
        "drawing": trace.Drawing(steps=size.trace_steps, seeds=(seed,)), "scorer": judge.score,
        "on_progress": on_progress,
    }  # fmt: skip
    text = trace.text_encoder(model, tuple(chosen)[: size.text_probes], **shared)
    text.save(out / "text.parquet")
    for source in ("clean_trajectory", "same_latent"):
        unet = trace.unet(model, tuple(chosen)[: size.unet_probes], source=source, **shared)
        unet.save(out / f"unet-{source}.parquet")


def _summary(comparison: Comparison, judge: Judge) -> dict[str, float]:
    """Return the flat figures; those on real artwork are read from the judge's card, as no artwork is shipped."""
    names = {
        "object_top1": "object", "style_top1": "style",
        "heldout_object_top1": "object held out", "heldout_style_top1": "style held out",
    }  # fmt: skip
    figures = judge.card.get("figures", {})
    real = (
        "object_top1_real",
        "style_top1_real",
        "heldout_object_top1_real",
        "heldout_style_top1_real",
    )
    return {
        **{key: comparison.baseline[name].mean for key, name in names.items() if name in comparison.baseline},
        **{key: float(figures[key]) for key in real if key in figures},
        **comparison.scores[PREFERRED].flat(),
    }  # fmt: skip


def _run_facts(
    model: TextToImage,
    erase: str,
    replace: str,
    seed: int,
    size: Size,
    comparison: Comparison,
    change: Change,
    out: Path,
) -> dict[str, Any]:
    """Return the content of `run.json`: title, commands, protocol."""
    flags = ["--erase", erase, "--replace", replace, "--seed", str(seed)]
    if size == QUICK:
        flags.append("--quick")
    if model.device.type != "cpu":
        flags += ["--device", str(model.device)]
    change_file = str(out / "change.safetensors")
    evaluation = comparison.scores[PREFERRED].protocol
    return {
        "title": f"{erase} → {replace}",
        "method": PREFERRED,
        "lead": f"“{erase}” in the text-to-image model {files.public_name(model.name)}, before and after one "
        f"closed-form edit of its text encoder at {' and '.join(change.sites)}: the states that "
        "carry it, the effect of the edit, and its side effects.",
        "commands": [
            shlex.join(["overpaint", "demo", "--model", model.name, *flags, "--out", str(out)]),
            shlex.join(["overpaint", "apply", model.name, change_file, "--out", "runs/edited"]),
            shlex.join(["overpaint", "report", str(out)]),
        ],
        "protocol": {
            "Model": files.public_name(model.name),
            "Judge": evaluation["judge"],
            "Pictures": f"{evaluation['questions']} a method, {size.steps} steps, guidance {model.guidance_scale:g}",
            "Traces": f"{size.text_probes} prompts (text encoder), {size.unet_probes} (UNet), {size.trace_steps} steps",
            "Edit": _edit_facts(change),
            "Scheduler": type(model.scheduler).__name__,
            "Seed": seed,
            "Versions": ", ".join(f"{n} {version(n)}" for n in ("overpaint", "torch", "diffusers", "transformers")),
            "Machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}, "
            f"{model.device.type}, {torch.get_num_threads()} threads",
        },
    }  # fmt: skip


def _edit_facts(change: Change) -> str:
    """Return one line with the moved weights and the preserved concepts."""
    report, protocol = change.report, change.protocol
    words = edited_words(report)
    rows = f"rows of the token embedding that no preserved concept uses: {', '.join(words)}"
    if not protocol["terms"]:
        return rows
    layer = (
        f"fitted to {protocol['contexts']} captions of the concept, {protocol['background']} preserved ones of weight "
        f"{protocol['preserve_weight']:g}; {len(report['endangered'])} endangered concepts preserved; "
        f"{100 * report['missed']:.0f} % of the target movement not reached"
    )
    return f"{rows}; {layer}" if words else layer
