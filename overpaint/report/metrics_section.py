"""Figures of an evaluation set as tables: every metric under its own name, and what each means."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from overpaint.evaluate.results import interval
from overpaint.metrics.metric_cards import cards
from overpaint.report import saved
from overpaint.report.tables import Cell, Table

__all__ = ["FILE", "Measured", "load"]

FILE = "measures.json"
_ROLES = {
    "target": "the concept's own prompts",
    "general": "the concept in other words",
    "other": "prompts without it",
    "model": "the model",
}


@dataclass(frozen=True)
class Measured:
    """What an evaluation set showed: its name, what was edited, the tables and the protocol."""

    name: str
    title: str
    tables: tuple[Table, ...]
    protocol: Mapping[str, Any]


def load(folder: str | Path) -> Measured | None:
    """Read what `evaluate.Measures.save` wrote; `None` where there is no such file.

    Raises:
        ValueError: The file is damaged.
    """
    again = "Make it again with `overpaint evaluate`."
    return saved.read(Path(folder) / FILE, _shown, again=again)


def _shown(words: Mapping[str, Any]) -> Measured:
    rows = tuple(_row(row) for row in words["rows"])
    names = {str(row["metric"]) for row in words["rows"]}
    title = f"{words['erase']} → {words['replace']}" if words["replace"] else words["erase"]
    shown = Table(
        f"Every metric on {words['set']}",
        "Means before and after the edit on the same prompts and seeds, with 95 % bootstrap intervals over "
        "prompts. For distances between sets of pictures, before is what another set of seeds alone does.",
        ("Metric", "Before", "After", "Change"), rows,
    )  # fmt: skip
    return Measured(str(words["set"]), title, (shown, _meanings(names)), words["protocol"])


def _row(words: Mapping[str, Any]) -> tuple[str | Cell, ...]:
    role = str(words["role"])
    return (
        f"{str(words['metric']).replace('_', ' ')}, {_ROLES.get(role, role)}",
        *(_cell(words[part]) for part in ("before", "after", "change")),
    )


def _cell(words: Mapping[str, Any]) -> Cell:
    found = interval(words)
    if found.n == 0 or math.isnan(found.mean):
        return Cell("–")
    note = f"n\N{NO-BREAK SPACE}{found.n}"
    if math.isfinite(found.low) and math.isfinite(found.high) and found.low < found.high:
        note = f"{_number(found.low)} to {_number(found.high)}, {note}"
    return Cell(_number(found.mean), note, found, drawn=False)


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
        "What each metric means", "From the protocol card of each metric, where its source stands too.",
        ("Metric", "Range", "Hope for", "Formula", "What it does not say"), rows, words=True,
    )  # fmt: skip
