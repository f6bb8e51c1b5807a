"""Statistics of effects: means with intervals, permutation p-values, Holm's correction, agreement of two maps.

The tests take one number for each prompt and state, the mean over the prompt's seeds and noise samples, shape (P, S);
NaN where a prompt has no such state. Under the null hypothesis that restoring a state has no effect, the effect on a
prompt is below zero as often as above it. So the signs are flipped, prompt by prompt, and the p-value is the share of
flips whose mean is at least the measured mean. With P prompts it is never below 2^-P, so few prompts cannot make many
states significant.

Sources: Fisher, The Design of Experiments, 1935, section 21 (flips); Phipson and Smyth, 2010,
https://arxiv.org/abs/1603.05766 (a Monte-Carlo p-value counts the measured one); Holm, 1979,
https://www.jstor.org/stable/4615733.
"""

import math

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from overpaint.metrics import Interval, bootstrap, spearman
from overpaint.trace import states
from overpaint.trace.states import State

__all__ = ["agreement", "draws_for", "holm", "intervals", "sign_flip"]

Array = NDArray[np.float64]
_BLOCK = 2048  # sign patterns at a time, to bound memory


def intervals(table: pa.Table, value: str, control: str = "") -> dict[State, Interval]:
    """Return the mean of `value` for each state, with a 95 % bootstrap interval over prompts.

    Each prompt has the same weight; `n` of an interval counts the rows.
    """
    means: dict[State, Interval] = {}
    for state, pairs in states.cells(table, value, control).items():
        interval = bootstrap(list(states.by_prompt(pairs).values()))
        means[state] = Interval(interval.mean, interval.low, interval.high, len(pairs))
    return means


def draws_for(family: int, alpha: float) -> int:
    """Return the number of flips with which Holm's correction over `family` states can go below `alpha`."""
    return max(10_000, math.ceil(4 * family / alpha))


def sign_flip(values: Array, *, draws: int = 10_000, seed: int = 0) -> Array:
    """Return the one-sided p-value of each state for a mean over prompts above zero.

    Args:
        values: Shape (P, S); NaN where there is no value.
        draws: Number of random flips. If there are at most as many flips in all, 2^P, every flip is taken and the
            p-value is exact.
        seed: Seed of the random flips, which all states share.

    Returns:
        Shape (S,), in (0, 1]; NaN for a state without values.
    """
    present = np.isfinite(values)
    numbers = np.where(present, values, 0.0)  # a zero is the same under either sign
    prompts = len(numbers)
    measured = numbers.sum(0) - 1e-9 * np.abs(numbers).sum(
        0
    )  # ties count, also if they are rounded differently
    exact = 2**prompts <= draws
    total = 2**prompts if exact else draws
    rng = np.random.default_rng(seed)
    reached = np.zeros(numbers.shape[1])
    for start in range(0, total, _BLOCK):
        size = min(_BLOCK, total - start)
        if exact:
            bits = np.arange(start, start + size)[:, None] >> np.arange(prompts) & 1
        else:
            bits = rng.integers(0, 2, size=(size, prompts), dtype=np.int8)
        reached += ((1.0 - 2.0 * bits) @ numbers >= measured).sum(0)
    p = reached / total if exact else (reached + 1) / (total + 1)
    return np.where(present.any(0), p, np.nan)


def holm(p: Array, *, family: int | None = None) -> Array:
    """Return p-values corrected by Holm's method, which bounds the chance of any false positive.

    The k-th smallest of m p-values is multiplied by m - k + 1; then each is raised to the largest before it.

    Args:
        p: Shape (m,); NaN for a state that was not tested, which does not count.
        family: Number of all hypotheses. Those that are not in `p` count as if their p-value were 1. The number of
            tested states in `p` if `None`.
    """
    tested = np.flatnonzero(np.isfinite(p))
    order = tested[np.argsort(p[tested], kind="stable")]
    steps = p[order] * (max(len(order), family or 0) - np.arange(len(order)))
    corrected = np.full(len(p), np.nan)
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return corrected


def agreement(first: Array, second: Array, *, resamples: int = 1000, seed: int = 0) -> Interval:
    """Return the Spearman correlation of the means of two maps and its 95 % bootstrap interval over prompts.

    Args:
        first: Values of one map, shape (P, S); NaN where there is no value.
        second: Values of the other map, for the same prompts and states.
        resamples: Number of bootstrap samples of P prompts; each is used for both maps.
        seed: Seed of the bootstrap.

    Returns:
        The correlation as `mean`, its bounds, and the number of states with values in both as `n`.
    """
    prompts = len(first)
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=resamples)
    weights = np.vstack([np.ones(prompts), counts.astype(np.float64)])
    means = zip(_weighted(weights, first), _weighted(weights, second), strict=True)
    whole, *drawn = [spearman(a[k], b[k]) for a, b in means for k in [np.isfinite(a + b)]]
    shared = int(np.isfinite(_weighted(weights[:1], first) + _weighted(weights[:1], second)).sum())
    finite = [rho for rho in drawn if math.isfinite(rho)]
    low, high = np.percentile(finite, [2.5, 97.5]) if finite else (math.nan, math.nan)
    return Interval(whole, float(low), float(high), shared)


def _weighted(weights: Array, values: Array) -> Array:
    """Return means over prompts under each row of `weights`, shape (R, S); NaN where all weights are 0."""
    present = np.isfinite(values)
    sums, counts = weights @ np.where(present, values, 0.0), weights @ present
    return np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)
