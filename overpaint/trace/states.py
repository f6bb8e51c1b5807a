"""States, and the table of their effects: its columns, and its rows by state and prompt.

A state is a site, the role of a token (text) or nothing (UNet), one head or the whole output, and
the window of steps. Nothing here depends on the order of the table's rows, but for the order in which
sites run, which is that of their first rows.
"""

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
    "State",
    "average",
    "by_prompt",
    "cells",
    "grid",
    "records",
    "sites",
]

Array = NDArray[np.float64]
Cells = dict["State", list[tuple[str, float]]]

VALUES = (
    "indirect_effect",
    "recovery",
    "score_restored",
    "embed_recovery",
    "embed_recovery_pads",
    "latent_recovery",
    "attribution",
)
# Which share of the steps each window begins and ends at; "" is every step.
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
    """What was restored; `head` is `None` for the whole output, `window` empty for every step."""

    site: str
    role: str
    head: int | None
    window: str


def records(
    table: pa.Table, columns: Sequence[str], control: str | None = None
) -> list[tuple[Any, ...]]:
    """Return the rows' entries in `columns`, of one run if `control` is not `None`."""
    rows = list(zip(*(table[name].to_pylist() for name in columns), strict=True))
    if control is None:
        return rows
    kept = table["control"].to_pylist()
    return [row for row, other in zip(rows, kept, strict=True) if other == control]


def sites(table: pa.Table) -> dict[str, Site]:
    """Return the traced sites by name, in execution order."""
    keys = ("site", "part", "kind", "index", "path")
    return {row[0]: Site(*row) for row in records(table, keys)}


def cells(table: pa.Table, value: str, control: str = "") -> Cells:
    """Return the (probe, value) pairs of each state that has any; states and pairs are sorted."""
    found: Cells = {}
    columns = ("site", "role", "head", "window", "probe", value)
    for site, role, head, window, probe, number in records(table, columns, control):
        if number is not None:
            found.setdefault(State(site, role, head, window or ""), []).append((probe, number))
    order = {name: i for i, name in enumerate(sites(table))}

    def place(state: State) -> tuple[Any, ...]:
        role = ROLES.index(state.role) if state.role in ROLES else len(ROLES)
        head = -1 if state.head is None else state.head
        return order[state.site], head, role, state.role, list(WINDOWS).index(state.window)

    return {state: sorted(found[state]) for state in sorted(found, key=place)}


def grid(found: Cells) -> tuple[list[str], list[State], Array]:
    """Return probes, states, and each one's mean, shape (P, S); NaN where there is none."""
    probes = sorted({probe for pairs in found.values() for probe, _ in pairs})
    place = {probe: i for i, probe in enumerate(probes)}
    sums, counts = (np.zeros((len(probes), len(found))) for _ in range(2))
    for column, pairs in enumerate(found.values()):
        for probe, number in pairs:
            sums[place[probe], column] += number
            counts[place[probe], column] += 1
    means = np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)
    return probes, list(found), means


def by_prompt(pairs: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Return each prompt's mean, in the order in which prompts are met."""
    numbers: dict[str, list[float]] = {}
    for probe, number in pairs:
        numbers.setdefault(probe, []).append(number)
    return {probe: math.fsum(found) / len(found) for probe, found in numbers.items()}


def average(pairs: Sequence[tuple[str, float]]) -> float:
    """Return the mean over prompts of each prompt's mean: a prompt weighs the same however many rows it has."""
    means = by_prompt(pairs).values()
    return math.fsum(means) / len(means)
