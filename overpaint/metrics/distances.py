r"""Distances between two sets of pictures, given as features: KID with its interval and its test, and FID.

Rows of features, one a picture, shape (n, D), from any named extractor; a distance says nothing without that name.

Every figure of KID is one quadratic form in weights on the pictures. With the kernel :math:`k(x, y) = (x^\top y / D +
1)^3` and weights :math:`a, b \ge 0` of disjoint support,

.. math:: \frac{\sum a_i a_j k_{ij}}{\sum a_i a_j} + \frac{\sum b_i b_j k_{ij}}{\sum b_i b_j}
    - 2 \frac{\sum a_i b_j k_{ij}}{\sum a_i b_j},

each sum over pairs of pictures of *different groups*, is the unbiased estimate for weights of 0 and 1 (all pictures, a
subset, a shuffled split), and its bootstrap for counts of drawing with replacement. Without groups every picture is its
own: it is not compared with itself, nor with its own copy in a resample. Where two sets draw the same prompts, pictures
of one prompt are near whichever set they come from; they meet in the mixed sum more often than in the two others, and
the plain estimate comes out far below zero. With prompts as groups they meet in none. The kernel is made in blocks and
never held whole.

Source: Bińkowski et al., 2018 (KID), https://arxiv.org/abs/1801.01401, section 4; Gretton et al., 2012, JMLR 13, lemma
6 (the estimate) and section 5 (its test by shuffling); Heusel et al., 2017 (FID), https://arxiv.org/abs/1706.08500.
Deviations: the interval is a bootstrap over pictures (or prompts) instead of the spread over subsets, which tells of
the subsets' size alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Distance", "TwoSample", "fid", "kid", "kid_test"]

_BLOCK = 1024  # rows of the kernel made at once

Array = NDArray[np.float64]
Groups = tuple[Sequence[object], Sequence[object]]


@dataclass(frozen=True)
class Distance:
    """A distance between `n_a` and `n_b` pictures.

    Attributes:
        value: The estimate; an unbiased one of nothing is as often below zero as above.
        low: Lower bound of its interval; NaN where the distance has none.
        high: Upper bound.
        n_a: Pictures in the first set.
        n_b: In the second.
        subset_size: Pictures of each set in a subset; the smaller set's number if all were used.
        subset_std: Spread over the subsets, the figure that papers print after ±; 0 for one subset.
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
    """Whether two sets of pictures could be one set, split at random.

    Attributes:
        value: Their KID.
        p: Share of random splits at least as far apart, counting this one: small if the sets differ.
        threshold: KID that splits at random exceed with a chance of `alpha`; at or below it nothing is shown.
        alpha: Of the threshold.
        permutations: Splits drawn.
    """

    value: float
    p: float
    threshold: float
    alpha: float
    permutations: int

    @property
    def indistinguishable(self) -> bool:
        """No difference was shown with these pictures; that there is none is not thereby proven."""
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
    """Return the kernel distance of two sets of pictures, unbiased, with a bootstrap interval.

    Args:
        features_a: Features of the first set, shape (n_a, D); an array or a tensor on the CPU.
        features_b: Of the second, shape (n_b, D). The sets should not share seeds: pictures of one seed lie nearer
            than those of two, and the estimate comes out too small.
        subsets: Drawn where `subset_size` is given: the value is their mean.
        subset_size: Pictures of each set in a subset; by default one estimate from all pictures, which has the same
            mean and the least spread.
        groups: The prompt of each picture, of both sets, wherever both drew the same prompts: then pictures of one
            prompt are not compared, and the interval draws prompts, in both sets the same.
        confidence: Of the interval, in (0, 1).
        resamples: Bootstrap draws; 0 for no interval.
        seed: Of subsets and draws.

    Raises:
        ValueError: The features are no two matrices of finite numbers of one width with two rows or more, a subset is
            larger than a set, `confidence` lies outside (0, 1), or `groups` do not fit.
    """
    a, b = _rows(features_a, features_b)
    if not 0 < confidence < 1:
        raise ValueError(f"`confidence` must lie between 0 and 1, got {confidence!r}: say 0.95.")
    smaller = min(len(a), len(b))
    size = smaller if subset_size is None else subset_size
    if not 2 <= size <= smaller or subsets < 1 or resamples < 0:
        raise ValueError(
            f"`subset_size` must lie between 2 and the smaller set's {smaller} pictures, `subsets` be at least 1 and "
            f"`resamples` at least 0; got {size}, {subsets} and {resamples}: leave `subset_size` out to use all."
        )
    rng = np.random.default_rng(seed)
    ones = [np.ones((len(a), 1)), np.ones((len(b), 1))]
    parts = [_subsets(rng, len(x), size, subsets) for x in (a, b)] if subset_size else ones
    keys = _keys(groups, len(a), len(b))
    drawn = _draws(rng, len(a), len(b), None if groups is None else keys, resamples)
    weights = [np.hstack(pair) for pair in zip(parts, drawn, strict=True)]
    found = _forms(
        np.concatenate([a, b]),
        np.concatenate([weights[0], np.zeros((len(b), weights[0].shape[1]))]),
        np.concatenate([np.zeros((len(a), weights[1].shape[1])), weights[1]]),
        keys,
    )
    estimates, spread = found[: parts[0].shape[1]], found[parts[0].shape[1] :]
    tail = 50 * (1 - confidence)
    low, high = (
        np.percentile(spread, [tail, 100 - tail]) if resamples else (float("nan"), float("nan"))
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
    """Say whether two sets of pictures differ by more than a random split of their union would.

    To ask whether an edited model still draws as before, give the edited model's pictures and those of the unedited
    model from a *second set of seeds*, with `groups` if both drew the same prompts: if the answer is
    `indistinguishable`, the edit changed no more than other seeds do, as far as so many pictures can tell.

    Args:
        features_a: Features of the first set, shape (n_a, D).
        features_b: Of the second, from other seeds, shape (n_b, D).
        groups: The prompt of each picture, of both sets: then pictures are swapped within a prompt alone.
        permutations: Splits drawn at random.
        alpha: Chance of calling equal sets different.
        seed: Of the splits.

    Raises:
        ValueError: As in `kid`; or `alpha` lies outside (0, 1), or too few `permutations` reach it.
    """
    a, b = _rows(features_a, features_b)
    if not 0 < alpha < 1 or permutations < 1 / alpha:
        raise ValueError(
            f"`alpha` must lie between 0 and 1 and `permutations` be at least 1 / alpha, got {alpha!r} and "
            f"{permutations}: say 0.05 and 1000."
        )
    keys = _keys(groups, len(a), len(b))
    within = keys if groups is not None else np.zeros_like(keys)
    rng = np.random.default_rng(seed)
    first = np.arange(len(keys)) < len(a)
    splits = np.stack([first, *(_shuffled(rng, first, within) for _ in range(permutations))], 1)
    pooled = np.concatenate([a, b])
    found = _forms(pooled, splits.astype(np.float64), (~splits).astype(np.float64), keys)
    slack = 1e-12 * max(
        1.0, float(np.abs(found).max())
    )  # a split equal to this one counts as equal
    p = float(np.mean(found >= found[0] - slack))
    return TwoSample(
        float(found[0]), p, float(np.quantile(found[1:], 1 - alpha)), alpha, permutations
    )


def fid(features_a: Any, features_b: Any) -> Distance:
    r"""Return the Fréchet distance of the normal distributions fitted to two sets of pictures.

    :math:`|\mu_a - \mu_b|^2 + \mathrm{tr}(\Sigma_a + \Sigma_b - 2 (\Sigma_a \Sigma_b)^{1/2})`, covariances with n - 1,
    in float64. The last trace is the sum of the singular values of :math:`R_a R_b^\top`, where :math:`R^\top R =
    \Sigma`: no root of a matrix is taken, which fails where a set has fewer pictures than features.

    It is too large by about as much as the number of pictures is small, so there is no interval and sets of different
    sizes do not compare; below a few thousand pictures take `kid`.

    Args:
        features_a: Features of the first set, shape (n_a, D).
        features_b: Of the second, shape (n_b, D).

    Raises:
        ValueError: As in `kid`.
    """
    a, b = _rows(features_a, features_b)
    apart = a.mean(0) - b.mean(0)
    roots = [np.linalg.qr(x - x.mean(0), mode="r") / np.sqrt(len(x) - 1) for x in (a, b)]
    traces = sum(float((root * root).sum()) for root in roots)
    shared = float(np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum())
    nan = float("nan")
    return Distance(float(apart @ apart) + traces - 2 * shared, nan, nan, len(a), len(b))


def _forms(pooled: Array, a: Array, b: Array, keys: NDArray[Any]) -> Array:
    """Return the module's quadratic form in `a` and `b`, both (n, R) and nowhere both positive, shape (R,)."""
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
    """Return `count` random subsets of `size` of `n`, as columns of 0 and 1, shape (n, count)."""
    ranks = rng.random((n, count)).argsort(0).argsort(0)
    return (ranks < size).astype(np.float64)


def _draws(
    rng: np.random.Generator, n_a: int, n_b: int, keys: NDArray[Any] | None, resamples: int
) -> tuple[Array, Array]:
    """Return how often each picture is drawn in each resample, shapes (n_a, R) and (n_b, R); with `keys` by group."""
    if keys is None:
        a, b = (_usable(rng.multinomial(n, [1 / n] * n, size=resamples).T) for n in (n_a, n_b))
        return a, b
    number = int(keys.max()) + 1
    counts = rng.multinomial(number, [1 / number] * number, size=resamples).T
    for own in (keys[:n_a], keys[n_a:]):  # a draw needs two groups that each set has
        present = np.zeros(number, bool)
        present[own] = True
        counts = np.where((counts[present] > 0).sum(0) < 2, 1, counts)
    drawn = counts[keys].astype(np.float64)
    return drawn[:n_a], drawn[n_a:]


def _usable(counts: NDArray[Any]) -> Array:
    """Return counts as weights; a draw of a single picture, which has no pair, becomes one of all."""
    alone = (counts > 0).sum(0) < 2
    return np.where(alone, 1, counts).astype(np.float64)


def _shuffled(
    rng: np.random.Generator, first: NDArray[np.bool_], keys: NDArray[Any]
) -> NDArray[np.bool_]:
    """Return `first` shuffled among the rows of each key."""
    here = np.argsort(keys, kind="stable")
    there = np.lexsort((rng.random(len(keys)), keys))
    mixed = np.empty_like(first)
    mixed[here] = first[there]
    return mixed


def _keys(groups: Groups | None, n_a: int, n_b: int) -> NDArray[Any]:
    """Return the number of each picture's group, those of the first set before those of the second."""
    if groups is None:
        return np.arange(n_a + n_b)
    if len(groups) != 2 or (len(groups[0]), len(groups[1])) != (n_a, n_b):
        raise ValueError(
            f"`groups` must name the prompt of each picture, of {n_a} and of {n_b}, got "
            f"{', '.join(str(len(g)) for g in groups)}: give one list for each set."
        )
    if min(len(set(names)) for names in groups) < 2:
        raise ValueError(
            "`groups` must name at least two prompts in each set, for pictures of one are not compared: draw more "
            "prompts, or leave `groups` out."
        )
    place = {key: i for i, key in enumerate(dict.fromkeys([*groups[0], *groups[1]]))}
    return np.array([place[key] for key in (*groups[0], *groups[1])])


def _rows(features_a: Any, features_b: Any) -> tuple[Array, Array]:
    a, b = np.asarray(features_a, np.float64), np.asarray(features_b, np.float64)
    fits = a.ndim == b.ndim == 2 and a.shape[1] == b.shape[1] and min(len(a), len(b)) >= 2
    if not fits or not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError(
            "features must be two matrices of finite numbers of one width, two rows or more each, got shapes "
            f"{a.shape} and {b.shape}: give one row a picture, from one extractor."
        )
    return a, b
