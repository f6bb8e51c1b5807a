"""States, and the table of their effects: its columns, and its rows by state and prompt.

A state is a site, the role of a token (text encoder) or the empty role (UNet), one head or the whole output, and a
window of steps. The order of the rows in the table matters in one case only: the execution order of the sites is the
order of their first rows.
"""

import hashlib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from overpaint.model.sites import Site

__all__ = [
    "COLUMNS",
    "ROLES",
    "SCHEMA",
    "VALUES",
    "WINDOWS",
    "Cells",
    "State",
    "average",
    "by_prompt",
    "cells",
    "default_value",
    "grid",
    "half_gap",
    "records",
    "score_effect",
    "sites",
    "split",
]

Array = NDArray[np.float64]
Cells = dict["State", list[tuple[str, float]]]

VALUES = (
    "indirect_effect",
    "direct_effect",
    "recovery",
    "score_restored",
    "embed_recovery",
    "embed_recovery_pads",
    "latent_recovery",
    "attribution",
)
# First and last share of the steps of each window; "" is every step.
WINDOWS = {"": (0.0, 1.0), "early": (0.0, 1 / 3), "middle": (1 / 3, 2 / 3), "late": (2 / 3, 1.0)}
SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("site", "part", "kind", "path", "role", "control")]
    + [(name, pa.int64()) for name in ("index", "position", "seed", "noise")]
    + [(name, pa.string()) for name in ("probe", "attribute", "prompt", "concept")]
    + [(name, pa.string()) for name in ("source", "branches", "direction", "window")]
    + [("head", pa.int64())]
    + [(name, pa.float64()) for name in ("score_clean", "score_corrupted", *VALUES)]
)
COLUMNS = [(n, SCHEMA.field(n).type) for n in ("site", "role", "head", "window")]
ROLES = ("subject", "last_subject", "after", "eos", "pad")  # in the order of the prompt


class State(NamedTuple):
    """One restored state; `head` is `None` for the whole output, `window` is empty for every step."""

    site: str
    role: str
    head: int | None
    window: str


def records(
    table: pa.Table, columns: Sequence[str], control: str | None = None
) -> list[tuple[Any, ...]]:
    """Return the values in `columns` of all rows, or of the rows with this `control`."""
    rows = list(zip(*(table[name].to_pylist() for name in columns), strict=True))
    if control is None:
        return rows
    controls = table["control"].to_pylist()
    return [row for row, other in zip(rows, controls, strict=True) if other == control]


def sites(table: pa.Table) -> dict[str, Site]:
    """Return the traced sites by name, in execution order."""
    keys = ("site", "part", "kind", "index", "path")
    return {row[0]: Site(*row) for row in records(table, keys)}


def score_effect(table: pa.Table) -> str | None:
    """Return the column that holds effects on scores: indirect or direct; `None` where no picture was drawn."""
    for name in ("indirect_effect", "direct_effect"):
        if table[name].null_count < table.num_rows:
            return name
    return None


def default_value(table: pa.Table) -> str:
    """Return the value to show by default: the effect on scores, else `embed_recovery`."""
    return score_effect(table) or "embed_recovery"


def cells(table: pa.Table, value: str, control: str = "") -> Cells:
    """Return the (probe, value) pairs of each state that has any; states and pairs are sorted."""
    pairs: Cells = {}
    columns = ("site", "role", "head", "window", "probe", value)
    for site, role, head, window, probe, number in records(table, columns, control):
        if number is not None:
            pairs.setdefault(State(site, role, head, window or ""), []).append((probe, number))
    order = {name: i for i, name in enumerate(sites(table))}

    def rank(state: State) -> tuple[Any, ...]:
        role = ROLES.index(state.role) if state.role in ROLES else len(ROLES)
        head = -1 if state.head is None else state.head
        return order[state.site], head, role, state.role, list(WINDOWS).index(state.window)

    return {state: sorted(pairs[state]) for state in sorted(pairs, key=rank)}


def grid(pairs: Cells) -> tuple[list[str], list[State], Array]:
    """Return probes, states, and the mean of each probe and state, shape (P, S); NaN where there is no value."""
    probes = sorted({probe for entries in pairs.values() for probe, _ in entries})
    row = {probe: i for i, probe in enumerate(probes)}
    sums, counts = (np.zeros((len(probes), len(pairs))) for _ in range(2))
    for column, entries in enumerate(pairs.values()):
        for probe, number in entries:
            sums[row[probe], column] += number
            counts[row[probe], column] += 1
    means = np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)
    return probes, list(pairs), means


def by_prompt(pairs: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Return the mean of each prompt, in the order of the prompts' first pairs."""
    numbers: dict[str, list[float]] = {}
    for probe, number in pairs:
        numbers.setdefault(probe, []).append(number)
    return {probe: math.fsum(entries) / len(entries) for probe, entries in numbers.items()}


def average(pairs: Sequence[tuple[str, float]]) -> float:
    """Return the mean over prompts of the mean of each prompt, so that each prompt has the same weight."""
    means = by_prompt(pairs).values()
    return math.fsum(means) / len(means)


def half_gap(table: pa.Table) -> float:
    """Return the score halfway between the mean corrupted and the mean clean score; each prompt has the same weight.

    Raises:
        ValueError: No pictures were drawn, so there are no scores.
    """
    columns = ("probe", "seed", "noise", "score_clean", "score_corrupted")
    runs = sorted({row for row in records(table, columns, control="") if row[3] is not None})
    if not runs:
        raise ValueError("these effects hold no scores: trace again with `generate=True`.")
    return average([(probe, (clean + corrupted) / 2) for probe, _, _, clean, corrupted in runs])


def validation_count(prompts: int, validation: int = 10) -> int:
    """Return the number of validation prompts that `split` selects from `prompts` prompts."""
    return validation if prompts >= 2 * validation else max(1, prompts // 3)


def split(table: pa.Table, validation: int = 10) -> tuple[pa.Table, pa.Table]:
    """Return the rows of `validation` prompts and the rows of the others.

    A hash of the probes' ids chooses the prompts, so the choice is the same for every model and order of rows. With
    fewer than twice as many prompts as `validation`, a third of them are validation prompts.

    Raises:
        ValueError: There are fewer than two prompts, or `validation` is not positive.
    """
    if validation < 1:
        raise ValueError(f"`validation` must be at least 1 prompt, got {validation}.")
    names = table["probe"].to_pylist()
    probes = sorted(set(names), key=lambda name: hashlib.sha256(name.encode()).digest())
    if len(probes) < 2:
        raise ValueError(
            f"cannot split {len(probes)} prompt: trace at least two, or give a `threshold`."
        )
    count = validation_count(len(probes), validation)
    chosen = set(probes[:count])
    first = table.filter(pa.array([name in chosen for name in names]))
    return first, table.filter(pa.array([name not in chosen for name in names]))
