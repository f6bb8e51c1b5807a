"""Measurements of `quality_edit`: the pictures of one edit, the captions that it moves, and its size.

No picture is drawn twice. A picture depends on the UNet, the start noise, and the text features of its prompt and of
the empty prompt. Where an edit leaves all of them as they are, bit for bit, the labels of the unedited model's picture
are taken: always if a method refuses a concept or only rewrites prompts, and for the prompts without a moved token if
it moves token rows.
"""

import random
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from edit_concepts import spelled
from edit_methods import Given, Method
from edit_prompts import Asked, Prompt, preserved
from torch import Tensor

import overpaint as op
from overpaint import probes
from overpaint.edit import Change
from overpaint.errors import UnsupportedModel
from overpaint.evaluate.rewordings import replace_concept
from overpaint.probes import questions
from overpaint.scorers.judge import Judge

__all__ = [
    "NOTHING",
    "Bench",
    "Edit",
    "Known",
    "known_labels",
    "labelled",
    "make_edit",
    "measure",
    "to_draw",
]

Known = Mapping[tuple[str, int], Mapping[str, str]]
"""Labels of the unedited model's pictures, by prompt and seed."""


@dataclass(frozen=True)
class Bench:
    """Model, scorer and settings of all pictures."""

    model: op.TextToImage
    judge: Judge
    steps: int
    seed: int
    batch_size: int = 64

    @property
    def settings(self) -> dict[str, Any]:
        """What the numbers of a picture depend on beside the weights, ready for JSON."""
        return {
            "steps": self.steps, "seed": self.seed, "guidance_scale": self.model.guidance_scale,
            "scheduler": type(self.model.scheduler).__name__, "device": str(self.model.device),
            "dtype": str(self.model.dtype),
        }  # fmt: skip

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


NOTHING = Edit(None, {}, 0.0)
"""The unedited model."""


def make_edit(
    bench: Bench,
    method: Method,
    settings: Mapping[str, Any],
    pairs: Mapping[str, str],
    kinds: Mapping[str, str],
    layers: Sequence[int] | None = None,
) -> Edit:
    """Return the edit of some pairs by a method; a pair that the method refuses or cannot solve is left unedited.

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
    except (ValueError, UnsupportedModel, torch.linalg.LinAlgError) as error:
        change, refused = None, str(error).splitlines()[0]
    seconds = time.perf_counter() - start
    return Edit(change, chosen if method.rewrites else {}, seconds, refused)


def known_labels(prompts: Sequence[Prompt], labels: Sequence[Mapping[str, str]]) -> Known:
    """Return labels of the unedited model's pictures by prompt and seed."""
    return {(p.text, p.seed): row for p, row in zip(prompts, labels, strict=True)}


def to_draw(bench: Bench, prompts: Sequence[Prompt], edit: Edit, known: Known) -> list[int]:
    """Return the indices of the prompts whose pictures are not `known`: the edit changes what the UNet reads or does.

    The text features of all prompts are compared bit for bit, in batches of the same prompts.
    """
    texts = [edit.prompt(p.text) for p in prompts]
    every = [i for i, p in enumerate(prompts) if (texts[i], p.seed) not in known]
    if edit.change is None or len(every) == len(prompts):
        return every
    if not all(site.startswith("text") for site in edit.change.sites):
        return list(range(len(prompts)))
    with edit.applied(bench.model):
        after = _features(bench, [""])
    if not after.equal(_features(bench, [""])):  # guidance reads the empty prompt for every picture
        return list(range(len(prompts)))
    before = _features(bench, texts)
    with edit.applied(bench.model):
        after = _features(bench, texts)
    moved = {i for i in range(len(texts)) if not after[i].equal(before[i])}
    return sorted(moved.union(every))


def labelled(
    bench: Bench, prompts: Sequence[Prompt], edit: Edit, known: Known | None = None
) -> list[dict[str, str]]:
    """Return for each prompt the labels that the scorer gives to its picture, by kind of label.

    Args:
        bench: Model, scorer and settings.
        prompts: The prompts.
        edit: The edit.
        known: Labels of pictures that are not drawn again where the edit leaves them as they are.
    """
    texts = [edit.prompt(p.text) for p in prompts]
    known = known or {}
    drawn = to_draw(bench, prompts, edit, known)
    found: dict[int, dict[str, str]] = {}
    if drawn:
        with edit.applied(bench.model):
            images = bench.draw([texts[i] for i in drawn], [prompts[i].seed for i in drawn])
        columns = {kind: bench.judge.predict(images, kind) for kind in bench.judge.labels}
        rows = zip(*columns.values(), strict=True)
        found = {i: dict(zip(columns, row, strict=True)) for i, row in zip(drawn, rows, strict=True)}  # fmt: skip
    return [
        found[i] if i in found else dict(known[texts[i], p.seed]) for i, p in enumerate(prompts)
    ]


def _features(bench: Bench, texts: Sequence[str]) -> Tensor:
    """Return the text features of prompts, (N, L, D)."""
    size = bench.batch_size
    with torch.no_grad():
        return torch.cat(
            [bench.model.encode(texts[i : i + size]) for i in range(0, len(texts), size)]
        )


def measure(
    bench: Bench,
    asked: Asked,
    edit: Edit,
    *,
    captions: int,
    replacement: bool = False,
    known: Known | None = None,
) -> dict[str, Any]:
    """Return what is stored of one edit: labels of its pictures, seconds, bytes, and everyday captions that move.

    Args:
        bench: Model, scorer and settings.
        asked: The concept and its prompts.
        edit: The edit.
        captions: Everyday captions of the test half to read, the same for all edits; 0 for none. Those that hold an
            erased concept are left out; a method that rewrites prompts moves those that it rewrites.
        replacement: Draw the prompts of the replacement too.
        known: As in `labelled`.
    """
    prompts = [p for p in asked.prompts if replacement or p.role != "replacement"]
    result: dict[str, Any] = {
        "labels": labelled(bench, prompts, edit, known), "seconds": edit.seconds, "refused": edit.refused,
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
