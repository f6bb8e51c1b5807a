"""Is an effect real? Permutation p-values, Holm's correction and the agreement of two maps.

Values are one number a prompt and state, the mean over a prompt's seeds and noise, shape (P, S); NaN where a
prompt has no such state. If restoring a state did nothing for the attribute, a prompt's effect would
be as likely to be below zero as above; so the signs are flipped, prompt by prompt, and the p-value
is the share of flips whose mean is at least the measured one. With P prompts it is never below
2^-P: few prompts cannot make many states significant.

Sources: Fisher, The Design of Experiments, 1935, section 21 (flips); Phipson and Smyth, 2010,
https://arxiv.org/abs/1603.05766 (a Monte-Carlo p-value counts the measured one); Holm, 1979,
https://www.jstor.org/stable/4615733.
"""

import math

import numpy as np
from numpy.typing import NDArray

from overpaint.metrics import Interval, spearman

__all__ = ["agreement", "draws_for", "holm", "sign_flip"]

Array = NDArray[np.float64]
_BLOCK = 2048  # sign patterns at a time, to bound memory


def draws_for(states: int, alpha: float) -> int:
    """Return how many flips to draw so that Holm's correction over `states` can go below `alpha`."""
    return max(10_000, math.ceil(4 * states / alpha))


def sign_flip(values: Array, *, draws: int = 10_000, seed: int = 0) -> Array:
    """Return for each state the p-value of "its mean over prompts is above zero", one-sided.

    Args:
        values: Shape (P, S); NaN where there is none.
        draws: Flips drawn; where all 2^P are no more, all are taken and the p-value is exact.
        seed: Of the draws. All states share them.

    Returns:
        Shape (S,), in (0, 1]; NaN for a state without values.
    """
    kept = np.isfinite(values)
    numbers = np.where(kept, values, 0.0)  # a zero is the same under either sign
    prompts = len(numbers)
    measured = numbers.sum(0) - 1e-9 * np.abs(numbers).sum(0)  # ties count, whatever the rounding
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
    return np.where(kept.any(0), p, np.nan)


def holm(p: Array, *, family: int | None = None) -> Array:
    """Return p-values corrected for their number, so that any false alarm has the stated chance.

    The k-th smallest of m is multiplied by m - k + 1, and none is below a smaller one's.

    Args:
        p: Shape (m,); NaN for what was not tested, which does not count.
        family: How many there are with those that are not in `p`, which count as 1; as many as are in it if `None`.
    """
    tested = np.flatnonzero(np.isfinite(p))
    order = tested[np.argsort(p[tested], kind="stable")]
    steps = p[order] * (max(len(order), family or 0) - np.arange(len(order)))
    corrected = np.full(len(p), np.nan)
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return corrected


def agreement(first: Array, second: Array, *, resamples: int = 1000, seed: int = 0) -> Interval:
    """Return the Spearman correlation of two maps' means and its 95 % bootstrap interval over prompts.

    Args:
        first: One map's values, shape (P, S); NaN where there is none.
        second: The other's, of the same prompts and states.
        resamples: Draws of P prompts, the same prompts in both maps.
        seed: Of the draws.

    Returns:
        The correlation as `mean`, its bounds, and the number of states with values in both as `n`.
    """
    prompts = len(first)
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=resamples)
    weights = np.vstack([np.ones(prompts), counts.astype(np.float64)])
    means = zip(_weighted(weights, first), _weighted(weights, second), strict=True)
    whole, *drawn = [spearman(a[k], b[k]) for a, b in means for k in [np.isfinite(a + b)]]
    states = int(np.isfinite(_weighted(weights[:1], first) + _weighted(weights[:1], second)).sum())
    known = [rho for rho in drawn if math.isfinite(rho)]
    low, high = np.percentile(known, [2.5, 97.5]) if known else (math.nan, math.nan)
    return Interval(whole, float(low), float(high), states)


def _weighted(weights: Array, values: Array) -> Array:
    """Return means over prompts under each row of `weights`, shape (R, S); NaN where no weight is."""
    kept = np.isfinite(values)
    sums, counts = weights @ np.where(kept, values, 0.0), weights @ kept
    return np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)
