"""The tables of the page: what each method did, with intervals and the number of pictures beside every mean."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from overpaint.evaluate.results import Comparison, Paired, Scores
from overpaint.metrics import Interval

__all__ = [
    "Cell", "Table", "Tile", "baseline", "endangered", "methods", "others", "percent", "points",
    "reading", "signed", "tiles",
]  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """A table cell: its text, a smaller note below, and the interval that both tell, if any.

    Attributes:
        text: The mean, as it is read.
        note: Interval and number, as they are read.
        interval: The same as numbers: shares from 0 to 1, or changes of shares from -1 to 1 if `signed`.
        signed: Whether the interval is of a change.
        drawn: Whether the interval is drawn on a line.
    """

    text: str
    note: str = ""
    interval: Interval | None = None
    signed: bool = False
    drawn: bool = True

    @property
    def track(self) -> tuple[float, float, float] | None:
        """Where the interval lies on a line from 0 to 1, or -1 to 1: its left margin, dot and right margin in %."""
        if self.interval is None or not self.drawn:
            return None
        start, length = (-1, 2) if self.signed else (0, 1)
        low, dot, high = (
            round(100 * min(max((v - start) / length, 0), 1), 2)
            for v in (self.interval.low, self.interval.mean, self.interval.high)
        )
        return low, dot, round(100 - high, 2)


@dataclass(frozen=True)
class Table:
    """A table: its name and caption, heads, rows that begin with a name, the row to mark, and if it is of words."""

    name: str
    caption: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str | Cell, ...], ...]
    best: str = ""
    words: bool = False


@dataclass(frozen=True)
class Tile:
    """A headline figure: its name, its text, and what stands below."""

    name: str
    text: str
    note: str = ""


def tiles(found: Scores | None, edit_seconds: float | None) -> list[Tile]:
    """Return the headline figures of one method, with intervals, and how long the edit took; each if known."""
    shown: list[Tile] = []
    if found is not None:
        for name, pair in (
            (f"Still recognised as {found.erase}", found.efficacy),
            (f"Now seen as {found.replace or 'the replacement'}", found.redirection),
        ):
            if pair.after.n and pair.before.n:
                cell = _share(pair.after)
                note = f"before {percent(pair.before.mean)}; 95\N{NO-BREAK SPACE}% interval {cell.note}"
                shown.append(Tile(name, cell.text, note))
        lost = {"object": "Objects lost", found.kind: f"Other {found.kind}s lost"}
        for kind, name in reversed(lost.items()):
            pair = found.specificity.get(kind)
            if pair is not None and pair.change.n:
                low, high = (signed(-100 * v, 0) for v in (pair.change.high, pair.change.low))
                note = f"95\N{NO-BREAK SPACE}% interval {low} to {high}, n\N{NO-BREAK SPACE}{pair.change.n}"
                shown.append(Tile(name, points(pair.drop), note))
    if edit_seconds is not None:
        shown.append(Tile("The edit took", f"{edit_seconds:.2f} s", "no picture drawn for it"))
    return shown


def endangered(report: Mapping[str, Any]) -> Table | None:
    """Return what an automatic edit looked after, most endangered first; `None` if it looked after nothing.

    Args:
        report: Of the change.
    """
    found = report.get("endangered") or []
    rows = tuple(
        (
            str(row["concept"]),
            *(Cell(f"{100 * row[key]:.1f} %") for key in ("drift_before", "drift")),
            Cell(f"{row['weight']:g}"),
        )
        for row in found[:20]
        if isinstance(row, Mapping)
    )
    if not rows:
        return None
    more = f" The {len(rows)} worst of {len(found)} are shown." if len(found) > len(rows) else ""
    caption = (
        "Concepts that the edit would have moved too far, and how far it moves them now that it looks after them: the "
        f"squared movement of a caption, as a share of the movement that the edit asks for.{more}"
    )
    return Table(
        "Concepts in danger", caption, ("Concept", "Drift unguarded", "Drift", "Weight"), rows
    )


def _share(found: Interval) -> Cell:
    if found.n == 0:
        return Cell("–")
    note = f"{100 * found.low:.0f} to {100 * found.high:.0f}, n\N{NO-BREAK SPACE}{found.n}"
    return Cell(percent(found.mean), note, found)


def _change(found: Paired) -> Cell:
    if found.change.n == 0:
        return Cell("–")
    low, high = (signed(100 * v, 0) for v in (found.change.low, found.change.high))
    note = f"{low} to {high}, n\N{NO-BREAK SPACE}{found.change.n}"
    return Cell(signed(100 * found.change.mean), note, found.change, signed=True)


def methods(comparison: Comparison, best: str = "") -> Table:
    """Return one row a method: target, replacement, generality, specificity, drift; the row `best` is marked."""
    first = next(iter(comparison.scores.values()))
    kinds = [k for k in first.specificity if k != first.kind]
    rows = [
        (
            name,
            _share(s.efficacy.after),
            _share(s.redirection.after),
            *(_share(p.after) for p in s.generality.values()),
            _change(s.specificity[s.kind]),
            *(_change(s.specificity[k]) for k in kinds),
            Cell(f"{100 * s.empty_drift:.1f} %"),
        )
        for name, s in comparison.scores.items()
    ]
    heads = (
        "Method", f"Still {first.erase}", f"Now {first.replace or 'the replacement'}",
        *(f"Still {first.erase}, {name}" for name in first.generality),
        f"Other {first.kind}s, change in points", *(f"{k.capitalize()}s, change in points" for k in kinds),
        "Empty prompt moved",
    )  # fmt: skip
    caption = (
        "Share of pictures that the judge recognises, of n, with 95 % bootstrap intervals over scenes; changes are "
        "against the unedited model on the same prompts and seeds. A mean of 0 % or 100 % in n pictures leaves room "
        "for about 3/n."
    )
    return Table("Methods compared", caption, heads, tuple(rows), best)


def others(comparison: Comparison) -> Table:
    """Return one row for each other concept of the kind, with every method's change."""
    first = next(iter(comparison.scores.values()))
    names = [name for name in comparison.scores if name != "no edit"]
    rows = [
        (
            other,
            _share(first.others[other].before),
            *(_change(comparison.scores[n].others[other]) for n in names),
        )
        for other in first.others
    ]
    caption = (
        f"Each other {first.kind} alone: share recognised before any edit, and the change in points after each method, "
        "picture by picture."
    )
    heads = (first.kind.capitalize(), "Before", *(f"{n}, change" for n in names))
    return Table(f"Each other {first.kind}", caption, heads, tuple(rows))


def baseline(comparison: Comparison) -> Table:
    """Return how well the unedited model's pictures are recognised."""
    kinds = [name for name in comparison.baseline if not name.endswith(" held out")]
    rows = [
        (k.capitalize(), *(_share(comparison.baseline[key]) for key in (k, f"{k} held out")))
        for k in kinds
    ]
    caption = "How well the judge recognises what the unedited model draws: the ceiling of every figure above."
    heads = ("Recognised", "Pairs seen in training", "Pairs held out of training")
    return Table("The model before any edit", caption, heads, tuple(rows))


def reading(comparison: Comparison) -> str:
    """Return the sentences that say how to read the tables."""
    first = next(iter(comparison.scores.values()))
    goal = f" and be seen as {first.replace} instead" if first.replace else ""
    return (
        f"Pictures asked for in the {first.kind} {first.erase} should no longer be recognised as such{goal}, in any "
        f"wording; everything else should stay. A judge that had no part in making the model looked at the same "
        f"{first.protocol.get('questions', '')} prompts and seeds under each method."
    )


def percent(share: float) -> str:
    """Write a share as percent."""
    return f"{100 * share:.0f} %"


def signed(number: float, digits: int = 1) -> str:
    """Write a number with its sign, a true minus; nothing before what rounds to nought."""
    found = f"{round(number, digits) + 0.0:+.{digits}f}"
    return found.replace("-", "\N{MINUS SIGN}") if float(found) else found[1:]


def points(share: float) -> str:
    """Write a loss as percentage points; what rose has a minus."""
    return f"{signed(100 * share).removeprefix('+')} points"
