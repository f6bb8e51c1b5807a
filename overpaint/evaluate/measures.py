"""Metrics of a change on an evaluation set, as rows of role, metric, before, after and change."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from overpaint.errors import listed
from overpaint.evaluate.results import complement, parse_interval
from overpaint.evaluate.saved_json import load_json
from overpaint.files import user_path, write_json
from overpaint.metrics import Interval

__all__ = ["FILE", "Measure", "Measures"]

FILE = "measures.json"


@dataclass(frozen=True)
class Measure:
    """One metric on the cases of one role.

    Attributes:
        role: `"target"`, `"general"` or `"other"`; `"model"` for a metric that is not computed from pictures.
        metric: One of `METRICS`.
        before: Value of the unedited model. For distances between sets, the distance between two sets of seeds; for
            distances between pictures of one seed, empty.
        after: Value of the edited model.
        change: Mean of after minus before per picture, where both are means over the same pictures.
    """

    role: str
    metric: str
    before: Interval
    after: Interval
    change: Interval


@dataclass(frozen=True)
class Measures:
    """Metrics of a change on one evaluation set.

    Attributes:
        set: Name of the set.
        erase: The concept that was edited.
        replace: Its replacement; `""` if there is none.
        rows: One row for each role and metric.
        protocol: Settings of the measurement.
    """

    set: str
    erase: str
    replace: str
    rows: tuple[Measure, ...]
    protocol: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        shown = [f"{r.role} {r.metric} {r.after.mean:.3g}" for r in self.rows]
        return f"<Measures on {self.set!r}, after erasing {self.erase!r}: {listed(shown, limit=4)}>"

    def row(self, role: str, metric: str) -> Measure:
        """Return the row of a role and a metric.

        Raises:
            ValueError: There is no such row.
        """
        for row in self.rows:
            if (row.role, row.metric) == (role, metric):
                return row
        known = listed(f"{row.role} {row.metric}" for row in self.rows)
        raise ValueError(f"{metric!r} of {role!r} was not measured: choose one of {known}.")

    def aliases(self) -> dict[str, Interval]:
        """Return `clip_accuracy` under the names of EasyEdit: shares of pictures with the intended result.

        `reliability` is the share of target pictures that are closer to the replacement, `generality` the same share
        for other wordings. `locality` is the share of all other pictures that are closer to the text of their prompt.
        """
        shares = {row.role: row.after for row in self.rows if row.metric == "clip_accuracy"}
        names = {"reliability": "target", "generality": "general", "locality": "other"}
        return {
            name: shares[role] if role == "other" else complement(shares[role])
            for name, role in names.items()
            if role in shares
        }

    def flat(self) -> dict[str, float]:
        """Return the means under flat names: `target_clip_cosine_before`, `other_kid_after`, `reliability`, ..."""
        means: dict[str, float] = {}
        for row in self.rows:
            name = row.metric if row.role == "model" else f"{row.role}_{row.metric}"
            if row.before.n:
                means[f"{name}_before"] = row.before.mean
            means[f"{name}_after"] = row.after.mean
        return means | {name: interval.mean for name, interval in self.aliases().items()}

    def save(self, folder: str | Path) -> Path:
        """Write `measures.json` into `folder`, which is created if necessary, and return its path.

        Raises:
            OSError: The folder cannot be written.
        """
        place = user_path(folder, "folder")
        place.mkdir(parents=True, exist_ok=True)
        return write_json(place / FILE, asdict(self))

    @staticmethod
    def load(folder: str | Path) -> "Measures":
        """Load measures that `save` wrote.

        Raises:
            ValueError: The file is damaged.
            FileNotFoundError: There is no such file.
        """
        remedy = "Make it again with `overpaint evaluate`."
        return load_json(user_path(folder, "folder") / FILE, _parse, remedy=remedy)


def _parse(content: Mapping[str, Any]) -> Measures:
    rows = tuple(
        Measure(
            str(row["role"]),
            str(row["metric"]),
            *(parse_interval(row[part]) for part in ("before", "after", "change")),
        )
        for row in content["rows"]
    )
    protocol = dict(content["protocol"])
    return Measures(content["set"], content["erase"], content["replace"], rows, protocol)
