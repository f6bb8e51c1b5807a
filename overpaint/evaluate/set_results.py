"""What `measure` found: rows of role, metric, before, after, change."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from overpaint.evaluate.results import flipped, save_json
from overpaint.metrics import Interval

__all__ = ["Measure", "Measures"]


@dataclass(frozen=True)
class Measure:
    """One metric on the cases of one role.

    Attributes:
        role: `"target"`, `"general"` or `"other"`; `"model"` for what belongs to no picture.
        metric: One of `METRICS`.
        before: Of the unedited model; of distances between sets, what another set of seeds does. Empty for distances
            between pictures of one seed.
        after: Of the edited model.
        change: After less before, picture by picture, where both are means over the same pictures.
    """

    role: str
    metric: str
    before: Interval
    after: Interval
    change: Interval


@dataclass(frozen=True)
class Measures:
    """What a change did on one evaluation set.

    Attributes:
        set: Name of the set.
        erase: What was edited.
        replace: What should stand in its place; `""` if nothing was said.
        rows: A row a role and metric.
        protocol: What the figures were measured with.
    """

    set: str
    erase: str
    replace: str
    rows: tuple[Measure, ...]
    protocol: dict[str, Any] = field(default_factory=dict)

    def row(self, role: str, metric: str) -> Measure:
        """Return one row.

        Raises:
            ValueError: It was not measured.
        """
        for row in self.rows:
            if (row.role, row.metric) == (role, metric):
                return row
        known = ", ".join(f"{row.role} {row.metric}" for row in self.rows)
        raise ValueError(f"{metric!r} of {role!r} was not measured: there are {known}.")

    def aliases(self) -> dict[str, Interval]:
        """Return EasyEdit's names, by `clip_accuracy`: shares of pictures that lie where they should.

        `reliability` on the target's prompts, `generality` on other wordings (nearer to what should stand in its
        place), `locality` on all others (still nearer to what they ask for).
        """
        found = {row.role: row.after for row in self.rows if row.metric == "clip_accuracy"}
        names = {"reliability": "target", "generality": "general", "locality": "other"}
        return {
            name: found[role] if role == "other" else flipped(found[role])
            for name, role in names.items()
            if role in found
        }

    def flat(self) -> dict[str, float]:
        """Return the means under flat names: `target_clip_cosine_before`, `other_kid_after`, `reliability`, ..."""
        found: dict[str, float] = {}
        for row in self.rows:
            name = row.metric if row.role == "model" else f"{row.role}_{row.metric}"
            if row.before.n:
                found[f"{name}_before"] = row.before.mean
            found[f"{name}_after"] = row.after.mean
        return found | {name: interval.mean for name, interval in self.aliases().items()}

    def save(self, folder: str | Path) -> Path:
        """Write `measures.json` into `folder`, beside its place and then there, and return its path.

        Raises:
            OSError: The folder cannot be written.
        """
        return save_json(Path(folder) / "measures.json", asdict(self))
