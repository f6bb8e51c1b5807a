"""Means with bootstrap intervals, shares with intervals that also hold at 0 and 1, and rank correlation.

Values are one number for each picture (a hit or a miss, a score), shape (n,). The interval is the percentile bootstrap
over pictures: draw n values with replacement, take the mean, repeat, and take quantiles of the means. If two runs share
prompts and seeds, the difference is taken for each picture first, so that common variation cancels.

A bootstrap of equal values has an interval of width 0, although a rate of 0 of 24 is not known exactly. So `share` and
`paired_share`, for verdicts of 0 and 1 and for means of such verdicts, take the interval of Clopper and Pearson instead
where all units have one value. A unit is a group, or a value without groups; the number of trials is the effective
number of units, not of pictures. The interval is two-sided, with equal tails: for 0 of 24 units it is 0 to 0.142.

Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13; Clopper and Pearson, Biometrika 26,
1934; the effective number of units: Kish, Survey Sampling, 1965, chapter 8.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from overpaint.errors import check_seed

__all__ = ["Interval", "bootstrap", "paired", "paired_share", "share", "spearman"]


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
    rng = np.random.default_rng(check_seed(seed))
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
            f"`before` and `after` must have the same length, got shapes {old.shape} and {new.shape}: "
            "score both runs on the same prompts and seeds."
        )
    return bootstrap(
        new - old, groups=groups, confidence=confidence, resamples=resamples, seed=seed
    )


def share(
    values: ArrayLike,
    *,
    groups: Sequence[object] | None = None,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    r"""Return a share and its interval: `bootstrap`, but Clopper and Pearson's interval where all units are equal.

    The trials of that interval are the independent units: the groups, or the values without groups. Groups of unequal
    sizes count as :math:`(\sum m_i)^2 / \sum m_i^2` units, with :math:`m_i` values in group i, which is at most the
    number of groups. The interval also holds for values between 0 and 1, whose variance is at most that of verdicts.

    Args:
        values: One verdict for each picture, 0 or 1, or the share of verdicts in each unit; in [0, 1], shape (n,).
        groups: As in `bootstrap`, such as the scene of each picture.
        confidence: As in `bootstrap`.
        resamples: As in `bootstrap`.
        seed: As in `bootstrap`.

    Raises:
        ValueError: As in `bootstrap`, or a value lies outside [0, 1].
    """
    numbers = np.asarray(values, dtype=np.float64)
    interval = bootstrap(
        numbers, groups=groups, confidence=confidence, resamples=resamples, seed=seed
    )
    if interval.n and not (numbers.min() >= 0 and numbers.max() <= 1):
        raise ValueError(
            f"`values` of a share must lie between 0 and 1, got {numbers.min():g} to {numbers.max():g}: "
            "use `bootstrap` for other means."
        )
    units = _equal_units(numbers, groups)
    if units is None:
        return interval
    low, high = _clopper_pearson(interval.mean, units, confidence)
    return Interval(interval.mean, low, high, interval.n)


def paired_share(
    before: ArrayLike,
    after: ArrayLike,
    *,
    groups: Sequence[object] | None = None,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Return the mean change of a share and its interval: `paired`, but never of width 0 where all units are equal.

    If no unit changes, the bounds are minus and plus Clopper and Pearson's upper bound of the share of pictures that
    change. If all units change alike by d, they are those of the share (1 + d) / 2, scaled back to [-1, 1].

    Args:
        before: As the values of `share`.
        after: The same pictures after the edit.
        groups: As in `share`.
        confidence: As in `share`.
        resamples: As in `share`.
        seed: As in `share`.

    Raises:
        ValueError: As in `paired`, or a change lies outside [-1, 1].
    """
    interval = paired(
        before, after, groups=groups, confidence=confidence, resamples=resamples, seed=seed
    )
    change = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    if interval.n and np.abs(change).max() > 1:
        raise ValueError(
            f"changes of a share must lie between -1 and 1, got {change.min():g} to {change.max():g}: "
            "use `paired` for other means."
        )
    units = _equal_units(change, groups)
    if units is None:
        return interval
    if not change.any():
        bound = _clopper_pearson(0.0, units, confidence)[1]
        return Interval(0.0, -bound, bound, interval.n)
    low, high = _clopper_pearson((1 + interval.mean) / 2, units, confidence)
    return Interval(interval.mean, 2 * low - 1, 2 * high - 1, interval.n)


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
    if a.size < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:  # scipy would warn about these rows
        return float("nan")
    stats: Any = import_module("scipy.stats")  # late because it is slow, and untyped
    return float(stats.spearmanr(a, b).statistic)


def _equal_units(numbers: NDArray[np.float64], groups: Sequence[object] | None) -> float | None:
    """Return the effective number of units if all of them have one mean; `None` otherwise, and without values."""
    if not numbers.size:
        return None
    sums, counts = _grouped(numbers, groups)
    if np.ptp(sums / counts) > 1e-12:
        return None
    return float(counts.sum() ** 2 / np.square(counts).sum())


def _clopper_pearson(mean: float, units: float, confidence: float) -> tuple[float, float]:
    """Return the bounds of a share of `units` trials, which need not be whole numbers."""
    special: Any = import_module("scipy.special")  # late because it is slow, and untyped
    tail, hits = (1 - confidence) / 2, mean * units
    misses = units - hits
    low = float(special.betaincinv(hits, misses + 1, tail)) if hits > 0 else 0.0
    high = float(special.betaincinv(hits + 1, misses, 1 - tail)) if misses > 0 else 1.0
    return low, high


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
