"""Effects: what restoring each state did, one row a state, prompt, seed and noise sample.

A state is a site, the role of a token (text) or nothing (UNet), one head or the whole output, and
the window of steps. The indirect effect of a state is score(restored) - score(corrupted), signed; its
normalised recovery is that over score(clean) - score(corrupted), defined only where the gap is wide enough.

Source: Basu et al., 2024, https://arxiv.org/abs/2310.13730, section 3.
Deviations: the paper takes the absolute effect, which counts damage as success; ours is signed. Its
threshold was found by people looking at pictures; ours lies half-way from corrupted to clean, on
prompts of its own, and the effect must be significant too.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from overpaint.metrics import Interval, bootstrap
from overpaint.model.sites import Site
from overpaint.trace import states
from overpaint.trace.states import COLUMNS, SCHEMA, VALUES
from overpaint.trace.statistics import agreement

if TYPE_CHECKING:
    from overpaint.images.charts import Chart, Theme
    from overpaint.trace.verdict import Verdict

__all__ = ["SCHEMA", "VALUES", "Effects", "recovery"]

_SCORES = ("score_clean", "score_corrupted")


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
        rows = states.records(self.table, keys, control="")
        wide = {row[:3] for row in rows if row[4] is not None}
        return len({row[:3] for row in rows if row[3] is not None} - wide)

    def mean(self, value: str | None = None, *, control: str = "") -> pa.Table:
        """Return the mean of `value` for each state, with a 95 % bootstrap interval over prompts.

        Args:
            value: One of `VALUES`; if `None` the indirect effect, or `embed_recovery` where no
                pictures were drawn. Prompts weigh the same, however many rows each has.
            control: Which run: the model itself, `"untrained"` or `"other span"`.

        Returns:
            Columns site, role, head, window, mean, low, high, n, in execution order; n counts rows,
            and states without a value are left out.

        Raises:
            ValueError: No such value.
        """
        rows = [
            {**state._asdict(), "mean": i.mean, "low": i.low, "high": i.high, "n": i.n}
            for state, pairs in states.cells(self.table, self.value(value), control).items()
            for i in [_interval(pairs)]
        ]
        numbers = [(name, pa.float64()) for name in ("mean", "low", "high")]
        return pa.Table.from_pylist(rows, schema=pa.schema([*COLUMNS, *numbers, ("n", pa.int64())]))

    def top(self, n: int = 1, *, value: str | None = None) -> tuple[Site, ...]:
        """Return the `n` sites with the largest mean of `value` at any role, head and window, best first.

        Raises:
            ValueError: `n` is not positive, or there is no such value.
        """
        if n < 1:
            raise ValueError(f"`n` must be at least 1, got {n}.")
        cells = states.cells(self.table, self.value(value), "")
        means = {state: states.average(pairs) for state, pairs in cells.items()}
        best = sorted(means, key=lambda state: -means[state])
        sites = self.sites()
        return tuple(sites[name] for name in list(dict.fromkeys(s.site for s in best))[:n])

    def test(
        self, value: str | None = None, *, alpha: float = 0.05, threshold: float | None = None
    ) -> "Verdict":
        """Say for each state whether its effect is positive and large: significance, threshold, controls.

        Without a `threshold` the prompts are split: the half-gap of the validation prompts is the
        threshold, and every statistic is of the other prompts. With one, or where no pictures
        were drawn, all prompts count.

        Args:
            value: One of `VALUES` but `"score_restored"`, whose zero means nothing; by default as in `mean`.
            alpha: Largest Holm-corrected p-value that counts as causal, in (0, 1].
            threshold: A score that the mean restored score of a causal state reaches.

        Raises:
            ValueError: No such value, one that cannot be tested, or `alpha` is out of range.
        """
        from overpaint.trace.verdict import judge

        return judge(self, self.value(value), alpha=alpha, threshold=threshold)

    def summary(self, value: str | None = None, *, alpha: float = 0.05) -> pa.Table:
        """Return the table of `test`, one row a state; its columns are told at `Verdict`."""
        return self.test(value, alpha=alpha).table

    def causal(self, threshold: float | None = None, *, alpha: float = 0.05) -> tuple[Site, ...]:
        """Return the sites that are causal at any role, head or window, in execution order.

        A site is causal where its mean restored score reaches the threshold and its effect is
        significantly positive, corrected for the number of states; see `test`.

        Raises:
            ValueError: No pictures were drawn, so there are no scores.
        """
        self.half_gap()
        rows = self.test("indirect_effect", alpha=alpha, threshold=threshold).table.to_pylist()
        chosen = {row["site"] for row in rows if row["causal"]}
        return tuple(site for name, site in self.sites().items() if name in chosen)

    def half_gap(self) -> float:
        """Return the score halfway between the mean corrupted and the mean clean one; prompts weigh the same.

        Raises:
            ValueError: No pictures were drawn, so there are no scores.
        """
        rows = states.records(self.table, ("probe", "seed", "noise", *_SCORES), control="")
        runs = sorted({row for row in rows if row[3] is not None})
        if not runs:
            raise ValueError("these effects hold no scores: trace again with `generate=True`.")
        return states.average(
            [(probe, (clean + corrupted) / 2) for probe, _, _, clean, corrupted in runs]
        )

    def split(self, validation: int = 10) -> tuple["Effects", "Effects"]:
        """Return the effects of `validation` prompts and those of the others.

        The prompts are chosen by a hash of their probes' ids, so the choice is the same for every model and
        order of rows. With fewer than twice as many prompts as asked for, a third of them validate.

        Raises:
            ValueError: Fewer than two prompts, or `validation` is not positive.
        """
        if validation < 1:
            raise ValueError(f"`validation` must be at least 1 prompt, got {validation}.")
        probes = sorted(set(self.table["probe"].to_pylist()), key=_hash)
        if len(probes) < 2:
            raise ValueError(
                f"cannot split {len(probes)} prompt: trace at least two, or give a `threshold`."
            )
        count = validation if len(probes) >= 2 * validation else max(1, len(probes) // 3)
        chosen = set(probes[:count])
        return (
            self._part(lambda probe: probe in chosen, "validation"),
            self._part(lambda probe: probe not in chosen, "test"),
        )

    def agreement(
        self, other: "Effects", *, value: str | None = None, other_value: str | None = None
    ) -> Interval:
        """Return the Spearman correlation of two maps over the states and prompts that both have.

        Args:
            other: Another trace: few-step, screened, of another attribute's scorer.
            value: Of this map; by default as in `mean`.
            other_value: Of the other map; `value` if `None`.

        Returns:
            The correlation with a 95 % bootstrap interval over prompts; `n` counts states.

        Raises:
            ValueError: The maps share no prompts or fewer than two states.
        """
        probes, own, mine = states.grid(states.cells(self.table, self.value(value)))
        name = other.value(other_value or value)
        other_probes, others, theirs = states.grid(states.cells(other.table, name))
        rows = [probe for probe in probes if probe in other_probes]
        shared = [state for state in own if state in others]
        if not rows or len(shared) < 2:
            raise ValueError(
                f"the maps share {len(rows)} prompts and {len(shared)} states, too few to compare: trace both with the "
                "same probes and sites."
            )
        here = np.ix_([probes.index(p) for p in rows], [own.index(s) for s in shared])
        there = np.ix_([other_probes.index(p) for p in rows], [others.index(s) for s in shared])
        return agreement(mine[here], theirs[there])

    def sites(self) -> dict[str, Site]:
        """Return the traced sites by name, in execution order."""
        return states.sites(self.table)

    def plot(
        self,
        kind: str | None = None,
        *,
        value: str | None = None,
        theme: "Theme | None" = None,
        path: str | Path | None = None,
    ) -> "Chart":
        """Draw the means of `value`: a heat map of text layers and tokens, or bars with intervals.

        Args:
            kind: `"map"` or `"bars"`; by default the map for text and for heads, else bars.
            value: One of `VALUES`; by default as in `mean`.
            theme: Colors; `figures.LIGHT` if `None`.
            path: Where to save it too, as PNG or SVG by its suffix.

        Returns:
            A drawing with `png()`, `svg()` and `save(path)`; notebooks show it.

        Raises:
            ValueError: No such kind or value, or nothing to draw.
        """
        from overpaint.trace.plot import draw

        drawing = draw(self, kind, value=self.value(value), theme=theme)
        if path is not None:
            drawing.save(path)
        return drawing

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
            ValueError: It holds something else, or was written by another version.
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
        absent = [name for name in SCHEMA.names if name not in table.schema.names]
        if absent:
            raise ValueError(
                f"the effects in {str(path)!r} lack {absent[0]!r}, for another version wrote them: trace again."
            )
        return cls(table.replace_schema_metadata(None), protocol)

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]], protocol: Mapping[str, Any]) -> "Effects":
        """Return the effects in `rows`, whose keys are columns of `SCHEMA`."""
        return cls(pa.Table.from_pylist(list(rows), schema=SCHEMA), dict(protocol))

    def value(self, name: str | None = None) -> str:
        """Return `name`, or what speaks for these effects if it is `None`.

        Raises:
            ValueError: It is not one of `VALUES`.
        """
        if name is None:
            drawn = self.table["indirect_effect"].null_count < self.table.num_rows
            return "indirect_effect" if drawn else "embed_recovery"
        if name not in VALUES:
            raise ValueError(f"unknown value {name!r}: choose one of {', '.join(VALUES)}.")
        return name

    def _part(self, chosen: Callable[[str], bool], name: str) -> "Effects":
        kept = [chosen(probe) for probe in self.table["probe"].to_pylist()]
        table = self.table.filter(pa.array(kept))
        prompts = len(set(table["probe"].to_pylist()))
        return Effects(table, {**self.protocol, "part": name, "part_prompts": prompts})


def recovery(clean: float, corrupted: float, restored: float, *, gap: float) -> float | None:
    """Return the share of the gap that was recovered: 0 as corrupted, 1 as clean.

    `None` where the clean score is not more than `gap` above the corrupted one.
    """
    if not clean - corrupted > gap:
        return None
    return (restored - corrupted) / (clean - corrupted)


def _interval(pairs: Sequence[tuple[str, float]]) -> Interval:
    found = bootstrap(list(states.by_prompt(pairs).values()))
    return Interval(found.mean, found.low, found.high, len(pairs))


def _hash(probe: str) -> bytes:
    return hashlib.sha256(probe.encode()).digest()
