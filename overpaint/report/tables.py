"""The tables of the page: the effect of each method, every mean with its interval and number of pictures."""

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
    """A table cell: its text, a smaller note below, and the interval that both describe, if any.

    Attributes:
        text: The mean as text.
        note: The interval and the number of pictures as text.
        interval: The same as numbers: shares from 0 to 1, or changes of shares from -1 to 1 if `signed`.
        signed: True if the interval is of a change.
        drawn: True if the interval is also drawn as a line.
    """

    text: str
    note: str = ""
    interval: Interval | None = None
    signed: bool = False
    drawn: bool = True

    @property
    def track(self) -> tuple[float, float, float] | None:
        """Left margin, dot and right margin of the interval on a line from 0 to 1, or -1 to 1, in %."""
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
    """A table: name, caption, heads, rows that begin with a name, the row to mark, and if its cells are sentences."""

    name: str
    caption: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str | Cell, ...], ...]
    best: str = ""
    words: bool = False


@dataclass(frozen=True)
class Tile:
    """A headline figure: its name, its value as text, and a note below."""

    name: str
    text: str
    note: str = ""


def tiles(scores: Scores | None, edit_seconds: float | None) -> list[Tile]:
    """Return the headline figures of one method with intervals, and the duration of the edit if it is known."""
    tiles: list[Tile] = []
    if scores is not None:
        for name, pair in (
            (f"Still recognised as {scores.erase}", scores.efficacy),
            (f"Now recognised as {scores.replace or 'the replacement'}", scores.redirection),
        ):
            if pair.after.n and pair.before.n:
                cell = _share(pair.after)
                note = f"before {percent(pair.before.mean)}; 95\N{NO-BREAK SPACE}% interval {cell.note}"
                tiles.append(Tile(name, cell.text, note))
        names = {"object": "Objects lost", scores.kind: f"Other {scores.kind}s lost"}
        for kind, name in reversed(names.items()):
            pair = scores.specificity.get(kind)
            if pair is not None and pair.change.n:
                low, high = (signed(-100 * v, 0) for v in (pair.change.high, pair.change.low))
                note = f"95\N{NO-BREAK SPACE}% interval {low} to {high}, n\N{NO-BREAK SPACE}{pair.change.n}"
                tiles.append(Tile(name, points(pair.drop), note))
    if edit_seconds is not None:
        tiles.append(
            Tile("Duration of the edit", f"{edit_seconds:.2f} s", "without drawing a picture")
        )
    return tiles


def endangered(report: Mapping[str, Any]) -> Table | None:
    """Return a table of the concepts that an automatic edit preserved, largest drift first; `None` if there are none.

    Args:
        report: Report of the change.
    """
    concepts = report.get("endangered") or []
    rows = tuple(
        (
            str(row["concept"]),
            *(Cell(f"{100 * row[key]:.1f} %") for key in ("drift_before", "drift")),
            Cell(f"{row['weight']:g}"),
        )
        for row in concepts[:20]
        if isinstance(row, Mapping)
    )
    if not rows:
        return None
    more = (
        f" The {len(rows)} largest of {len(concepts)} are shown."
        if len(concepts) > len(rows)
        else ""
    )
    caption = (
        "Concepts that the edit would have moved too far, with their drift without and with preserving: the squared "
        f"movement of a caption, as a share of the requested movement.{more}"
    )
    return Table(
        "Protected concepts", caption, ("Concept", "Drift unprotected", "Drift", "Weight"), rows
    )


def _share(share: Interval) -> Cell:
    if share.n == 0:
        return Cell("–")
    note = f"{100 * share.low:.0f} to {100 * share.high:.0f}, n\N{NO-BREAK SPACE}{share.n}"
    return Cell(percent(share.mean), note, share)


def _change(pair: Paired) -> Cell:
    change = pair.change
    if change.n == 0:
        return Cell("–")
    low, high = (signed(100 * v, 0) for v in (change.low, change.high))
    note = f"{low} to {high}, n\N{NO-BREAK SPACE}{change.n}"
    return Cell(signed(100 * change.mean), note, change, signed=True)


def methods(comparison: Comparison, best: str = "") -> Table:
    """Return a row for each method: target, replacement, generality, specificity, drift; the row `best` is marked."""
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
        "Drift of the empty prompt",
    )  # fmt: skip
    caption = (
        "Share of n pictures that the scorer recognises, with 95 % intervals over scenes: bootstrap, and Clopper and "
        "Pearson's where all scenes agree, as at 0 % and 100 %. Changes are against the unedited model on the same "
        "prompts and seeds."
    )
    return Table("Methods compared", caption, heads, tuple(rows), best)


def others(comparison: Comparison) -> Table:
    """Return a row for each other concept of the kind, with the change under every method."""
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
        f"Each other {first.kind} alone: share recognised before the edit, and the mean change per picture under each "
        "method, in points."
    )
    heads = (first.kind.capitalize(), "Before", *(f"{n}, change" for n in names))
    return Table(f"Each other {first.kind}", caption, heads, tuple(rows))


def baseline(comparison: Comparison) -> Table:
    """Return the share of the unedited model's pictures that is recognised."""
    kinds = [name for name in comparison.baseline if not name.endswith(" held out")]
    rows = [
        (k.capitalize(), *(_share(comparison.baseline[key]) for key in (k, f"{k} held out")))
        for k in kinds
    ]
    caption = "Share of the unedited model's pictures that the scorer recognises: the upper limit of the figures above."
    heads = ("Label", "Pairs in the training data", "Held-out pairs")
    return Table("The model before any edit", caption, heads, tuple(rows))


def reading(comparison: Comparison) -> str:
    """Return the sentences that explain the tables."""
    first = next(iter(comparison.scores.values()))
    goal = f" and be recognised as {first.replace} instead" if first.replace else ""
    return (
        f"Pictures whose prompt names the {first.kind} {first.erase} should no longer be recognised as such{goal}, in "
        "any wording; all other labels should stay. A classifier that was not used to train the model labelled the "
        f"pictures of the same {first.protocol.get('questions', '')} prompts and seeds under each method."
    )


def percent(share: float) -> str:
    """Return a share as percent."""
    return f"{100 * share:.0f} %"


def signed(number: float, digits: int = 1) -> str:
    """Return a number with its sign, a true minus; no sign if it rounds to 0."""
    text = f"{round(number, digits) + 0.0:+.{digits}f}"
    return text.replace("-", "\N{MINUS SIGN}") if float(text) else text[1:]


def points(share: float) -> str:
    """Return a loss as percentage points; a gain has a minus sign."""
    return f"{signed(100 * share).removeprefix('+')} points"
