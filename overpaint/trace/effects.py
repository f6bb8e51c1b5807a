"""Effects: the result of a trace, one row for each state, prompt, seed and noise sample.

A state is a site, the role of a token (text encoder) or the empty role (UNet), one head or the whole output, and a
window of steps. The indirect effect of a state is score(restored) - score(corrupted), signed. Its recovery is that
over score(clean) - score(corrupted), defined only where this gap is wide enough.

Source: Basu et al., 2024, https://arxiv.org/abs/2310.13730, section 3.
Deviations: the paper takes the absolute effect, which counts damage as success; ours is signed. The
paper's threshold was chosen by people who compared pictures; ours lies halfway from corrupted to clean, on
prompts that are used for nothing else, and the effect must be significant too.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from overpaint import files
from overpaint.images.charts import Chart, Theme
from overpaint.metrics import Interval
from overpaint.model.sites import Site
from overpaint.trace import plot, states
from overpaint.trace.parquet_files import read_table
from overpaint.trace.significance import CausalTest, causal_test
from overpaint.trace.states import COLUMNS, SCHEMA, VALUES
from overpaint.trace.statistics import agreement, intervals

__all__ = ["Effects"]

_OPTIONAL = ("direct_effect",)  # columns that files of earlier versions lack


@dataclass(frozen=True)
class Effects:
    """Effects of restored states.

    Attributes:
        table: One row for each state, prompt, seed and noise sample, with the columns of `states.SCHEMA`. `control`
            is empty for the model itself, else `"untrained"` or `"other span"`. A value that was not measured
            is null: all scores where no picture was drawn, `recovery` where the gap is too small.
        protocol: Settings that made the numbers: scorer, steps, guidance, noise, versions.
    """

    table: pa.Table
    protocol: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.table.num_rows

    def __repr__(self) -> str:
        rows = states.records(self.table, ("site", "probe", "control"))
        sites, prompts = len({row[0] for row in rows}), len({row[1] for row in rows})
        controls = sorted({row[2] for row in rows} - {""})
        beside = f", controls: {', '.join(controls)}" if controls else ""
        return f"<Effects: {len(self)} rows, {sites} sites, {prompts} prompts{beside}>"

    @property
    def dropped(self) -> int:
        """Number of runs (prompt, seed, noise) whose gap is too small for `recovery`."""
        keys = ("probe", "seed", "noise", "score_clean", "recovery")
        rows = states.records(self.table, keys, control="")
        wide = {row[:3] for row in rows if row[4] is not None}
        return len({row[:3] for row in rows if row[3] is not None} - wide)

    def mean(self, value: str | None = None, *, control: str = "") -> pa.Table:
        """Return the mean of `value` for each state, with a 95 % bootstrap interval over prompts.

        Args:
            value: One of `VALUES`; if `None` the effect on the score, or `embed_recovery` where no
                pictures were drawn. Each prompt has the same weight.
            control: Rows to use: empty for the model itself, `"untrained"` or `"other span"`.

        Returns:
            Columns site, role, head, window, mean, low, high, n, in execution order; n counts rows,
            and states without a value are left out.

        Raises:
            ValueError: No such value.
        """
        rows = [
            {**state._asdict(), "mean": i.mean, "low": i.low, "high": i.high, "n": i.n}
            for state, i in intervals(self.table, self.value(value), control).items()
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
        cells = states.cells(self.table, self.value(value))
        means = {state: states.average(pairs) for state, pairs in cells.items()}
        best = sorted(means, key=lambda state: -means[state])
        sites = self.sites()
        return tuple(sites[name] for name in list(dict.fromkeys(s.site for s in best))[:n])

    def test(
        self, value: str | None = None, *, alpha: float = 0.05, threshold: float | None = None
    ) -> CausalTest:
        """Test whether the effect of each state is positive and large: significance, threshold, controls.

        Without a `threshold` the prompts are split: the half-gap of the validation prompts is the
        threshold, and every statistic is of the other prompts. With a threshold, or where no pictures
        were drawn, all prompts are tested.

        Args:
            value: One of `VALUES` except `"score_restored"`, which cannot be compared with zero; by default as in
                `mean`.
            alpha: Largest Holm-corrected p-value of a causal state, in (0, 1].
            threshold: Smallest mean restored score of a causal state.

        Raises:
            ValueError: No such value, one that cannot be tested, or `alpha` is out of range.
        """
        name = self.value(value)
        return causal_test(self.table, self.protocol, name, alpha=alpha, threshold=threshold)

    def summary(self, value: str | None = None, *, alpha: float = 0.05) -> pa.Table:
        """Return the table of `test`, one row for each state; `CausalTest` explains its columns."""
        return self.test(value, alpha=alpha).table

    def causal(self, threshold: float | None = None, *, alpha: float = 0.05) -> tuple[Site, ...]:
        """Return the sites that are causal at any role, head or window, in execution order.

        A site is causal where its mean restored score reaches the threshold and its effect is
        significantly positive, corrected for the number of states; see `test`.

        Raises:
            ValueError: No pictures were drawn, so there are no scores.
        """
        self.half_gap()
        rows = self.test(alpha=alpha, threshold=threshold).table.to_pylist()
        chosen = {row["site"] for row in rows if row["causal"]}
        return tuple(site for name, site in self.sites().items() if name in chosen)

    def half_gap(self) -> float:
        """Return the score halfway between the mean corrupted and the mean clean score; all prompts weigh the same.

        Raises:
            ValueError: No pictures were drawn, so there are no scores.
        """
        return states.half_gap(self.table)

    def split(self, validation: int = 10) -> tuple["Effects", "Effects"]:
        """Return the effects of `validation` prompts and the effects of the others.

        A hash of the probes' ids chooses the prompts, so the choice is the same for every model and
        order of rows. With fewer than twice as many prompts as `validation`, a third of them are validation prompts.

        Raises:
            ValueError: There are fewer than two prompts, or `validation` is not positive.
        """
        first, rest = states.split(self.table, validation)
        return self._part(first, "validation"), self._part(rest, "test")

    def agreement(
        self, other: "Effects", *, value: str | None = None, other_value: str | None = None
    ) -> Interval:
        """Return the Spearman correlation of two maps over the states and prompts that both have.

        Args:
            other: Another trace, for example with few steps, of a screening, or with another scorer.
            value: Value of this map; by default as in `mean`.
            other_value: Value of the other map; `value` if `None`.

        Returns:
            The correlation with a 95 % bootstrap interval over prompts; `n` counts states.

        Raises:
            ValueError: The maps share no prompts or fewer than two states.
        """
        probes, names, grid = states.grid(states.cells(self.table, self.value(value)))
        cells = states.cells(other.table, other.value(other_value or value))
        other_probes, other_names, other_grid = states.grid(cells)
        rows = [probe for probe in probes if probe in other_probes]
        shared = [state for state in names if state in other_names]
        if not rows or len(shared) < 2:
            raise ValueError(
                f"the maps share {len(rows)} prompts and {len(shared)} states, too few to compare: trace both with the "
                "same probes and sites."
            )
        here = np.ix_([probes.index(p) for p in rows], [names.index(s) for s in shared])
        there = np.ix_(
            [other_probes.index(p) for p in rows], [other_names.index(s) for s in shared]
        )
        return agreement(grid[here], other_grid[there])

    def sites(self) -> dict[str, Site]:
        """Return the traced sites by name, in execution order."""
        return states.sites(self.table)

    def plot(
        self,
        kind: str | None = None,
        *,
        value: str | None = None,
        theme: Theme | None = None,
        path: str | Path | None = None,
    ) -> Chart:
        """Draw the means of `value`: a heat map of text layers and tokens, or bars with intervals.

        Args:
            kind: `"map"` or `"bars"`; by default the map for text and for heads, else bars.
            value: One of `VALUES`; by default as in `mean`.
            theme: Colors; `charts.LIGHT` if `None`.
            path: File to save the chart to as well, PNG or SVG by its suffix.

        Returns:
            A chart with `png()`, `svg()` and `save(path)`; notebooks show it.

        Raises:
            ValueError: No such kind or value, or nothing to draw.
        """
        chart = plot.draw(self.table, kind, value=self.value(value), theme=theme)
        if path is not None:
            chart.save(path)
        return chart

    def save(self, path: str | Path) -> Path:
        """Write a Parquet file with the protocol in its metadata, atomically, and return the path."""
        path = files.user_path(path, "path")
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {b"overpaint": json.dumps(self.protocol).encode()}
        with files.atomic(path) as draft:
            pq.write_table(self.table.replace_schema_metadata(metadata), draft)
        return path

    @classmethod
    def load(cls, path: str | Path) -> "Effects":
        """Read a file that `save` wrote, in this version or an earlier one.

        Files from before `direct_effect` had a column hold the direct effect of a prompt swap in `indirect_effect`.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It holds something else, or another version wrote it and it lacks a column.
        """
        if not files.user_path(path, "path").is_file():
            raise FileNotFoundError(f"no effects at {str(path)!r}: trace and save them first.")
        try:
            table = read_table(path)
            protocol = dict(files.from_json((table.schema.metadata or {})[b"overpaint"]))
        except (KeyError, ValueError, TypeError) as error:
            raise ValueError(
                f"{str(path)!r} does not hold effects: name a file that `Effects.save` wrote."
            ) from error
        for name in _OPTIONAL:
            if name not in table.schema.names:
                empty = pa.nulls(table.num_rows, SCHEMA.field(name).type)
                table = table.append_column(SCHEMA.field(name), empty)
        absent = [name for name in SCHEMA.names if name not in table.schema.names]
        if absent:
            raise ValueError(
                f"the effects in {str(path)!r} lack {absent[0]!r}, because another version wrote them: trace again."
            )
        return cls(table.select(SCHEMA.names).replace_schema_metadata(None), protocol)

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]], protocol: Mapping[str, Any]) -> "Effects":
        """Return the effects in `rows`, whose keys are columns of `states.SCHEMA`."""
        return cls(pa.Table.from_pylist(list(rows), schema=SCHEMA), dict(protocol))

    def value(self, name: str | None = None) -> str:
        """Return `name`, or the default value of these effects if it is `None`.

        Raises:
            ValueError: It is not one of `VALUES`.
        """
        if name is None:
            return states.default_value(self.table)
        if name not in VALUES:
            raise ValueError(f"unknown value {name!r}: choose one of {', '.join(VALUES)}.")
        return name

    def _part(self, table: pa.Table, name: str) -> "Effects":
        prompts = len(set(table["probe"].to_pylist()))
        return Effects(table, {**self.protocol, "part": name, "part_prompts": prompts})
