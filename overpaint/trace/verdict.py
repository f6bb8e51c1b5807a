"""Which states are causal: significance, threshold and controls, in one table.

A state is causal where restoring it brings the mean score at least half-way back and its effect is
above zero by a sign-flip test, corrected by Holm for the number of states tested. The threshold
comes from prompts that no statistic uses. Beside each state stand the controls, measured on text
features where no pictures were drawn of them: the same state in an untrained encoder (what the
architecture does alone), and with words corrupted that are not the concept.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from overpaint.metrics import bootstrap, paired
from overpaint.trace import states
from overpaint.trace.effects import Effects
from overpaint.trace.states import COLUMNS, Cells, State
from overpaint.trace.statistics import draws_for, holm, sign_flip

__all__ = ["Verdict", "judge"]

_NUMBERS = (
    "mean", "low", "high", "p", "p_holm", "score", "untrained", "other_span",
    "trained_minus_untrained", "trained_minus_untrained_low", "trained_minus_untrained_high",
)  # fmt: skip
SCHEMA = pa.schema(
    [*COLUMNS, *((name, pa.float64()) for name in _NUMBERS)]
    + [("causal", pa.bool_()), ("n", pa.int64()), ("prompts", pa.int64())]
)


@dataclass(frozen=True)
class Verdict:
    """What a trace says of each state.

    Attributes:
        table: One row a state, in execution order: site, role, head, window; mean of the value
            with its 95 % bootstrap interval over prompts (low, high); `p`, one-sided, and `p_holm`,
            corrected, both of that mean, in which prompts weigh the same; `score`, the mean score with the
            state restored; `untrained` and `other_span`, the controls' means; `trained_minus_untrained`,
            paired over prompts, with its interval;
            `causal`; n rows of so many prompts. Null is what was not measured.
        protocol: That of the effects, and: value, alpha, threshold and where it came from, states tested,
            the size of the family that Holm's correction is for, the smallest p-value that so many prompts
            allow, and what the controls measure. After a screening the family is all states that could have
            been chosen, for the choice has looked at them all.
    """

    table: pa.Table
    protocol: dict[str, Any]

    @property
    def reason(self) -> str:
        """Why no state can be called causal, as the end of a sentence; empty where some could be."""
        about = self.protocol
        if about["smallest_p"] * about["family"] <= about["alpha"]:
            return ""
        spent = " beside those that set the threshold" if "part" in about else ""
        return (
            f"so few prompts ({about['prompts_tested']}{spent}) cannot show that any of {about['family']} states is "
            "causal"
        )


def judge(effects: Effects, value: str, *, alpha: float, threshold: float | None) -> Verdict:
    """Return the verdict on each state of `effects`; see `Effects.test`.

    Raises:
        ValueError: `alpha` is out of range, or the value cannot be tested.
    """
    if value == "score_restored":
        raise ValueError(
            "`score_restored` cannot be tested against zero, for a score without any effect is above it: test "
            "'indirect_effect', which holds what restoring adds."
        )
    if not 0 < alpha <= 1:
        raise ValueError(f"`alpha` must lie above 0 and be at most 1, got {alpha!r}: say 0.05.")
    rest, limit, origin = _threshold(effects, threshold)
    found = states.cells(rest.table, value)
    probes, order, grid = states.grid(found)
    family = _family(rest.protocol, len(order))
    draws = draws_for(family, alpha)
    p = sign_flip(grid, draws=draws)
    corrected = holm(p, family=family)
    levels = _levels(rest)
    controls, measured = _controls(rest, value)
    rows = [
        {
            **state._asdict(),
            **_mean(found[state]),
            "p": float(p[i]),
            "p_holm": float(corrected[i]),
            "score": levels.get(state),
            "causal": _is_causal(levels.get(state), limit, float(corrected[i]), alpha),
            "prompts": int(np.isfinite(grid[:, i]).sum()),
            **controls.get(state, {}),
        }
        for i, state in enumerate(order)
    ]
    protocol = {
        **rest.protocol, "value": value, "alpha": alpha, "threshold": limit, "threshold_from": origin,
        "states_tested": len(order), "family": family, "prompts_tested": len(probes),
        "smallest_p": 0.5 ** len(probes) if 2 ** len(probes) <= draws else 1 / (draws + 1),
        "controls": measured,
    }  # fmt: skip
    return Verdict(pa.Table.from_pylist(rows, schema=SCHEMA), protocol)


def _threshold(effects: Effects, given: float | None) -> tuple[Effects, float | None, str]:
    """Return the effects to test, the threshold, and where it came from."""
    if given is not None:
        return effects, given, "given"
    drawn = effects.table["score_clean"].null_count < len(effects)
    if not drawn or len(set(effects.table["probe"].to_pylist())) < 2:
        return effects, None, "none: it takes pictures of two prompts"
    validation, rest = effects.split()
    prompts = validation.protocol["part_prompts"]
    return rest, validation.half_gap(), f"half-gap of {prompts} validation prompts"


def _is_causal(
    level: float | None, limit: float | None, p_holm: float, alpha: float
) -> bool | None:
    if level is None or limit is None:
        return None
    return level >= limit and p_holm <= alpha


def _family(protocol: dict[str, Any], tested: int) -> int:
    """Return how many states the correction is for: those tested, and those that screening left out.

    What is left out counts as if its p-value were 1; where heads or windows were drawn of each state chosen, as many
    of each left out count.
    """
    note = protocol.get("screen")
    if note is None:
        return tested
    return max(tested, math.ceil(tested * note["states"] / max(1, note["drawn"])))


def _mean(pairs: list[tuple[str, float]]) -> dict[str, Any]:
    found = bootstrap(list(states.by_prompt(pairs).values()))
    return {"mean": found.mean, "low": found.low, "high": found.high, "n": len(pairs)}


def _levels(effects: Effects) -> dict[State, float]:
    """Return the mean score that a state alone brings about: the corrupted one plus its effect.

    That is the restored score; where states were corrupted instead, its mirror image.
    """
    effect = states.cells(effects.table, "indirect_effect")
    corrupted = states.cells(effects.table, "score_corrupted")
    shared = effect.keys() & corrupted.keys()
    return {
        state: states.average(effect[state]) + states.average(corrupted[state]) for state in shared
    }


def _controls(effects: Effects, value: str) -> tuple[dict[State, dict[str, float]], dict[str, str]]:
    """Return the controls' columns of each state, and which value each of them holds."""
    found: dict[State, dict[str, float]] = {}
    measured: dict[str, str] = {}
    for control, column in (("untrained", "untrained"), ("other span", "other_span")):
        name = value
        run = states.cells(effects.table, name, control)
        if not run:
            name = "embed_recovery"
            run = states.cells(effects.table, name, control)
        if not run:
            continue
        measured[column] = name
        for state, pairs in run.items():
            found.setdefault(state, {})[column] = states.average(pairs)
        if column == "untrained":
            for state, columns in _difference(run, states.cells(effects.table, name)).items():
                found[state] |= columns
    return found, measured


def _difference(untrained: Cells, trained: Cells) -> dict[State, dict[str, float]]:
    """Return trained minus untrained for the states of both, paired over their common prompts."""
    columns = ("", "_low", "_high")
    found: dict[State, dict[str, float]] = {}
    for state in untrained.keys() & trained.keys():
        before, after = (states.by_prompt(run[state]) for run in (untrained, trained))
        common = sorted(before.keys() & after.keys())
        if common:
            gap = paired([before[p] for p in common], [after[p] for p in common])
            numbers = (gap.mean, gap.low, gap.high)
            names = [f"trained_minus_untrained{suffix}" for suffix in columns]
            found[state] = dict(zip(names, numbers, strict=True))
    return found
