r"""Distances between two sets of pictures, given as features: KID with a confidence interval and a test, and FID.

Features are rows, one for each picture, shape (n, D), of any feature extractor. Distances on different extractors do
not compare.

Every value of KID is one quadratic form in weights of the pictures. With the kernel :math:`k(x, y) = (x^\top y / D +
1)^3` and weights :math:`a, b \ge 0`, of which no picture has both,

.. math:: \frac{\sum a_i a_j k_{ij}}{\sum a_i a_j} + \frac{\sum b_i b_j k_{ij}}{\sum b_i b_j}
    - 2 \frac{\sum a_i b_j k_{ij}}{\sum a_i b_j},

where each sum runs over pairs of pictures of *different groups*. Weights of 0 and 1 (all pictures, a subset, a shuffled
split) give the unbiased estimate; the counts of a draw with replacement give a bootstrap sample. Without groups each
picture is a group: it is compared neither with itself nor with its copies in a resample. If both sets draw the same
prompts, prompts must be the groups. Pictures of one prompt are similar whichever set they come from, and such pairs are
more frequent in the mixed sum than in the other two, so that the estimate without groups is far below zero. The kernel
is computed in blocks of rows.

Source: Bińkowski et al., 2018 (KID), https://arxiv.org/abs/1801.01401, section 4; Gretton et al., 2012, JMLR 13, lemma
6 (the estimate) and section 5 (its permutation test); Heusel et al., 2017 (FID), https://arxiv.org/abs/1706.08500.
Deviations: the interval is a bootstrap over pictures (or prompts). The usual standard deviation over subsets depends on
the size of the subsets instead of the number of pictures.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from overpaint.errors import check_seed

__all__ = ["Distance", "TwoSample", "fid", "kid", "kid_test"]

_BLOCK = 1024  # rows of the kernel that are computed at once

Array = NDArray[np.float64]
Groups = tuple[Sequence[object], Sequence[object]]


@dataclass(frozen=True)
class Distance:
    """A distance between `n_a` and `n_b` pictures.

    Attributes:
        value: The estimate. An unbiased estimate of a distance of zero can be negative.
        low: Lower bound of its interval; NaN if the distance has none.
        high: Upper bound.
        n_a: Number of pictures in the first set.
        n_b: Number of pictures in the second set.
        subset_size: Pictures of each set in a subset; the size of the smaller set if all were used.
        subset_std: Standard deviation over the subsets, which papers print after ±; 0 for one subset.
    """

    value: float
    low: float
    high: float
    n_a: int
    n_b: int
    subset_size: int = 0
    subset_std: float = 0.0

    def __str__(self) -> str:
        return f"{self.value:.4f} [{self.low:.4f}, {self.high:.4f}]"


@dataclass(frozen=True)
class TwoSample:
    """Result of a permutation test of the equality of two sets of pictures.

    Attributes:
        value: Their KID.
        p: Share of splits with at least this KID, the given split included; small if the sets differ.
        threshold: KID that random splits exceed with probability `alpha`.
        alpha: Significance level.
        permutations: Number of random splits.
    """

    value: float
    p: float
    threshold: float
    alpha: float
    permutations: int

    @property
    def indistinguishable(self) -> bool:
        """True if the test shows no difference at level `alpha`; this does not prove that there is none."""
        return self.p > self.alpha


def kid(
    features_a: Any,
    features_b: Any,
    *,
    subsets: int = 100,
    subset_size: int | None = None,
    groups: Groups | None = None,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Distance:
    """Return the unbiased kernel distance of two sets of pictures with a bootstrap interval.

    Args:
        features_a: Features of the first set, shape (n_a, D); an array or a tensor on the CPU.
        features_b: Features of the second set, shape (n_b, D). The sets must not share seeds: pictures of one seed are
            more similar than pictures of two, so that the estimate would be too small.
        subsets: Number of subsets, if `subset_size` is given; the value is their mean.
        subset_size: Pictures of each set in a subset; by default one estimate from all pictures, which has the same
            mean and the smallest variance.
        groups: The prompt of each picture of both sets; needed if both sets draw the same prompts. Pictures of one
            prompt are then not compared, and the bootstrap draws prompts, the same in both sets.
        confidence: Confidence level of the interval, in (0, 1).
        resamples: Number of bootstrap samples; 0 for no interval.
        seed: Seed of subsets and bootstrap samples.

    Raises:
        ValueError: The features are not two matrices of finite numbers with equal width and at least two rows, a subset
            is larger than a set, `confidence` lies outside (0, 1), or `groups` do not fit.
    """
    a, b = _rows(features_a, features_b)
    if not 0 < confidence < 1:
        raise ValueError(
            f"`confidence` must lie between 0 and 1, got {confidence!r}: 0.95 is usual."
        )
    smaller = min(len(a), len(b))
    size = smaller if subset_size is None else subset_size
    if not 2 <= size <= smaller or subsets < 1 or resamples < 0:
        raise ValueError(
            f"`subset_size` must lie between 2 and the smaller set's {smaller} pictures, `subsets` be at least 1 and "
            f"`resamples` at least 0; got {size}, {subsets} and {resamples}: omit `subset_size` to use all."
        )
    rng = np.random.default_rng(check_seed(seed))
    ones = [np.ones((len(a), 1)), np.ones((len(b), 1))]
    parts = [_subsets(rng, len(x), size, subsets) for x in (a, b)] if subset_size else ones
    keys = _keys(groups, len(a), len(b))
    drawn = _draws(rng, len(a), len(b), None if groups is None else keys, resamples)
    weights = [np.hstack(pair) for pair in zip(parts, drawn, strict=True)]
    values = _quadratic_forms(
        np.concatenate([a, b]),
        np.concatenate([weights[0], np.zeros((len(b), weights[0].shape[1]))]),
        np.concatenate([np.zeros((len(a), weights[1].shape[1])), weights[1]]),
        keys,
    )
    estimates, resampled = values[: parts[0].shape[1]], values[parts[0].shape[1] :]
    tail = 50 * (1 - confidence)
    low, high = (
        np.percentile(resampled, [tail, 100 - tail]) if resamples else (float("nan"), float("nan"))
    )
    return Distance(
        float(estimates.mean()),
        float(low),
        float(high),
        len(a),
        len(b),
        size,
        float(estimates.std()),
    )


def kid_test(
    features_a: Any,
    features_b: Any,
    *,
    groups: Groups | None = None,
    permutations: int = 1000,
    alpha: float = 0.05,
    seed: int = 0,
) -> TwoSample:
    """Return a permutation test of the hypothesis that two sets of pictures have one distribution.

    To test whether an edit changed a model's pictures, compare the edited model's pictures with those of the unedited
    model from a *second set of seeds*, with `groups` if both drew the same prompts. If the result is
    `indistinguishable`, these pictures show no larger change by the edit than by other seeds.

    Args:
        features_a: Features of the first set, shape (n_a, D).
        features_b: Features of the second set, from other seeds, shape (n_b, D).
        groups: The prompt of each picture of both sets; pictures are then exchanged only within a prompt.
        permutations: Number of random splits.
        alpha: Probability of a false difference between equal sets.
        seed: Seed of the splits.

    Raises:
        ValueError: As in `kid`; or `alpha` lies outside (0, 1), or `permutations` is less than 1 / `alpha`.
    """
    a, b = _rows(features_a, features_b)
    if not 0 < alpha < 1 or permutations < 1 / alpha:
        raise ValueError(
            f"`alpha` must lie between 0 and 1 and `permutations` be at least 1 / alpha, got {alpha!r} and "
            f"{permutations}: 0.05 and 1000 are usual."
        )
    keys = _keys(groups, len(a), len(b))
    within = keys if groups is not None else np.zeros_like(keys)
    rng = np.random.default_rng(check_seed(seed))
    first = np.arange(len(keys)) < len(a)
    splits = np.stack([first, *(_shuffled(rng, first, within) for _ in range(permutations))], 1)
    pooled = np.concatenate([a, b])
    values = _quadratic_forms(pooled, splits.astype(np.float64), (~splits).astype(np.float64), keys)
    rounding = 1e-12 * max(1.0, float(np.max(np.abs(values))))
    p = float((values >= values[0] - rounding).mean())
    threshold = float(np.quantile(values[1:], 1 - alpha))
    return TwoSample(float(values[0]), p, threshold, alpha, permutations)


def fid(features_a: Any, features_b: Any) -> Distance:
    r"""Return the Fréchet distance of the normal distributions fitted to two sets of pictures.

    :math:`|\mu_a - \mu_b|^2 + \mathrm{tr}(\Sigma_a + \Sigma_b - 2 (\Sigma_a \Sigma_b)^{1/2})`, covariances with n - 1,
    in float64. The last trace is computed as the sum of the singular values of :math:`R_a R_b^\top`, where
    :math:`R^\top R = \Sigma`, because a matrix root fails if a set has fewer pictures than features.

    The estimate has a positive bias that grows as the number of pictures falls. So there is no interval, and values
    from sets of different sizes do not compare. Use `kid` below a few thousand pictures.

    Args:
        features_a: Features of the first set, shape (n_a, D).
        features_b: Features of the second set, shape (n_b, D).

    Raises:
        ValueError: As in `kid`.
    """
    a, b = _rows(features_a, features_b)
    difference = a.mean(0) - b.mean(0)
    roots = [np.linalg.qr(x - x.mean(0), mode="r") / np.sqrt(len(x) - 1) for x in (a, b)]
    traces = sum(float((root * root).sum()) for root in roots)
    shared = float(np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum())
    nan = float("nan")
    value = float(difference @ difference) + traces - 2 * shared
    return Distance(value, nan, nan, len(a), len(b))


def _quadratic_forms(pooled: Array, a: Array, b: Array, keys: NDArray[Any]) -> Array:
    """Return the quadratic form of this module for each column of the weights `a` and `b`, both (n, R), shape (R,)."""
    sums = np.zeros((3, a.shape[1]))
    for start in range(0, len(pooled), _BLOCK):
        rows = slice(start, start + _BLOCK)
        kernel = (pooled[rows] @ pooled.T / pooled.shape[1] + 1) ** 3
        kernel[keys[rows, None] == keys] = 0
        to_a, to_b = kernel @ a, kernel @ b
        sums += ((a[rows] * to_a).sum(0), (b[rows] * to_b).sum(0), (a[rows] * to_b).sum(0))
    a_group, b_group = _by_group(a, keys), _by_group(b, keys)
    pairs = [
        x.sum(0) * y.sum(0) - (x * y).sum(0)
        for x, y in ((a_group, a_group), (b_group, b_group), (a_group, b_group))
    ]
    return sums[0] / pairs[0] + sums[1] / pairs[1] - 2 * sums[2] / pairs[2]


def _by_group(weights: Array, keys: NDArray[Any]) -> Array:
    """Return the sums of `weights` (n, R) over each group, shape (G, R)."""
    sums = np.zeros((int(keys.max()) + 1, weights.shape[1]))
    np.add.at(sums, keys, weights)
    return sums


def _subsets(rng: np.random.Generator, n: int, size: int, count: int) -> Array:
    """Return `count` random subsets of `size` of `n` pictures, as columns of 0 and 1, shape (n, count)."""
    ranks = rng.random((n, count)).argsort(0).argsort(0)
    return (ranks < size).astype(np.float64)


def _draws(
    rng: np.random.Generator, n_a: int, n_b: int, keys: NDArray[Any] | None, resamples: int
) -> tuple[Array, Array]:
    """Return the count of each picture in each resample, shapes (n_a, R) and (n_b, R); `keys` resample groups."""
    if keys is None:
        a, b = (_usable(rng.multinomial(n, [1 / n] * n, size=resamples).T) for n in (n_a, n_b))
        return a, b
    number = int(keys.max()) + 1
    counts = rng.multinomial(number, [1 / number] * number, size=resamples).T
    for set_keys in (keys[:n_a], keys[n_a:]):  # each set needs two of the drawn groups
        present = np.zeros(number, bool)
        present[set_keys] = True
        counts = np.where((counts[present] > 0).sum(0) < 2, 1, counts)
    drawn = counts[keys].astype(np.float64)
    return drawn[:n_a], drawn[n_a:]


def _usable(counts: NDArray[Any]) -> Array:
    """Return counts as weights; a draw of a single picture has no pair and is replaced by one of all pictures."""
    single = (counts > 0).sum(0) < 2
    return np.where(single, 1, counts).astype(np.float64)


def _shuffled(
    rng: np.random.Generator, first: NDArray[np.bool_], keys: NDArray[Any]
) -> NDArray[np.bool_]:
    """Return `first` shuffled among the rows of each key."""
    rows = np.argsort(keys, kind="stable")
    sources = np.lexsort((rng.random(len(keys)), keys))
    shuffled = np.empty_like(first)
    shuffled[rows] = first[sources]
    return shuffled


def _keys(groups: Groups | None, n_a: int, n_b: int) -> NDArray[Any]:
    """Return the index of each picture's group; pictures of the first set come first."""
    if groups is None:
        return np.arange(n_a + n_b)
    if len(groups) != 2 or (len(groups[0]), len(groups[1])) != (n_a, n_b):
        raise ValueError(
            f"`groups` must name the prompt of each picture, of {n_a} and of {n_b}, got "
            f"{', '.join(str(len(g)) for g in groups)}: give one list for each set."
        )
    if min(len(set(names)) for names in groups) < 2:
        raise ValueError(
            "`groups` must name at least two prompts in each set, because pictures of one prompt are not compared: "
            "draw more prompts, or omit `groups`."
        )
    number = {key: i for i, key in enumerate(dict.fromkeys([*groups[0], *groups[1]]))}
    return np.array([number[key] for key in (*groups[0], *groups[1])])


def _rows(features_a: Any, features_b: Any) -> tuple[Array, Array]:
    a, b = np.asarray(features_a, np.float64), np.asarray(features_b, np.float64)
    fits = a.ndim == b.ndim == 2 and a.shape[1] == b.shape[1] and min(len(a), len(b)) >= 2
    if not fits or not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError(
            "features must be two matrices of finite numbers of one width, two rows or more each, got shapes "
            f"{a.shape} and {b.shape}: give one row for each picture, from one extractor."
        )
    return a, b
