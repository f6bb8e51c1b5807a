"""Shares of words that were read, by engine, set, length and method, with intervals over families of fonts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scene_text_crops import Crop
from scene_text_sets import SETS

from overpaint.metrics import Interval, bootstrap, paired_share, share
from overpaint.scorers.text_reader import similarity

__all__ = [
    "Scores", "difference", "gap", "median", "scores", "several", "wrong_words",
]  # fmt: skip

MEASURED = range(2, 9)  # lengths that the figures count


@dataclass(frozen=True)
class Scores:
    """What was read in lines: a value for each, and the family of its font.

    Attributes:
        exact: 1 if the word was read, with its case.
        any_case: 1 if it was read but for its case.
        similarity: 1 - NED in lower case.
        families: Families of the fonts.
        lengths: Numbers of characters.
    """

    exact: np.ndarray
    any_case: np.ndarray
    similarity: np.ndarray
    families: tuple[str, ...]
    lengths: np.ndarray

    def only(self, lengths: Sequence[int]) -> "Scores":
        """Return the scores of words of some lengths."""
        rows = np.flatnonzero(np.isin(self.lengths, list(lengths)))
        return Scores(
            self.exact[rows], self.any_case[rows], self.similarity[rows], tuple(self.families[i] for i in rows),
            self.lengths[rows],
        )  # fmt: skip

    def cells(self, prefix: str) -> dict[str, Interval]:
        """Return the three means of the table of words with their intervals."""
        return {
            f"{prefix} words": share(self.exact, groups=self.families),
            f"{prefix} words, any case": share(self.any_case, groups=self.families),
            f"{prefix} 1 - NED": share(self.similarity, groups=self.families),
        }

    def __add__(self, other: "Scores") -> "Scores":
        return Scores(
            np.append(self.exact, other.exact), np.append(self.any_case, other.any_case),
            np.append(self.similarity, other.similarity), self.families + other.families,
            np.append(self.lengths, other.lengths),
        )  # fmt: skip


def scores(texts: Sequence[str], drawn: Sequence[Crop], families: Mapping[str, str]) -> Scores:
    """Return the scores of readings.

    Args:
        texts: What was read.
        drawn: Pictures of the cases.
        families: Family of each face.
    """
    words = [one.case.text for one in drawn]
    pairs = list(zip(texts, words, strict=True))
    return Scores(
        np.array([float(a == b) for a, b in pairs]),
        np.array([float(a.lower() == b.lower()) for a, b in pairs]),
        np.array([similarity(a.lower(), b.lower()) for a, b in pairs]),
        tuple(families[one.case.font] for one in drawn),
        np.array([len(word) for word in words]),
    )


def wrong_words(texts: Sequence[str], words: Sequence[str]) -> list[float]:
    """Return for each reading 1 if it is the next other word of its length instead, ignoring case, or 0.

    Words without another one of their length are left out.
    """
    lower = [word.lower() for word in words]
    values = []
    for i, text in enumerate(texts):
        later = [*lower[i + 1 :], *lower[:i]]
        others = [w for w in later if len(w) == len(lower[i]) and w != lower[i]]
        if others:
            values.append(float(text.lower() == others[0]))
    return values


def difference(method: Sequence[Scores], other: Sequence[Scores]) -> Interval:
    """Return the share of words read, any case, of one method minus that of another on the same pictures."""
    after, before = (sum(parts[1:], parts[0]) for parts in (method, other))
    return paired_share(before.any_case, after.any_case, groups=after.families)


def gap(first: Scores, second: Scores, *, resamples: int = 2000, seed: int = 0) -> Interval:
    """Return the share of words read, any case, in `second` minus that in `first`, which are other pictures.

    The interval is a bootstrap that draws families of fonts in each of them; where all families of both are equal, it
    is that of the difference of the bounds of `share`.
    """
    rng = np.random.default_rng(seed)
    draws = [_means(s.any_case, s.families, rng, resamples) for s in (first, second)]
    mean = float(second.any_case.mean() - first.any_case.mean())
    low, high = np.percentile(draws[1] - draws[0], [2.5, 97.5])
    if low == high:
        bounds = [share(s.any_case, groups=s.families) for s in (first, second)]
        low, high = bounds[1].low - bounds[0].high, bounds[1].high - bounds[0].low
    return Interval(mean, float(low), float(high), len(first.any_case) + len(second.any_case))


def median(values: Sequence[float], *, resamples: int = 2000, seed: int = 0) -> Interval:
    """Return the median of values in place of the mean, and its bootstrap interval."""
    numbers = np.asarray(values, float)
    if not numbers.size:
        return bootstrap([])
    rng = np.random.default_rng(seed)
    draws = np.median(numbers[rng.integers(len(numbers), size=(resamples, len(numbers)))], axis=1)
    low, high = np.percentile(draws, [2.5, 97.5])
    return Interval(float(np.median(numbers)), float(low), float(high), len(numbers))


def several(samples: Sequence[Scores]) -> dict[str, Interval]:
    """Return the share of words read, any case, in one sample, in any and in all of several of the same pictures."""
    values = np.stack([s.any_case for s in samples])
    groups = samples[0].families
    return {
        "one": share(values[0], groups=groups),
        f"any of {len(values)}": share(values.max(0), groups=groups),
        f"all of {len(values)}": share(values.min(0), groups=groups),
    }


def by_length(
    read: Callable[[str, str], Scores], methods: Mapping[str, str], names: Sequence[str]
) -> list[dict[str, Any]]:
    """Return a row for each length: the share of words read, any case, by method and by seen and unseen words.

    Args:
        read: Returns the scores of a method on a set.
        methods: Label of each method.
        names: Sets.
    """
    rows = []
    for length in range(1, 9):
        row: dict[str, Any] = {"length": length}
        for method, label in methods.items():
            for kind, is_unseen in (("seen", False), ("unseen", True)):
                parts = [read(method, n) for n in names if SETS[n].unseen_words == is_unseen]
                if parts:
                    one = sum(parts[1:], parts[0]).only([length])
                    row[f"{label}, {kind} words"] = share(one.any_case, groups=one.families)
        rows.append(row)
    return rows


def _means(
    values: np.ndarray, groups: Sequence[str], rng: np.random.Generator, resamples: int
) -> np.ndarray:
    keys = {key: i for i, key in enumerate(dict.fromkeys(groups))}
    index = [keys[group] for group in groups]
    sums, counts = np.bincount(index, weights=values), np.bincount(index)
    drawn = rng.integers(len(sums), size=(resamples, len(sums)))
    return sums[drawn].sum(1) / counts[drawn].sum(1)
