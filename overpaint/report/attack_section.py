"""Results of a search for prompts that bring a concept back, as a sentence and a table."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from overpaint.evaluate.attack_results import FILE, TEXT_FREE, Attack
from overpaint.metrics import Interval
from overpaint.report.tables import Cell, Table, percent

__all__ = ["AttackSection", "load"]


@dataclass(frozen=True)
class AttackSection:
    """A sentence on the result, the table behind it, and the protocol."""

    summary: str
    table: Table
    protocol: Mapping[str, Any]


def load(folder: str | Path) -> AttackSection | None:
    """Return the section of a saved `Attack`; `None` if the folder holds none.

    Raises:
        ValueError: The file is damaged.
    """
    if not (Path(folder) / FILE).is_file():
        return None
    attack = Attack.load(folder)
    return AttackSection(_summary(attack), _table(attack), attack.protocol)


def _summary(attack: Attack) -> str:
    best = attack.best
    count = sum(a.family != TEXT_FREE for a in attack.attempts) or len(attack.attempts)
    note = _inversion_note(attack)
    if not attack.brought_back:
        return (
            f"None of {count} attempts brought {attack.erase} back above the scores of the plain prompts and of "
            f"prompts without the concept. The search was short: it does not show that the edit is robust.{note}"
        )
    share = (
        f", {percent(attack.recovered)} of what the edit removed"
        if math.isfinite(attack.recovered)
        else ""
    )
    return f"The best of {count} attempts, {best.family} “{best.words}”, brought {attack.erase} back{share}.{note}"


def _inversion_note(attack: Attack) -> str:
    inversion = attack.inversion
    if inversion is None or inversion.confirmed is None:
        return ""
    return (
        " Drawn from their inverted noise without a prompt, pictures of the concept score "
        f"{inversion.confirmed.mean:.2f}: an edit of text alone cannot change that, as it leaves the UNet as it is."
    )


def _table(attack: Attack) -> Table:
    rows: list[tuple[str | Cell, ...]] = [
        ("unedited model", Cell("the plain prompts"), _cell(attack.before)),
        ("edited model", Cell("the plain prompts"), _cell(attack.after)),
        ("edited model", Cell("the concept left out"), _cell(attack.chance)),
    ]
    rows += [(a.family, Cell(a.words), _cell(a.confirmed)) for a in attack.attempts if a.confirmed]
    score = str(attack.protocol.get("score", "score"))
    caption = (
        "The best attempt of each family in a short search, drawn again from other seeds, with 95 % intervals. The "
        "score in the search itself is not shown: the best score of many tries is too high by selection."
    )
    heads = ("Attempt", "Prompts", score.capitalize())
    return Table("Search for prompts that bring the concept back", caption, heads, tuple(rows))


def _cell(interval: Interval) -> Cell:
    if interval.n == 0 or math.isnan(interval.mean):
        return Cell("–")
    note = f"{interval.low:.2f} to {interval.high:.2f}, n\N{NO-BREAK SPACE}{interval.n}"
    text, note = (s.replace("-", "\N{MINUS SIGN}") for s in (f"{interval.mean:.2f}", note))
    return Cell(text, note, interval, drawn=False)
