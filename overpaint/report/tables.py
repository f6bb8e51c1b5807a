"""The tables of the page: what each method did, with intervals and the number of pictures beside every mean."""

from dataclasses import dataclass

from overpaint.metrics import Interval
from overpaint.scores import Comparison, Paired

__all__ = ["Cell", "Table", "baseline", "methods", "others", "percent", "points", "reading"]


@dataclass(frozen=True)
class Cell:
    """A table cell: its text, and a smaller note below."""

    text: str
    note: str = ""


@dataclass(frozen=True)
class Table:
    """A table: its name and caption, its heads, and rows that begin with a name."""

    name: str
    caption: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str | Cell, ...], ...]


def _share(found: Interval) -> Cell:
    if found.n == 0:
        return Cell("–")
    return Cell(
        percent(found.mean), f"{100 * found.low:.0f} to {100 * found.high:.0f}, n {found.n}"
    )


def _change(found: Paired) -> Cell:
    if found.change.n == 0:
        return Cell("–")
    mean, low, high = (100 * v for v in (found.change.mean, found.change.low, found.change.high))
    return Cell(f"{mean:+.1f}", f"{low:+.1f} to {high:+.1f}, n {found.change.n}")


def methods(comparison: Comparison) -> Table:
    """Return one row a method: target, replacement, generality, specificity, drift."""
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
    return Table("Methods compared", caption, heads, tuple(rows))


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


def points(share: float) -> str:
    """Write a loss as percentage points; what rose has a minus."""
    return f"{round(100 * share, 1) + 0.0:.1f} points"
