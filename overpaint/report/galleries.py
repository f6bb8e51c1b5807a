"""The pictures of the page: a grid for each scene, with a column for each concept and a row for each method."""

import base64
import io
from collections.abc import Sequence
from typing import Any

from PIL import Image
from torch import Tensor

from overpaint.evaluate.results import Comparison
from overpaint.probes.questions import Question

__all__ = ["methods", "scenes"]


def scenes(comparison: Comparison) -> list[dict[str, Any]]:
    """Return the grids of the comparison's pictures, in the form that the template reads."""
    kind = next(iter(comparison.scores.values())).kind
    by_seed: dict[int, list[int]] = {}
    for i, question in enumerate(comparison.questions):
        by_seed.setdefault(question.seed, []).append(i)
    return [
        {
            "title": _title(comparison.questions[indices[0]], kind),
            "columns": _columns(comparison, indices),
            "rows": [_row(comparison, name, indices) for name in methods(comparison)],
        }
        for indices in by_seed.values()
    ]


def methods(comparison: Comparison) -> list[str]:
    """Return the names of the rows of each grid: `before`, then every method that edits."""
    return ["before", *(name for name in comparison.scores if name != "no edit")]


def _columns(comparison: Comparison, indices: Sequence[int]) -> list[dict[str, Any]]:
    first = next(iter(comparison.scores.values()))
    names = [comparison.questions[i].label(first.kind) for i in indices]
    return [{"name": name, "mark": name == first.erase} for name in names]


def _row(comparison: Comparison, name: str, indices: Sequence[int]) -> dict[str, Any]:
    cells = [
        {
            "png": _png(comparison.pictures[name][i]),
            "alt": f"{comparison.questions[i].prompt}, {name}",
        }
        for i in indices
    ]
    return {"name": name, "cells": cells}


def _title(question: Question, kind: str) -> str:
    """Return the labels that the pictures of a scene share."""
    labels = [
        question.object if kind != "object" else "",
        f"{question.style} style" if kind != "style" and question.style else "",
        f"{question.color} background" if kind != "color" and question.color else "",
    ]
    words = ", ".join(word for word in labels if word)
    return f"{words[:1].upper()}{words[1:]} (seed {question.seed})"


def _png(pixels: Tensor) -> str:
    """Encode one picture, uint8 (3, H, W), as base64 PNG."""
    buffer = io.BytesIO()
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    image.save(buffer, format="PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()
