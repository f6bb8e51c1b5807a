"""Significance of effects: which states are causal, with p-values, threshold and controls in one table.

A state is causal if restoring it raises the mean score to a threshold, by default halfway from corrupted to clean, and
if its effect is above zero by a sign-flip test, with Holm's correction for the number of states tested. The threshold
is computed from prompts that no statistic uses. The table also holds the controls of each state: the same state in an
untrained encoder (the effect of the architecture alone), and with noise on words that are not the concept. A control
without pictures is measured on text features.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from overpaint.metrics import paired
from overpaint.trace import states
from overpaint.trace.states import COLUMNS, Cells, State
from overpaint.trace.statistics import draws_for, holm, intervals, sign_flip

__all__ = ["CausalTest", "causal_test"]

_NUMBERS = (
    "mean", "low", "high", "p", "p_holm", "score", "untrained", "other_span",
    "trained_minus_untrained", "trained_minus_untrained_low", "trained_minus_untrained_high",
)  # fmt: skip
SCHEMA = pa.schema(
    [*COLUMNS, *((name, pa.float64()) for name in _NUMBERS)]
    + [("causal", pa.bool_()), ("n", pa.int64()), ("prompts", pa.int64())]
)


@dataclass(frozen=True)
class CausalTest:
    """Result of testing each state of a trace.

    Attributes:
        table: One row for each state, in execution order: site, role, head, window; mean of the value
            with its 95 % bootstrap interval over prompts (low, high); `p`, one-sided, and `p_holm`,
            corrected, both of that mean over equally weighted prompts; `score`, the mean score with the
            state restored; `untrained` and `other_span`, the means of the controls; `trained_minus_untrained`,
            paired over prompts, with its interval; `causal`; the numbers of rows (`n`) and of prompts. A value that
            was not measured is null.
        protocol: The protocol of the effects, and: value, alpha, threshold and its origin, number of states tested,
            size of the family for Holm's correction, number of prompts tested, smallest p-value that so many prompts
            allow, and the value that each control measures. After a screening the family is all states that the
            screening chose from, since the choice depends on all of them.
    """

    table: pa.Table
    protocol: dict[str, Any]

    @property
    def reason(self) -> str:
        """The reason why no state can be causal, as the end of a sentence; empty if some state can be."""
        protocol = self.protocol
        if protocol["smallest_p"] * protocol["family"] <= protocol["alpha"]:
            return ""
        spent = " beside those that set the threshold" if "part" in protocol else ""
        return (
            f"so few prompts ({protocol['prompts_tested']}{spent}) cannot show that any of {protocol['family']} states "
            "is causal"
        )


def causal_test(
    table: pa.Table,
    protocol: dict[str, Any],
    value: str,
    *,
    alpha: float = 0.05,
    threshold: float | None = None,
) -> CausalTest:
    """Test each state of a table of effects; `Effects.test` explains the arguments.

    Raises:
        ValueError: `alpha` is out of range, or the value cannot be tested.
    """
    if value == "score_restored":
        raise ValueError(
            "`score_restored` cannot be tested against zero, because a score is above zero without any effect: test "
            "'indirect_effect', the change of the score by restoring."
        )
    if not 0 < alpha <= 1:
        raise ValueError(
            f"`alpha` must lie above 0 and be at most 1, got {alpha!r}: 0.05 is usual."
        )
    tested, limit, origin = _threshold(table, threshold)
    protocol = {**protocol, **origin}
    means = intervals(tested, value)
    probes, order, grid = states.grid(states.cells(tested, value))
    family = _family(protocol, len(order))
    draws = draws_for(family, alpha)
    p = sign_flip(grid, draws=draws)
    corrected = holm(p, family=family)
    scores = _restored_scores(tested, protocol)
    controls, measured = _controls(tested, value)
    rows = [
        {
            **state._asdict(),
            "mean": means[state].mean,
            "low": means[state].low,
            "high": means[state].high,
            "n": means[state].n,
            "p": float(p[i]),
            "p_holm": float(corrected[i]),
            "score": scores.get(state),
            "causal": _is_causal(scores.get(state), limit, float(corrected[i]), alpha),
            "prompts": int(np.isfinite(grid[:, i]).sum()),
            **controls.get(state, {}),
        }
        for i, state in enumerate(order)
    ]
    protocol |= {
        "value": value, "alpha": alpha, "threshold": limit, "states_tested": len(order), "family": family,
        "prompts_tested": len(probes),
        "smallest_p": 0.5 ** len(probes) if 2 ** len(probes) <= draws else 1 / (draws + 1), "controls": measured,
    }  # fmt: skip
    return CausalTest(pa.Table.from_pylist(rows, schema=SCHEMA), protocol)


def _threshold(
    table: pa.Table, threshold: float | None
) -> tuple[pa.Table, float | None, dict[str, Any]]:
    """Return the rows to test, the threshold, and the fields of the protocol that state its origin."""
    if threshold is not None:
        return table, threshold, {"threshold_from": "given"}
    drawn = table["score_clean"].null_count < table.num_rows
    if not drawn or len(set(table["probe"].to_pylist())) < 2:
        return table, None, {"threshold_from": "none: it takes pictures of two prompts"}
    validation, rest = states.split(table)
    counts = [len(set(part["probe"].to_pylist())) for part in (validation, rest)]
    origin = {
        "part": "test", "part_prompts": counts[1],
        "threshold_from": f"half-gap of {counts[0]} validation prompts",
    }  # fmt: skip
    return rest, states.half_gap(validation), origin


def _is_causal(
    score: float | None, limit: float | None, p_holm: float, alpha: float
) -> bool | None:
    if score is None or limit is None:
        return None
    return score >= limit and p_holm <= alpha


def _family(protocol: dict[str, Any], tested: int) -> int:
    """Return the number of states for Holm's correction: those tested, and those that a screening left out.

    A state that was left out counts as if its p-value were 1. If several heads or windows of each chosen state were
    traced, each state left out counts as many times.
    """
    note = protocol.get("screen")
    if note is None:
        return tested
    return max(tested, math.ceil(tested * note["states"] / max(1, note["drawn"])))


def _restored_scores(table: pa.Table, protocol: dict[str, Any]) -> dict[State, float]:
    """Return for each state the mean corrupted score plus the state's mean effect on the score.

    This is the mean restored score. If states were corrupted instead of restored, it is its mirror image. A prompt
    swap with `pick="max"` raises the score of the target from that of the clean pictures.
    """
    effect = states.cells(table, states.score_effect(table) or "indirect_effect")
    start = "score_clean" if protocol.get("pick") == "max" else "score_corrupted"
    before = states.cells(table, start)
    shared = effect.keys() & before.keys()
    return {
        state: states.average(effect[state]) + states.average(before[state]) for state in shared
    }


def _controls(table: pa.Table, value: str) -> tuple[dict[State, dict[str, float]], dict[str, str]]:
    """Return the columns of the controls for each state, and for each control the value that it holds."""
    columns: dict[State, dict[str, float]] = {}
    measured: dict[str, str] = {}
    for control, column in (("untrained", "untrained"), ("other span", "other_span")):
        name = value
        run = states.cells(table, name, control)
        if not run:
            name = "embed_recovery"
            run = states.cells(table, name, control)
        if not run:
            continue
        measured[column] = name
        for state, pairs in run.items():
            columns.setdefault(state, {})[column] = states.average(pairs)
        if column == "untrained":
            for state, numbers in _difference(run, states.cells(table, name)).items():
                columns[state] |= numbers
    return columns, measured


def _difference(untrained: Cells, trained: Cells) -> dict[State, dict[str, float]]:
    """Return trained minus untrained for the states of both, paired over their common prompts."""
    columns: dict[State, dict[str, float]] = {}
    for state in untrained.keys() & trained.keys():
        before, after = (states.by_prompt(run[state]) for run in (untrained, trained))
        common = sorted(before.keys() & after.keys())
        if common:
            gap = paired([before[p] for p in common], [after[p] for p in common])
            columns[state] = {
                "trained_minus_untrained": gap.mean,
                "trained_minus_untrained_low": gap.low,
                "trained_minus_untrained_high": gap.high,
            }
    return columns
