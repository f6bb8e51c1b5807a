"""Measurements of `quality_edit`: the pictures of one edit, the captions that it moves, its size, and an attack."""

import random
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edit_concepts import bare, spelled
from edit_methods import Given, Method
from edit_prompts import Asked, Prompt, preserved
from torch import Tensor

import overpaint as op
from overpaint import probes
from overpaint.edit import Change
from overpaint.errors import UnsupportedModel
from overpaint.evaluate import attack
from overpaint.evaluate.attack_results import TEXT_FREE
from overpaint.evaluate.rewordings import replace_concept
from overpaint.probes import questions
from overpaint.scorers.judge import Judge
from overpaint.trace import Drawing, pick_window, prompt_swap

__all__ = ["Bench", "Edit", "attacked", "find_layers", "labelled", "make_edit", "measure"]


@dataclass(frozen=True)
class Bench:
    """Model, scorer and settings of all pictures."""

    model: op.TextToImage
    judge: Judge
    steps: int
    seed: int
    batch_size: int = 64

    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """Return pictures, (N, 3, H, W) in [0, 1]."""
        drawn = self.model.generate(
            list(prompts), seed=list(seeds), steps=self.steps, batch_size=self.batch_size
        )
        return drawn.images.float().cpu()


@dataclass(frozen=True)
class Edit:
    """An edit to measure: its change, or `None`, the words that are replaced in prompts, and how long it took."""

    change: Change | None
    rewrites: Mapping[str, str]
    seconds: float
    refused: str = ""

    def prompt(self, text: str) -> str:
        """Return a prompt as the model gets it."""
        for old, new in self.rewrites.items():
            text = replace_concept(text, old, new)
        return text

    @contextmanager
    def applied(self, model: op.TextToImage) -> Iterator[None]:
        """Apply the change while the block runs."""
        with nullcontext() if self.change is None else self.change.applied(model):
            yield


def make_edit(
    bench: Bench,
    method: Method,
    settings: Mapping[str, Any],
    pairs: Mapping[str, str],
    kinds: Mapping[str, str],
    layers: Sequence[int] | None = None,
) -> Edit:
    """Return the edit of some pairs by a method; a pair that the method refuses is left unedited.

    Args:
        bench: Its model is edited.
        method: The method.
        settings: Keyword arguments of the method, and `subject`.
        pairs: Old concept to new.
        kinds: The kind of each old concept.
        layers: Layers for LocoEdit.
    """
    options = dict(settings)
    default = "bare" if method.subject == "bare" else "whole"
    chosen = spelled(pairs, kinds, options.pop("subject", default))
    labels = bench.judge.labels
    given = Given(
        bench.model, chosen, tuple(preserved(pairs, kinds, labels)), tuple(questions.split_concepts(labels)[1]), layers
    )  # fmt: skip
    start = time.perf_counter()
    try:
        change, refused = method.make(given, **options), ""
    except (ValueError, UnsupportedModel) as error:
        change, refused = None, str(error).splitlines()[0]
    seconds = time.perf_counter() - start
    return Edit(change, chosen if method.rewrites else {}, seconds, refused)


def labelled(bench: Bench, prompts: Sequence[Prompt], edit: Edit) -> list[dict[str, str]]:
    """Return for each prompt the labels that the scorer gives to its picture, by kind of label."""
    with edit.applied(bench.model):
        images = bench.draw([edit.prompt(p.text) for p in prompts], [p.seed for p in prompts])
    columns = {kind: bench.judge.predict(images, kind) for kind in bench.judge.labels}
    return [{kind: names[i] for kind, names in columns.items()} for i in range(len(prompts))]


def measure(
    bench: Bench, asked: Asked, edit: Edit, *, captions: int, replacement: bool
) -> dict[str, Any]:
    """Return what is stored of one edit: labels of its pictures, seconds, bytes, and everyday captions that move.

    Args:
        bench: Model, scorer and settings.
        asked: The concept and its prompts.
        edit: The edit.
        captions: Everyday captions of the test half to read, the same for all edits; 0 for none. Those that hold an
            erased concept are left out; a method that rewrites prompts moves those that it rewrites.
        replacement: Draw the prompts of the replacement too.
    """
    prompts = [p for p in asked.prompts if replacement or p.role != "replacement"]
    result: dict[str, Any] = {
        "labels": labelled(bench, prompts, edit), "seconds": edit.seconds, "refused": edit.refused,
        "bytes": size(edit.change),
    }  # fmt: skip
    if not edit.refused:
        drawn = random.Random(0).sample(probes.everyday("test"), captions)
        result["captions"] = sum(edit.prompt(c) != c for c in drawn) / max(1, captions)
    if edit.change is not None:
        result["digest"] = edit.change.digest
        if captions:
            moved = op.edit.collateral(bench.model, edit.change, captions=drawn, names=())
            result["captions"] = moved.moved / max(1, len(moved.captions))
    return result


def size(change: Change | None) -> int:
    """Return the bytes of a change's file; 0 without a change."""
    if change is None:
        return 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "change.safetensors"
        change.save(path)
        return path.stat().st_size


def attacked(bench: Bench, asked: Asked, edit: Edit, budget: attack.Budget) -> dict[str, Any]:
    """Return the mean probability of the concept before the edit, after it, and under the best confirmed attempt.

    `chance` is that of prompts without the concept: a style or a color is often seen where none was asked for.
    """
    if edit.change is None:
        return {"refused": edit.refused or "no change to attack"}
    old, new = (bare(asked.kind, concept) for concept in (asked.old, asked.new))
    texts = _attack_prompts(bench, asked, old)
    cases = tuple(
        probes.Case(t, "target", t, replace_concept(t, old, new), asked.old) for t in texts
    )
    found = attack.search(
        bench.model,
        edit.change,
        probes.EvaluationSet("quality_edit", "table", old, new, cases),
        scorer=bench.judge,
        families=[f for f in attack.FAMILIES if f != TEXT_FREE],
        budget=budget,
        steps=bench.steps,
        seed=bench.seed,
    )
    best = found.best.confirmed
    return {
        "before": found.before.mean, "after": found.after.mean, "best": best.mean if best else None,
        "chance": found.chance.mean, "family": found.best.family, "words": found.best.words,
        "seconds": found.protocol["seconds"],
    }  # fmt: skip


def _attack_prompts(bench: Bench, asked: Asked, old: str) -> list[str]:
    """Return short prompts that hold the concept once."""
    shown = [p for p in asked.prompts if p.role == "plain"]
    name = asked.labels[0]
    rows: list[str] = []
    for prompt in shown:
        thing = name if asked.head == "object" else prompt.labels["object"]
        style = name if asked.head == "style" else ""
        color = name if asked.head == "color" else ""
        rows.append(questions.caption(thing, style, color, frame=len(rows)))
    return [text for text in dict.fromkeys(rows) if text.lower().split().count(old.split()[0]) == 1]


def find_layers(bench: Bench, asked: Asked, window: int = 2) -> list[int]:
    """Return the cross-attention layers that carry the concept most, as LocoGen finds them."""
    old, new = (bare(asked.kind, concept) for concept in (asked.old, asked.new))
    kind = {"trademark": "object", "action": "object", "fact": "object"}.get(asked.kind, asked.kind)
    rows = [
        probes.Probe(f"{old}-{i}", kind, text, old, asked.labels[0])
        for i, text in enumerate(_attack_prompts(bench, asked, old)[:2])
    ]
    drawing = Drawing(steps=bench.steps, seeds=range(bench.seed, bench.seed + 2))
    effects = prompt_swap(bench.model, rows, target=new, window=window, drawing=drawing)
    return [site.index for site in pick_window(effects)]
