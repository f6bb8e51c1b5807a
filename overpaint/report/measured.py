"""Figures of an evaluation set as tables: every metric under its own name, and what each means."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from overpaint.metrics import Interval
from overpaint.metrics.cards import cards
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
    path = Path(folder) / FILE
    if not path.is_file():
        return None
    try:
        words: Any = json.loads(path.read_text(encoding="utf-8"))
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
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{str(path)!r} is damaged ({type(error).__name__}: {error}). Make it again with `overpaint evaluate`."
        ) from error


def _row(words: Mapping[str, Any]) -> tuple[str | Cell, ...]:
    role = str(words["role"])
    return (
        f"{str(words['metric']).replace('_', ' ')}, {_ROLES.get(role, role)}",
        *(_cell(words[part]) for part in ("before", "after", "change")),
    )


def _cell(words: Mapping[str, Any]) -> Cell:
    mean, low, high = (
        math.nan if words[k] is None else float(words[k]) for k in ("mean", "low", "high")
    )
    n = int(words["n"])
    if n == 0 or math.isnan(mean):
        return Cell("–")
    note = f"n\N{NO-BREAK SPACE}{n}"
    if math.isfinite(low) and math.isfinite(high) and low < high:
        note = f"{_number(low)} to {_number(high)}, {note}"
    return Cell(_number(mean), note, Interval(mean, low, high, n), drawn=False)


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
