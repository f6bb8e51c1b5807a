"""Means with bootstrap intervals, and rank correlation.

Values are one number for each picture (a hit or a miss, a score), shape (n,). The interval is the percentile bootstrap
over pictures: draw n values with replacement, take the mean, repeat, and take quantiles of the means. If two runs share
prompts and seeds, the difference is taken for each picture first, so that common variation cancels.

An interval of width 0 means that all n values are equal. It does not mean that the rate is known exactly: for 0 of n
the true rate may still be as high as 3/n (the rule of three), so every interval also states n.

Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["Interval", "bootstrap", "paired", "spearman"]


@dataclass(frozen=True)
class Interval:
    """A mean of `n` values and the bounds of its interval; all NaN if there are no values."""

    mean: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.2f} [{self.low:.2f}, {self.high:.2f}]"


def bootstrap(
    values: ArrayLike,
    *,
    groups: Sequence[object] | None = None,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Return the mean of `values` and its bootstrap interval.

    Args:
        values: One number for each picture, shape (n,); booleans count as 0 and 1.
        groups: One key for each value; whole groups are drawn instead of single values. Use it for pictures of one
            prompt, which are not independent.
        confidence: Share of the bootstrap means between the bounds, in (0, 1).
        resamples: Number of bootstrap means.
        seed: Seed of the draws.

    Raises:
        ValueError: `values` is not one row of finite numbers, or `confidence` lies outside (0, 1).
    """
    numbers = np.asarray(values, dtype=np.float64)
    _check(numbers, confidence)
    if numbers.size == 0:
        return Interval(float("nan"), float("nan"), float("nan"), 0)
    sums, counts = _grouped(numbers, groups)
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, len(sums), size=(resamples, len(sums)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    tail = 50 * (1 - confidence)
    low, high = np.percentile(means, [tail, 100 - tail])
    return Interval(float(numbers.mean()), float(low), float(high), int(numbers.size))


def paired(
    before: ArrayLike,
    after: ArrayLike,
    *,
    groups: Sequence[object] | None = None,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Return the mean of `after - before` and its interval; arguments as in `bootstrap`.

    Raises:
        ValueError: `before` and `after` have different lengths.
    """
    old, new = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    if old.shape != new.shape:
        raise ValueError(
            f"`before` and `after` must pair up, got shapes {old.shape} and {new.shape}: "
            "score both runs on the same prompts and seeds."
        )
    return bootstrap(
        new - old, groups=groups, confidence=confidence, resamples=resamples, seed=seed
    )


def spearman(first: ArrayLike, second: ArrayLike) -> float:
    """Return Spearman's rank correlation of two rows of numbers, in [-1, 1]; ties get the mean of their ranks.

    NaN if a row is constant or shorter than two.

    Raises:
        ValueError: The rows differ in length, or hold a NaN or infinite number.
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1 or not np.isfinite(a + b).all():
        raise ValueError(
            f"`first` and `second` must be finite rows of one length, got shapes {a.shape} and "
            f"{b.shape}: leave out values without a partner."
        )
    if a.size < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:  # scipy would warn
        return float("nan")
    stats: Any = import_module("scipy.stats")  # late because it is slow, and untyped
    return float(stats.spearmanr(a, b).statistic)


def _check(numbers: NDArray[np.float64], confidence: float) -> None:
    if numbers.ndim != 1 or not np.isfinite(numbers).all():
        raise ValueError(
            f"`values` must be one row of finite numbers, got shape {numbers.shape}: "
            "pass one number for each picture, and leave out pictures without one."
        )
    if not 0 < confidence < 1:
        raise ValueError(
            f"`confidence` must lie between 0 and 1, got {confidence!r}: 0.95 is usual."
        )


def _grouped(
    numbers: NDArray[np.float64], groups: Sequence[object] | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the sum and the size of each group; without `groups` each value is a group."""
    if groups is None:
        return numbers, np.ones_like(numbers)
    if len(groups) != numbers.size:
        raise ValueError(
            f"`groups` must name one group for each value, got {len(groups)} for {numbers.size} values."
        )
    number = {key: i for i, key in enumerate(dict.fromkeys(groups))}
    index = [number[key] for key in groups]
    sums = np.bincount(index, weights=numbers).astype(np.float64)
    return sums, np.bincount(index).astype(np.float64)
