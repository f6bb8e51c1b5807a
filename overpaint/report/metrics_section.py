"""Metrics of an evaluation set as tables: every metric under its own name, and the meaning of each."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from overpaint.evaluate.measures import FILE, Measure, Measures
from overpaint.metrics import Interval, cards
from overpaint.report.tables import Cell, Table

__all__ = ["MetricsSection", "load"]

_ROLES = {
    "target": "prompts of the concept",
    "general": "the concept in other words",
    "other": "prompts without the concept",
    "model": "the model",
}


@dataclass(frozen=True)
class MetricsSection:
    """Name of an evaluation set, the title, the tables and the protocol."""

    name: str
    title: str
    tables: tuple[Table, ...]
    protocol: Mapping[str, Any]


def load(folder: str | Path) -> MetricsSection | None:
    """Return the section of saved `Measures`; `None` if the folder holds none.

    Raises:
        ValueError: The file is damaged.
    """
    if not (Path(folder) / FILE).is_file():
        return None
    measures = Measures.load(folder)
    title = f"{measures.erase} → {measures.replace}" if measures.replace else measures.erase
    table = Table(
        f"Every metric on {measures.set}",
        "Means before and after the edit on the same prompts and seeds, with 95 % intervals over "
        "prompts. For distances between sets of pictures, the value before is the distance between two sets of seeds.",
        ("Metric", "Before", "After", "Change"), tuple(_row(row) for row in measures.rows),
    )  # fmt: skip
    meanings = _meanings({row.metric for row in measures.rows})
    return MetricsSection(measures.set, title, (table, meanings), measures.protocol)


def _row(row: Measure) -> tuple[str | Cell, ...]:
    return (
        f"{row.metric.replace('_', ' ')}, {_ROLES.get(row.role, row.role)}",
        *(_cell(interval) for interval in (row.before, row.after, row.change)),
    )


def _cell(interval: Interval) -> Cell:
    if interval.n == 0 or math.isnan(interval.mean):
        return Cell("–")
    note = f"n\N{NO-BREAK SPACE}{interval.n}"
    low, high = interval.low, interval.high
    if math.isfinite(low) and math.isfinite(high) and low < high:
        note = f"{_number(low)} to {_number(high)}, {note}"
    return Cell(_number(interval.mean), note, interval, drawn=False)


def _number(value: float) -> str:
    return f"{value:#.3g}".replace("-", "\N{MINUS SIGN}")


def _meanings(names: set[str]) -> Table:
    rows = tuple(
        (
            card.name.replace("_", " "),
            *(
                Cell(text.replace("`", ""))
                for text in (card.range, card.direction, card.formula, card.caveats)
            ),
        )
        for card in cards()
        if card.name in names
    )
    return Table(
        "What each metric means", "From the protocol card of each metric, which also names its source.",
        ("Metric", "Range", "Better", "Formula", "Limits"), rows, words=True,
    )  # fmt: skip
