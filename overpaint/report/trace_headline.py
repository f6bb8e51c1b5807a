"""Headline of a trace: one sentence about significance and the control, computed from the effects."""

import math

from overpaint.trace import Effects, states

__all__ = ["headline"]

_AS_STRONG = (
    0.9  # a control is as strong if it reaches this share of the trained encoder's largest value
)


def headline(effects: Effects) -> str:
    """Return one sentence: the number of causal states, or of prompts needed to find one, and the control's effect."""
    clauses = [clause for clause in (_causal(effects), _control(effects)) if clause]
    sentence = "; ".join(clauses)
    return f"{sentence[:1].upper()}{sentence[1:]}." if sentence else ""


def prompts_needed(family: int, alpha: float, *, split: bool) -> int:
    """Return the number of prompts that a trace needs so that one of `family` states can be causal.

    A sign-flip test of P prompts has p-values of at least 2^-P, and Holm's correction multiplies the smallest by the
    number of states.

    Args:
        family: Number of states tested.
        alpha: Largest corrected p-value of a causal state.
        split: Some of the prompts set the threshold and are not tested, see `states.split`.
    """
    tested = max(1, math.ceil(math.log2(family / alpha) - 1e-9))
    if not split:
        return tested
    total = max(tested, 2)
    while total - states.validation_count(total) < tested:
        total += 1
    return total


def _causal(effects: Effects) -> str:
    count = len(set(effects.table["probe"].to_pylist()))
    prompts = f"{count} prompt{'s' if count != 1 else ''}"
    if states.score_effect(effects.table) is None:
        return f"{prompts} and no pictures: states are compared by text features, none is called causal"
    test = effects.test()
    family, alpha = test.protocol["family"], test.protocol["alpha"]
    if test.protocol["threshold"] is None or test.reason:
        split = "part" in test.protocol or test.protocol["threshold"] is None
        needed = prompts_needed(family, alpha, split=split)
        few = "is too few" if count == 1 else "are too few"
        return (
            f"{prompts} {few} to call any of {family} states causal (at least {needed} are needed)"
        )
    causal = sum(bool(row) for row in test.table["causal"].to_pylist())
    return f"{causal} of {family} states {'is' if causal == 1 else 'are'} causal, traced with {prompts}"


def _control(effects: Effects) -> str:
    """Return a clause that compares the untrained encoder with the trained one; empty without that control."""
    values = ("embed_recovery", "indirect_effect")
    for value in values:
        means = [effects.mean(value, control=c)["mean"].to_pylist() for c in ("", "untrained")]
        if not all(means):
            continue
        trained, untrained = (max(column) for column in means)
        figures = f"(largest {_NAMES[value]} {untrained:.2f}, trained {trained:.2f})"
        if untrained >= _AS_STRONG * trained:
            return f"the untrained control is as strong {figures}, so these values show the architecture, not training"
        return f"the untrained control is weaker {figures}"
    return ""


_NAMES = {"embed_recovery": "recovery of text features", "indirect_effect": "effect on the score"}
