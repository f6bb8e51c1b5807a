"""Effects: what restoring each state did, one row a state, prompt, seed and noise sample.

The indirect effect of a state is score(restored) - score(corrupted), signed; its normalised
recovery is that over score(clean) - score(corrupted), defined only where the gap is wide enough.

Source: Basu et al., 2024, https://arxiv.org/abs/2310.13730, section 3.
Deviations: the paper takes the absolute effect, which counts damage as success; ours is signed.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from overpaint.metrics import Interval, bootstrap
from overpaint.sites import Site

__all__ = ["VALUES", "Effects", "recovery"]

VALUES = (
    "indirect_effect",
    "recovery",
    "score_restored",
    "embed_recovery",
    "embed_recovery_pads",
    "latent_recovery",
    "attribution",
)
_SCORES = ("score_clean", "score_corrupted")
SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("site", "part", "kind", "path", "role", "control")]
    + [(name, pa.int64()) for name in ("index", "position", "seed", "noise")]
    + [(name, pa.string()) for name in ("probe", "attribute", "prompt", "concept")]
    + [(name, pa.string()) for name in ("source", "branches", "direction", "window")]
    + [("head", pa.int64())]
    + [(name, pa.float64()) for name in (*_SCORES, *VALUES)]
)


@dataclass(frozen=True)
class Effects:
    """Effects of restored states.

    Attributes:
        table: One row a state, prompt, seed and noise sample; the columns of `SCHEMA`. `control` is
            empty for the model itself, else `"untrained"` or `"other span"`. Values not measured
            are null: all scores where no picture was drawn, `recovery` where the gap is too small.
        protocol: Scorer, steps, guidance, noise, versions: what made the numbers.
    """

    table: pa.Table
    protocol: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.table.num_rows

    @property
    def dropped(self) -> int:
        """How many runs (prompt, seed, noise) have a gap too small for `recovery`."""
        keys = ("probe", "seed", "noise", "score_clean", "recovery")
        rows = self._rows(keys, control="")
        wide = {row[:3] for row in rows if row[4] is not None}
        return len({row[:3] for row in rows if row[3] is not None} - wide)

    def mean(self, value: str | None = None, *, control: str = "") -> pa.Table:
        """Return the mean of `value` for each state, with a 95 % bootstrap interval over prompts.

        Args:
            value: One of `VALUES`; if `None` the indirect effect, or `embed_recovery` where no
                pictures were drawn.
            control: Which run: the model itself, `"untrained"` or `"other span"`.

        Returns:
            Columns site, role, mean, low, high, n, in execution order; states without a value left out.

        Raises:
            ValueError: No such value.
        """
        states = self._means(self._value(value), control)
        rows = [
            {"site": s, "role": r, "mean": i.mean, "low": i.low, "high": i.high, "n": i.n}
            for (s, r), i in states.items()
        ]
        schema = pa.schema(
            [("site", pa.string()), ("role", pa.string())]
            + [(name, pa.float64()) for name in ("mean", "low", "high")]
            + [("n", pa.int64())]
        )
        return pa.Table.from_pylist(rows, schema=schema)

    def top(self, n: int = 1, *, value: str | None = None) -> tuple[Site, ...]:
        """Return the `n` sites with the largest mean of `value` at any role, best first.

        Raises:
            ValueError: `n` is not positive, or there is no such value.
        """
        if n < 1:
            raise ValueError(f"`n` must be at least 1, got {n}.")
        states = self._means(self._value(value), "")
        best = sorted(states, key=lambda state: -states[state].mean)
        sites = self.sites()
        return tuple(sites[name] for name in list(dict.fromkeys(s for s, _ in best))[:n])

    def causal(self, threshold: float | None = None) -> tuple[Site, ...]:
        """Return the sites whose mean restored score, at any role, reaches `threshold`.

        Args:
            threshold: A score; by default the half-gap rule, halfway from the mean corrupted to
                the mean clean score.

        Raises:
            ValueError: No pictures were drawn, so there are no scores.
        """
        limit = self.half_gap() if threshold is None else threshold
        states = self._means("score_restored", "")
        chosen = {site for (site, _), mean in states.items() if mean.mean >= limit}
        return tuple(site for name, site in self.sites().items() if name in chosen)

    def half_gap(self) -> float:
        """Return the score halfway between the mean corrupted and the mean clean one.

        Raises:
            ValueError: No pictures were drawn, so there are no scores.
        """
        rows = self._rows(("probe", "seed", "noise", *_SCORES), control="")
        runs = sorted({row for row in rows if row[3] is not None})
        if not runs:
            raise ValueError("these effects hold no scores: trace again with `generate=True`.")
        return math.fsum(clean + corrupted for *_, clean, corrupted in runs) / (2 * len(runs))

    def sites(self) -> dict[str, Site]:
        """Return the traced sites by name, in execution order."""
        keys = ("site", "part", "kind", "index", "path")
        return {row[0]: Site(*row) for row in self._rows(keys)}

    def save(self, path: str | Path) -> Path:
        """Write a parquet file with the protocol in its metadata, beside and then moved; return it."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(path.name + ".part")
        about = {b"overpaint": json.dumps(self.protocol).encode()}
        try:
            pq.write_table(self.table.replace_schema_metadata(about), beside)
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)
        return path

    @classmethod
    def load(cls, path: str | Path) -> "Effects":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It holds something else.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no effects at {str(path)!r}: trace and save them first.")
        try:
            table = pq.read_table(path)
            protocol = json.loads((table.schema.metadata or {})[b"overpaint"])
        except (pa.ArrowException, KeyError, ValueError) as error:
            raise ValueError(
                f"{str(path)!r} does not hold effects: name a file that `Effects.save` wrote."
            ) from error
        return cls(table.replace_schema_metadata(None), protocol)

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]], protocol: Mapping[str, Any]) -> "Effects":
        """Return the effects in `rows`, whose keys are columns of `SCHEMA`."""
        return cls(pa.Table.from_pylist(list(rows), schema=SCHEMA), dict(protocol))

    def _value(self, value: str | None) -> str:
        if value is None:
            drawn = self.table["indirect_effect"].null_count < self.table.num_rows
            return "indirect_effect" if drawn else "embed_recovery"
        if value not in VALUES:
            raise ValueError(f"unknown value {value!r}: choose one of {', '.join(VALUES)}.")
        return value

    def _rows(self, columns: Sequence[str], control: str | None = None) -> list[tuple[Any, ...]]:
        rows = list(zip(*(self.table[name].to_pylist() for name in columns), strict=True))
        if control is None:
            return rows
        kept = self.table["control"].to_pylist()
        return [row for row, other in zip(rows, kept, strict=True) if other == control]

    def _means(self, value: str, control: str) -> dict[tuple[str, str], Interval]:
        """Return the mean of each (site, role); rows are sorted first, so that order does not matter."""
        order = list(self.sites())
        found: dict[tuple[str, str], list[tuple[str, float]]] = {}
        for site, role, probe, number in self._rows(("site", "role", "probe", value), control):
            if number is not None:
                found.setdefault((site, role), []).append((probe, number))
        result: dict[tuple[str, str], Interval] = {}
        for state in sorted(found, key=lambda s: order.index(s[0])):
            pairs = sorted(found[state])
            result[state] = bootstrap([v for _, v in pairs], groups=[p for p, _ in pairs])
        return result


def recovery(clean: float, corrupted: float, restored: float, *, gap: float) -> float | None:
    """Return the share of the gap that was recovered: 0 as corrupted, 1 as clean.

    `None` where the clean score is not more than `gap` above the corrupted one.
    """
    if not clean - corrupted > gap:
        return None
    return (restored - corrupted) / (clean - corrupted)
