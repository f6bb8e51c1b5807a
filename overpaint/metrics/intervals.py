"""Means with intervals: what a handful of pictures can and cannot tell.

Values are one number a picture (a hit or a miss, a score), shape (n,). The interval is the
percentile bootstrap over pictures: draw n values with replacement, take the mean, repeat, cut off
the tails. Where two runs share prompts and seeds, the difference is taken picture by picture
first, so that what the pictures share cancels.

An interval of no width means that all n values agreed, not that the truth is known: for 0 of n the
true rate may still be as high as 3/n (the rule of three), so n stands beside every interval.

Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["Interval", "bootstrap", "paired", "spearman"]


@dataclass(frozen=True)
class Interval:
    """A mean of `n` values and the bounds of its interval; all NaN where there was no value."""

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
        values: One number a picture, shape (n,); booleans count as 0 and 1.
        groups: What to draw instead of single values, one key a value: pictures of one prompt
            are not independent.
        confidence: Share of the bootstrap means between the bounds, in (0, 1).
        resamples: Bootstrap means drawn.
        seed: Of the draws.

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
    """Return the rank correlation of two rows of numbers, in [-1, 1]; ties share their mean rank.

    NaN where either row is constant or shorter than two, for then there is no order to compare.

    Raises:
        ValueError: The rows differ in length, or hold what is not finite.
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1 or not np.isfinite(a + b).all():
        raise ValueError(
            f"`first` and `second` must be finite rows of one length, got shapes {a.shape} and "
            f"{b.shape}: leave out what lacks a partner."
        )
    if a.size < 2:
        return float("nan")
    x, y = _ranks(a), _ranks(b)
    x, y = x - x.mean(), y - y.mean()
    norm = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / norm if norm > 0 else float("nan")


def _ranks(numbers: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return ranks from 1 on; equal numbers get the mean of their ranks."""
    _, place, counts = np.unique(numbers, return_inverse=True, return_counts=True)
    last = np.cumsum(counts).astype(np.float64)
    return (last - (counts - 1) / 2)[place]


def _check(numbers: NDArray[np.float64], confidence: float) -> None:
    if numbers.ndim != 1 or not np.isfinite(numbers).all():
        raise ValueError(
            f"`values` must be one row of finite numbers, got shape {numbers.shape}: "
            "pass one number a picture, and leave out those that have none."
        )
    if not 0 < confidence < 1:
        raise ValueError(f"`confidence` must lie between 0 and 1, got {confidence!r}: say 0.95.")


def _grouped(
    numbers: NDArray[np.float64], groups: Sequence[object] | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the sum and the count of each group; without groups each value is its own."""
    if groups is None:
        return numbers, np.ones_like(numbers)
    if len(groups) != numbers.size:
        raise ValueError(
            f"`groups` must name one group a value, got {len(groups)} for {numbers.size} values."
        )
    place = {key: i for i, key in enumerate(dict.fromkeys(groups))}
    index = [place[key] for key in groups]
    sums = np.bincount(index, weights=numbers).astype(np.float64)
    return sums, np.bincount(index).astype(np.float64)
