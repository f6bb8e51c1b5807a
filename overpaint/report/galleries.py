"""The pictures of the page: one grid a scene, a column for each concept of the kind, a row for each method."""

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
    """Return the grids of the comparison's pictures, ready for the template."""
    kind = next(iter(comparison.scores.values())).kind
    found: dict[int, list[int]] = {}
    for i, question in enumerate(comparison.questions):
        found.setdefault(question.seed, []).append(i)
    return [
        {
            "title": _title(comparison.questions[shown[0]], kind),
            "columns": _columns(comparison, shown),
            "rows": [_row(comparison, name, shown) for name in methods(comparison)],
        }
        for shown in found.values()
    ]


def methods(comparison: Comparison) -> list[str]:
    """Return the rows of each grid: `before`, then every method that edits."""
    return ["before", *(name for name in comparison.scores if name != "no edit")]


def _columns(comparison: Comparison, shown: Sequence[int]) -> list[dict[str, Any]]:
    first = next(iter(comparison.scores.values()))
    names = [comparison.questions[i].label(first.kind) for i in shown]
    return [{"name": name, "mark": name == first.erase} for name in names]


def _row(comparison: Comparison, name: str, shown: Sequence[int]) -> dict[str, Any]:
    cells = [
        {
            "png": _png(comparison.pictures[name][i]),
            "alt": f"{comparison.questions[i].prompt}, {name}",
        }
        for i in shown
    ]
    return {"name": name, "cells": cells}


def _title(question: Question, kind: str) -> str:
    """Name what the pictures of a scene share."""
    said = [
        question.object if kind != "object" else "",
        f"{question.style} style" if kind != "style" and question.style else "",
        f"{question.color} background" if kind != "color" and question.color else "",
    ]
    words = ", ".join(word for word in said if word)
    return f"{words[:1].upper()}{words[1:]} (seed {question.seed})"


def _png(pixels: Tensor) -> str:
    """Encode one picture, uint8 (3, H, W), as base64 PNG."""
    buffer = io.BytesIO()
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    image.save(buffer, format="PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()
