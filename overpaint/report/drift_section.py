r"""Drift that text alone predicts, against what a judge saw go.

A change of a text encoder moves the features of prompts that it was not made for. How far is known in a moment, without
a picture: :math:`\|E'(p) - E(p)\| / \|E(p) - E(\text{""})\|` over the prompts `p` of a concept, `E` and `E'` the
encoder before and after. Guidance follows the prompt's difference to the empty one, so this is the share of what the
UNet is told that changed. Whether it foretells which concepts suffer is for the judge to say; the page draws both.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from overpaint.edit import Change
from overpaint.evaluate.results import Comparison
from overpaint.images.charts import Point
from overpaint.metrics import spearman
from overpaint.model import TextToImage
from overpaint.probes.questions import Question
from overpaint.report import saved

__all__ = ["FILE", "Predicted", "load", "points", "predict", "rank_correlation", "save"]

FILE = "drift.json"
Predicted = dict[str, dict[str, float]]  # by method, by concept


def predict(
    model: TextToImage,
    changes: Mapping[str, Change | None],
    asked: Sequence[Question],
    *,
    kind: str,
) -> Predicted:
    """Return how far each change moves the text features of each other concept; no picture is drawn.

    Args:
        model: The model; left as it was found.
        changes: By name; `None`, no edit, is left out, and so is a change that does not move text encoders alone.
        asked: Questions; those of role `other` and `other held out` are read, by their label of `kind`.
        kind: Of the concept that was edited.
    """
    prompts: dict[str, list[str]] = {}
    for question in asked:
        if question.role.startswith("other"):
            prompts.setdefault(question.label(kind), []).append(question.prompt)
    texts = list(dict.fromkeys(text for found in prompts.values() for text in found))
    before, empty = model.encode(texts).double(), model.encode([""]).double()
    told = (before - empty).flatten(1).square().sum(1)
    found: Predicted = {}
    for name, change in changes.items():
        if change is None or not all(site.startswith("text") for site in change.sites):
            continue
        with change.applied(model):
            after = model.encode(texts).double()
        moved = (after - before).flatten(1).square().sum(1)
        found[name] = {
            concept: _share(moved, told, [texts.index(text) for text in rows])
            for concept, rows in prompts.items()
        }
    return found


def _share(moved: torch.Tensor, told: torch.Tensor, rows: Sequence[int]) -> float:
    length = float(told[rows].sum())
    return math.sqrt(float(moved[rows].sum()) / length) if length else 0.0


def save(found: Predicted, folder: str | Path) -> Path:
    """Write `drift.json` into `folder`, beside and then renamed, and return its path."""
    path = Path(folder) / FILE
    words = {
        "what": "norm of the movement of the text features of a concept's prompts, in units of their distance from the "
        "empty prompt's",
        "predicted": found,
    }  # fmt: skip
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps(words, indent=1, ensure_ascii=False), encoding="utf-8")
    os.replace(beside, path)
    return path


def load(folder: str | Path) -> Predicted:
    """Read what `save` wrote; empty where there is no such file.

    Raises:
        ValueError: The file is damaged.
    """
    again = "Make it again with `overpaint demo`, or delete it."
    return saved.read(Path(folder) / FILE, _predicted, again=again) or {}


def _predicted(words: Mapping[str, Any]) -> Predicted:
    return {
        name: {concept: float(value) for concept, value in rows.items()}
        for name, rows in words["predicted"].items()
    }


def points(comparison: Comparison, predicted: Predicted) -> dict[str, tuple[Point, ...]]:
    """Return, for each method, predicted drift and the judge's loss of each other concept, in points."""
    found: dict[str, tuple[Point, ...]] = {}
    for name, by_concept in predicted.items():
        others = comparison.scores[name].others if name in comparison.scores else {}
        rows = [
            Point(by_concept[c], -100 * p.change.mean, -100 * p.change.high, -100 * p.change.low, c)
            for c, p in others.items()
            if c in by_concept and p.change.n
        ]
        if rows:
            found[name] = tuple(rows)
    return found


def rank_correlation(found: Mapping[str, Sequence[Point]]) -> float:
    """Return Spearman's correlation of predicted drift and loss over all points; NaN where there is none to tell."""
    rows = [point for series in found.values() for point in series]
    return spearman([p.x for p in rows], [p.y for p in rows])
