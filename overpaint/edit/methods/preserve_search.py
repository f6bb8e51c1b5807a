r"""Choose the background weight, the ridge and the preserve list of an automatic edit, from sums over keys alone.

The drift of a concept needs no pictures: :math:`\|\Delta H\|^2` over the layer's inputs :math:`H` in
captions of the concept, relative to the target movement of the edit. All functions work on sums, so that one solve is
D_in x D_in and memory does not grow with the captions.

Source: ours; the objective is that of `least_squares`, the preserve terms are those of Gandikota et al., 2024 (UCE),
https://arxiv.org/abs/2308.14761.
Deviations: none, the method is ours.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from overpaint.edit.caption_sums import Sums
from overpaint.edit.drift import weight_drift
from overpaint.edit.least_squares import product

__all__ = [
    "RIDGES",
    "WEIGHTS",
    "Preserved",
    "background_scan",
    "best_row",
    "mean_energy",
    "mean_missed",
    "merit",
    "preserve_concepts",
    "squared_drift",
]

WEIGHTS = (0.5, 1.5, 5.0, 15.0, 50.0, 150.0, 500.0)
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1)
_ROUNDS = 5
_DRIFT_COST = 10.0  # weight of background drift against missed target movement


@dataclass(frozen=True, eq=False)
class Preserved:
    """Result of `preserve_concepts`.

    Attributes:
        weights: Weight of each concept; 0 if it needs no preserve term.
        before: Squared drift of each concept without the preserve terms.
        after: Squared drift of each concept with the preserve terms.
        gram: Sum of all preserve terms, shape (D_in, D_in).
    """

    weights: list[float]
    before: list[float]
    after: list[float]
    gram: Tensor


def squared_drift(delta: Tensor, gram: Tensor, energy: float) -> float:
    """Return the squared movement by `delta` at inputs with `gram`, relative to `energy`; 0 if `energy` is 0."""
    return weight_drift(delta, gram=gram, relative_to=energy**0.5) ** 2


def mean_energy(sums: Sequence[Sums]) -> float:
    """Return the mean squared norm of the residuals of some concepts: the target movement."""
    return sum(s.energy for s in sums) / len(sums)


def mean_missed(sums: Sequence[Sums], delta: Tensor) -> float:
    """Return the mean share of the target movement of some concepts that `delta` misses."""
    return sum(s.missed(delta) for s in sums) / len(sums)


def background_scan(
    fitted: Sequence[Sums],
    test_sums: Sequence[Sums],
    background: Tensor,
    test_gram: Tensor,
    *,
    preserve_weight: float | str,
    ridge: float | str,
) -> list[dict[str, float]]:
    """Return missed target movement and background drift for each weight of the background and each ridge.

    Args:
        fitted: Sums of each concept, to fit.
        test_sums: Sums of each concept in captions that are not fitted, to measure the missed movement.
        background: Mean Gram matrix of captions that should not move, to fit.
        test_gram: Mean Gram matrix of captions that are not fitted, to measure the drift.
        preserve_weight: The only weight, or `"auto"` for all `WEIGHTS`.
        ridge: The only ridge, or `"auto"` for all `RIDGES`.

    Returns:
        Rows with `preserve_weight`, `ridge`, `missed` and `drift`.
    """
    energy = mean_energy(test_sums)
    rows: list[dict[str, float]] = []
    for pull in RIDGES if isinstance(ridge, str) else (float(ridge),):
        for weight in WEIGHTS if isinstance(preserve_weight, str) else (float(preserve_weight),):
            delta = _solve(fitted, weight * background, pull)
            missed, drift = mean_missed(test_sums, delta), squared_drift(delta, test_gram, energy)
            rows.append(
                {"preserve_weight": weight, "ridge": pull, "missed": missed, "drift": drift}
            )
    return rows


def best_row(scan: Sequence[Mapping[str, float]]) -> tuple[float, float]:
    """Return the preserve weight and the ridge of the row with the largest merit."""
    best = max(scan, key=merit)
    return best["preserve_weight"], best["ridge"]


def merit(row: Mapping[str, float]) -> float:
    """Return the harmonic mean of the share of target movement reached and of one minus the weighted drift."""
    reached, preserved = max(0.0, 1 - row["missed"]), max(0.0, 1 - _DRIFT_COST * row["drift"])
    return 2 * reached * preserved / max(reached + preserved, 1e-9)


def preserve_concepts(
    fitted: Sequence[Sums],
    test_sums: Sequence[Sums],
    gram: Tensor,
    concepts: Sequence[Tensor],
    *,
    ridge: float,
    bound: float,
    allowance: float,
) -> Preserved:
    """Return preserve weights for the concepts that drift by more than `bound`; each round multiplies them by four.

    The search ends when all drifts are within `bound`, after a fixed number of rounds, or if the next round would
    increase the missed target movement by more than `allowance`.

    Args:
        fitted: Sums of each edited concept, to fit.
        test_sums: Sums of each edited concept in captions that are not fitted, to measure.
        gram: Gram matrix of the background, with its weight.
        concepts: Mean Gram matrix of each concept that may drift.
        ridge: Pull towards the old weight.
        bound: Largest squared drift of a concept, relative to the target movement.
        allowance: Share of the target movement that may be missed in addition.
    """
    energy, weights = mean_energy(fitted), [0.0] * len(concepts)
    delta = _solve(fitted, gram, ridge)
    limit = mean_missed(test_sums, delta) + allowance
    before = after = _drifts(delta, concepts, energy)
    for _ in range(_ROUNDS):
        added = [
            (3 * w or 1.0) if drift > bound else 0.0
            for w, drift in zip(weights, after, strict=True)
        ]
        if not any(added):
            break
        heavier = gram + sum(
            (w * g for w, g in zip(added, concepts, strict=True) if w), torch.zeros_like(gram)
        )
        delta = _solve(fitted, heavier, ridge)
        if mean_missed(test_sums, delta) > limit:
            break
        gram, weights = heavier, [w + more for w, more in zip(weights, added, strict=True)]
        after = _drifts(delta, concepts, energy)
    return Preserved(weights, before, after, gram)


def _drifts(delta: Tensor, grams: Sequence[Tensor], energy: float) -> list[float]:
    """Return `squared_drift` for each Gram matrix, from one product: the trace of Delta^T Delta G."""
    square = product(delta)
    return [max(float((square * g).sum()), 0.0) / energy if energy else 0.0 for g in grams]


def _solve(fitted: Sequence[Sums], gram: Tensor, ridge: float) -> Tensor:
    """Return the movement of the weight, shape (D_out, D_in), float64."""
    prior = gram + ridge * torch.eye(len(gram), dtype=torch.float64)
    system = sum((s.gram for s in fitted), prior)
    cross = sum((s.cross for s in fitted), torch.zeros_like(fitted[0].cross))
    return torch.linalg.solve(system, cross.T).T
