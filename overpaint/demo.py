"""The whole loop in one function: locate, edit, judge, report. What `overpaint demo` and `make demo` run.

Everything is saved as data first; the page is drawn from the files, so it shows nothing that was not kept.
"""

import json
import math
import os
import platform
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from shlex import quote
from typing import Any

import torch

from overpaint import (
    edit,
    evaluate,
    probes,
    report,
    trace,
)
from overpaint.edit import Change
from overpaint.edit.methods.token_rows import edited_words
from overpaint.evaluate import predicted_drift
from overpaint.evaluate.results import Comparison
from overpaint.model import TextToImage
from overpaint.probes import Probe, questions
from overpaint.scorers import judge as features
from overpaint.scorers.judge import Judge

__all__ = ["FULL", "QUICK", "Size", "run"]

Progress = Callable[[int, int, str], None]  # done, in all, what
PREFERRED = "automatic"  # the method whose figures go into the summary
LAYER = "automatic, layer only"  # the same without the token embedding


@dataclass(frozen=True)
class Size:
    """How much of everything: the knobs that trade minutes for narrower intervals."""

    text_probes: int  # prompts of the text trace: one picture for every state of each
    unet_probes: int  # prompts of the UNet trace: one picture for every site of each, and source
    trace_steps: int  # denoising steps of a traced picture
    questions: int  # for each style, and half as many unseen wordings
    steps: int  # denoising steps of a judged picture


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
        model: The model; left as it was found.
        out: Folder of the results; holds `report.html` and `summary.json` at the end.
        erase: The concept to paint over.
        replace: What to put in its place.
        size: How much of everything: `FULL`, `QUICK` or your own.
        seed: Of everything drawn.
        scorer: A judge; by default `icons-judge`.
        on_progress: Told what is done, of how much, and of what.

    Raises:
        ValueError: The judge does not know `erase`, or the model cannot be traced or edited.
        OSError: `out` cannot be written.
    """
    began = time.perf_counter()
    judge = features.load(device=model.device) if scorer is None else scorer
    kind, label = questions.parse_concept(erase, judge.labels)
    out.mkdir(parents=True, exist_ok=True)
    tell = on_progress or (lambda done, total, what: None)

    changes, seconds = _changes(model, {erase: replace}, judge, seed, tell)
    changes[PREFERRED].save(out / "change.safetensors")
    _trace(model, judge, _pick(kind, label, erase, judge.labels), size, seed, out, tell)
    comparison = evaluate.compare(
        model, {"no edit": None, **changes}, erase=erase, replace=replace, scorer=judge,
        size=size.questions, steps=size.steps, seed=seed,
        on_progress=lambda done, total, name: tell(done, total, f"judging, {name}"),
    )  # fmt: skip
    comparison.save(out)
    asked = questions.build(
        kind, label, labels=judge.labels, held_out=model.held_out, size=size.questions, seed=seed
    )
    predicted_drift.save(predicted_drift.predict(model, changes, asked, kind=kind), out)
    summary = _summary(comparison, judge)
    summary |= {"edit_seconds": seconds, "seconds": time.perf_counter() - began}
    _write_json(
        out / "summary.json",
        {k: None if math.isnan(v) else round(v, 4) for k, v in summary.items()},
    )
    _write_json(
        out / "run.json",
        _run_facts(model, erase, replace, seed, size, comparison, changes[PREFERRED], out),
    )
    report.save(out)
    return summary


def _changes(
    model: TextToImage, pairs: Mapping[str, str], judge: Judge, seed: int, tell: Progress
) -> tuple[dict[str, Change], float]:
    """Return the changes to compare, and the seconds that the preferred one took."""
    known, asked = questions.split_concepts(judge.labels)
    options: dict[str, Any] = {
        "vocabulary": known, "without": asked,
        "on_progress": lambda done, total, _: tell(done, total, "editing"),
    }  # fmt: skip
    start = time.perf_counter()
    preferred = edit.auto(model, pairs, **options)
    seconds = time.perf_counter() - start
    return {
        "quickfix": edit.quickfix(model, pairs),
        PREFERRED: preferred,
        LAYER: edit.auto(model, pairs, tokens=False, **options),
        "swap embedding": edit.swap_embedding(model, pairs),
        "random site": edit.random_site(model, pairs, seed=seed),
    }, seconds


def _pick(
    kind: str, label: str, erase: str, labels: Mapping[str, Sequence[str]]
) -> tuple[Probe, ...]:
    """Return the probes of `kind`, those of the concept to erase first, then one of each other concept in turn.

    A concept that no table asks about is asked with the judge's own captions.
    """
    found = probes.load(kind)
    own = [p for p in found if p.label == label] or [
        Probe(f"demo-{kind}-{i:03d}", kind, question.prompt, erase, label)
        for i, question in enumerate(questions.build(kind, label, labels=labels, size=4))
        if question.role == "target" and question.prompt.lower().count(erase.lower()) == 1
    ]
    rest = [p for p in found if p.label != label]
    turns = max(len(own), 1)
    mixed = [p for i in range(turns) for p in (*own[i : i + 1], *rest[i::turns][:1])]
    return tuple(mixed) or found


def _trace(
    model: TextToImage,
    judge: Judge,
    asked: Collection[Probe],
    size: Size,
    seed: int,
    out: Path,
    tell: Progress,
) -> None:
    """Trace the text encoder and the UNet, and save the effects."""
    shared: dict[str, Any] = {
        "drawing": trace.Drawing(steps=size.trace_steps, seeds=(seed,)), "scorer": judge.score, "on_progress": tell,
    }  # fmt: skip
    text = trace.text_encoder(model, tuple(asked)[: size.text_probes], **shared)
    text.save(out / "text.parquet")
    for source in ("clean_trajectory", "same_latent"):
        unet = trace.unet(model, tuple(asked)[: size.unet_probes], source=source, **shared)
        unet.save(out / f"unet-{source}.parquet")


def _summary(comparison: Comparison, judge: Judge) -> dict[str, float]:
    """Return the flat figures; those on real artwork are the judge's card's, as no artwork is shipped."""
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
    """Return the words of the page: title, commands, protocol."""
    flags = f"--erase {quote(erase)} --replace {quote(replace)} --seed {seed}{' --quick' if size == QUICK else ''}"
    name, folder = quote(model.name), quote(str(out))
    device = "" if model.device.type == "cpu" else f" --device {model.device}"
    judged = comparison.scores[PREFERRED].protocol
    return {
        "title": f"{erase} → {replace}",
        "method": PREFERRED,
        "lead": f"What became of “{erase}” in the text-to-image model {model.name} after one closed-form change of "
        f"its text encoder, at {' and '.join(change.sites)}: where the model keeps it, what the edit did, and what it "
        "cost.",
        "commands": [
            f"overpaint demo --model {name} {flags}{device} --out {folder}",
            f"overpaint apply {name} {quote(str(out / 'change.safetensors'))} --out runs/edited",
            f"overpaint report {folder}",
        ],
        "protocol": {
            "Model": model.name,
            "Judge": judged["judge"],
            "Pictures judged": f"{judged['questions']} a method, {size.steps} steps, guidance {model.guidance_scale:g}",
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
    solved, asked = change.report, change.protocol
    moved = edited_words(solved)
    rows = f"rows of the token embedding, which nothing else that is looked after reads: {', '.join(moved)}"
    if not asked["terms"]:
        return rows
    layer = (
        f"{asked['contexts']} captions of the concept, {asked['background']} to keep of weight "
        f"{asked['preserve_weight']:g}, {len(solved['endangered'])} endangered concepts looked after, "
        f"{100 * solved['missed']:.0f} % of the movement given up"
    )
    return f"{rows}; {layer}" if moved else layer


def _write_json(path: Path, words: Mapping[str, Any]) -> None:
    draft = path.with_name(path.name + ".part")
    draft.write_text(
        json.dumps(words, indent=1, ensure_ascii=False, allow_nan=False), encoding="utf-8"
    )
    os.replace(draft, path)
