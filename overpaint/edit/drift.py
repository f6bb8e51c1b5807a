r"""Measures of an edit: how far text features move, how far a weight moves, and how far an edited concept moves.

`feature_drift` compares text features :math:`E` before and :math:`E'` after an edit. `weight_drift` is the norm of a
movement :math:`\Delta` of a weight. Each is divided by a reference, `relative_to`. `concept_movement` is no side effect
but the effect itself. The reported values are:

================================  ==================  ==============================================
report                            function            `relative_to`
================================  ==================  ==============================================
`empty_drift` of an evaluation    `feature_drift`     the features of the empty prompt
side effects in the studio        `feature_drift` ²   the movement of the erased concepts' captions
the empty prompt in the studio    `feature_drift`     the features of the empty prompt
`drift.json` of a report          `feature_drift`     the distance of the prompts from the empty prompt
`drift` in a layer scan           `feature_drift` ²   the distance between old and new captions
`preserve_drift`,                 `weight_drift`      the outputs of the old weight at the same inputs
`empty_prompt_drift`
`drift` in the report of `auto`   `weight_drift` ²    the residuals of the edited concepts
`relative_delta_norm`             `weight_drift`      the old weight
`concept_movement`                `concept_movement`  the requested movement of each edited concept
================================  ==================  ==============================================

Those marked ² are reported as squares: shares of the squared movement.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["concept_movement", "feature_drift", "weight_drift"]


def feature_drift(before: Tensor, after: Tensor, *, relative_to: Tensor | float = 1.0) -> float:
    r"""Return how far the text features of some prompts move, :math:`\sqrt{\mathrm{mean}_p \|E'(p) - E(p)\|^2}`.

    Args:
        before: Text features of N prompts without the edit, :math:`E`, shape (N, L, D).
        after: Text features of the same prompts with the edit, :math:`E'`, shape (N, L, D).
        relative_to: The reference: features or differences of features, shape (M, L, D), of which the root mean square
            over prompts is taken, or that number itself.

    Returns:
        The movement divided by the reference; 0 if the reference is 0.
    """
    moved = _root_mean_square(after.double() - before.double())
    reference = _root_mean_square(relative_to) if isinstance(relative_to, Tensor) else relative_to
    return moved / reference if reference else 0.0


def weight_drift(
    delta: Tensor,
    *,
    inputs: Tensor | None = None,
    gram: Tensor | None = None,
    relative_to: Tensor | float = 1.0,
) -> float:
    r"""Return the norm of a movement of a weight: :math:`\|\Delta\|_F`, or :math:`\|X \Delta^\top\|_F` at inputs.

    Args:
        delta: The movement :math:`\Delta`, shape (D_out, D_in).
        inputs: Inputs :math:`X` of the weight, shape (N, D_in): measure the movement of its outputs.
        gram: :math:`X^\top X` instead of `inputs`, shape (D_in, D_in), where only the sums are in memory.
        relative_to: The reference: a weight, shape (D_out, D_in), measured like `delta`, or a norm.

    Returns:
        The norm divided by the reference; 0 if the reference is 0.
    """
    is_weight = isinstance(relative_to, Tensor)
    reference = _norm(relative_to, inputs, gram) if is_weight else relative_to
    return _norm(delta, inputs, gram) / reference if reference else 0.0


def concept_movement(
    moved: Tensor, requested: Tensor, owners: Sequence[int], concepts: Sequence[str]
) -> dict[str, float]:
    r"""Return how far the outputs of each edited concept move, as a share of the way to its replacement.

    With the movements :math:`m_k` of a concept's outputs and the requested ones :math:`r_k`, over the concept's keys
    and all weights, it is :math:`\sqrt{\sum_k \|m_k\|^2 / \sum_k \|r_k\|^2}`. It is 1 where the outputs move as far as
    those of the replacement are, in whatever direction, and 0 where the edit has no effect on its own concept.

    Args:
        moved: :math:`\|m_k\|^2` of N keys, shape (N,).
        requested: :math:`\|r_k\|^2` of the same keys, shape (N,).
        owners: For each key, the index of its concept.
        concepts: Names of the concepts.

    Returns:
        A share for each concept; without the concepts of which no movement was requested.
    """
    index = torch.tensor(owners, dtype=torch.long)
    sums = torch.zeros(2, len(concepts), dtype=torch.float64)
    sums.index_add_(1, index, torch.stack([moved.double(), requested.double()]))
    shares = (sums[0] / sums[1].clamp(min=1e-300)).sqrt().tolist()
    return {c: s for c, s, whole in zip(concepts, shares, sums[1].tolist(), strict=True) if whole}


def _root_mean_square(features: Tensor) -> float:
    return float(features.double().flatten(1).square().sum(1).mean().sqrt())


def _norm(weight: Tensor, inputs: Tensor | None, gram: Tensor | None) -> float:
    if inputs is not None:
        return float((inputs @ weight.T).norm())
    if gram is not None:
        return max(float((weight @ gram * weight).sum()), 0.0) ** 0.5
    return float(torch.linalg.norm(weight))
