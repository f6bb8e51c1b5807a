"""What a search for ways back found, as a table and a sentence that claims no more than it shows."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from overpaint.evaluate.attack import Attack, Attempt
from overpaint.evaluate.results import interval
from overpaint.metrics import Interval
from overpaint.report import saved
from overpaint.report.tables import Cell, Table, percent

__all__ = ["FILE", "Attacked", "load"]

FILE = "attack.json"


@dataclass(frozen=True)
class Attacked:
    """What the search brought back: a sentence, the table behind it, and the protocol."""

    verdict: str
    table: Table
    protocol: Mapping[str, Any]


def load(folder: str | Path) -> Attacked | None:
    """Read what `attack.Attack.save` wrote; `None` where there is no such file.

    Raises:
        ValueError: The file is damaged.
    """
    again = "Make it again with `overpaint evaluate --attack`."
    return saved.read(Path(folder) / FILE, _shown, again=again)


def _shown(words: Mapping[str, Any]) -> Attacked:
    found = _attack(words)
    return Attacked(_verdict(found), _table(found), found.protocol)


def _attack(words: Mapping[str, Any]) -> Attack:
    attempts = tuple(
        Attempt(
            str(row["family"]), str(row["words"]), interval(row["found"]),
            interval(row["confirmed"]) if row["confirmed"] else None,
        )
        for row in words["attempts"]
    )  # fmt: skip
    before, after, chance = (interval(words[name]) for name in ("before", "after", "chance"))
    return Attack(str(words["erase"]), before, after, chance, attempts, dict(words["protocol"]))


def _verdict(found: Attack) -> str:
    best, tried = found.best, len(found.attempts)
    if not found.brought_back:
        return (
            f"None of {tried} ways of asking brought {found.erase} back beyond what the plain prompts and chance give. "
            "The search was short: it shows no robustness."
        )
    share = (
        f", {percent(found.recovered)} of what the edit took"
        if math.isfinite(found.recovered)
        else ""
    )
    return f"Of {tried} ways of asking the best, {best.family} “{best.words}”, brought {found.erase} back{share}."


def _table(found: Attack) -> Table:
    rows: list[tuple[str | Cell, ...]] = [
        ("unedited model", Cell("the prompts as they are"), _cell(found.before)),
        ("edited model", Cell("the prompts as they are"), _cell(found.after)),
        ("edited model", Cell("the concept left out"), _cell(found.chance)),
    ]
    rows += [(a.family, Cell(a.words), _cell(a.confirmed)) for a in found.attempts if a.confirmed]
    score = str(found.protocol.get("score", "score"))
    caption = (
        "The best of each family in a short search, drawn again from other seeds, with 95 % intervals. The best of "
        "many tries looks better than it is, so what it scored in the search itself is not shown."
    )
    heads = ("Asked by", "With", score.capitalize())
    return Table("Asking for it in other ways", caption, heads, tuple(rows))


def _cell(found: Interval) -> Cell:
    if found.n == 0 or math.isnan(found.mean):
        return Cell("–")
    note = f"{found.low:.2f} to {found.high:.2f}, n\N{NO-BREAK SPACE}{found.n}"
    text, note = (s.replace("-", "\N{MINUS SIGN}") for s in (f"{found.mean:.2f}", note))
    return Cell(text, note, found, drawn=False)
