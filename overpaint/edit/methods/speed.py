r"""SPEED: edit values in the null space of the concepts that an erasure would move most.

For each weight :math:`W` of the values, with the keys :math:`C_1` of the old concepts and their targets :math:`W C_*`:

1. Filter. The weight is edited without constraints, and of the preserve list those keys :math:`c` remain whose outputs
   :math:`\|\Delta c\|` move more than the mean.
2. Augmentation. Ten copies :math:`c + \epsilon v` of each, with :math:`\epsilon \sim N(0, 1)` and the right singular
   vector :math:`v` of the smallest singular value of :math:`W`; those that would move more than their mean are added.
3. Constraints. The outputs of begin-of-text and of the empty prompt, :math:`C_2`, do not move.

With all remaining keys :math:`C_0`, the edit is

.. math:: \min_\Delta \|\Delta C_1 - W (C_* - C_1)\|^2 + \lambda \|\Delta\|^2, \quad
          \Delta C_2 = 0, \quad \Delta u = 0 \text{ for } C_0 C_0^\top u = s u,\ s \ge s_0 .

Both constraints hold in the complement of the span of these :math:`u` and :math:`C_2`, where it is the problem of
`null_space`; the paper's formula with Lagrange multipliers gives the same movement.

Source: Li et al., 2026, https://arxiv.org/abs/2503.07392.
Deviations: the authors' code was not read. All tokens of the empty prompt are constraints, unless `empty_tokens` says
otherwise. Singular vectors are those of the smaller side of :math:`W`.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from overpaint.edit.change import Change
from overpaint.edit.least_squares import Factors, factorise
from overpaint.edit.methods.cross_attention import (
    Layer,
    check_weight,
    projection_sites,
    solve_projections,
)
from overpaint.edit.methods.text_keys import FeatureEdit, Keys, feature_edit, read_features
from overpaint.edit.methods.uce import OBJECTS
from overpaint.edit.movement import Movement
from overpaint.edit.null_space import span
from overpaint.edit.weights import find_weights
from overpaint.errors import check_seed, later_seed
from overpaint.model import TextToImage

__all__ = ["Held", "Refinement", "held_directions", "held_keys", "speed"]


def speed(
    model: TextToImage,
    pairs: Mapping[str, str],
    *,
    preserve: Sequence[str] = (),
    influence_filter: bool = True,
    copies: int = 10,
    null_below: float = 0.1,
    empty_tokens: int | None = None,
    ridge: float = 1.0,
    keys: Keys = "last",
    frames: Sequence[str] = OBJECTS,
    layers: Sequence[Layer] | None = None,
    seed: int = 0,
) -> Change:
    """Return the change of the values that erases concepts in the null space of the preserved concepts most affected.

    The model is not modified.

    Args:
        model: The model to edit.
        pairs: Old concept to new; `""` erases a concept: it is mapped to the token before its place, begin-of-text
            where the frame is empty.
        preserve: Concepts whose outputs should not change, at the tokens that `keys` names, hundreds of them; each
            weight holds those that the erasure alone would move more than the mean.
        influence_filter: `False` holds all of them, and all copies.
        copies: Number of copies of each held key; 0 leaves the augmentation out.
        null_below: Directions whose eigenvalue in the sum of c c^T over held keys and copies is below this are free to
            move. The paper's values are 0.1 for few concepts and 0.0001 for many.
        empty_tokens: Number of tokens of the empty prompt, from begin-of-text on, whose outputs do not change; all if
            `None`. Begin-of-text is the first token of every prompt.
        ridge: Pull towards the old weights, in units of a key's squared norm. Positive.
        keys: As in `uce`.
        frames: Captions around the concept: a prefix, or a text in which `{}` is replaced.
        layers: Cross-attention layers, all if `None`.
        seed: Seed of the copies.

    Returns:
        The change of `to_v` in all layers. It cannot be added to another one, because its constraints depend on all its
        concepts.

    Raises:
        ValueError: A concept is empty, cut off or equals its target, two pairs contradict one another, a preserved
            concept is edited, the constraints leave no direction for a concept, or a number is out of range.
        TypeError: A list of texts is one text.
        UnknownSite: The UNet has no such layer.
    """
    seed = check_seed(seed)
    _check_numbers(copies, null_below, empty_tokens)
    sites = projection_sites(model, layers, ("v",))
    edit = feature_edit(model, pairs, preserve, frames=frames, keys=keys)
    empty = read_features(model, [""])[""][:empty_tokens]
    refinement = Refinement(
        edit, factorise(edit.keys, ridge=ridge, method="auto"), span(empty), influence_filter, copies, null_below
    )  # fmt: skip
    held: list[Held] = []
    for place, weight in enumerate(find_weights(model, sites)):
        matrix = weight.parameter.detach().to("cpu", torch.float64)
        check_weight(weight.site, matrix, edit.keys.shape[1])
        held.append(held_directions(refinement, matrix, seed=later_seed(seed, place)))
    protocol = {
        "method": "speed", "pairs": dict(pairs), "preserve": list(preserve), "influence_filter": influence_filter,
        "copies": copies, "null_below": null_below, "empty_tokens": empty_tokens, "keys": keys,
        "frames": list(frames), "seed": seed,
    }  # fmt: skip
    change = solve_projections(
        model, sites, edit, ridge=ridge, basis=[one.basis for one in held], protocol=protocol
    )
    counts = {
        "held_keys": [one.keys for one in held],
        "held_directions": [one.basis.shape[1] for one in held],
    }
    report = {**change.report, **counts}
    movements = tuple(_unsolvable(m) for m in change.movements)
    return dataclasses.replace(change, movements=movements, report=report)


@dataclass(frozen=True, eq=False)
class Refinement:
    """Arguments of the refinement of the preserve list, the same for all weights.

    Attributes:
        edit: The edit, with the whole preserve list.
        factors: Factors of the edit's keys, for the edit without constraints.
        equal: An orthonormal basis (D, R) of features whose outputs do not change.
        influence_filter: As in `speed`.
        copies: As in `speed`.
        null_below: As in `speed`.
    """

    edit: FeatureEdit
    factors: Factors
    equal: Tensor
    influence_filter: bool
    copies: int
    null_below: float


@dataclass(frozen=True, eq=False)
class Held:
    """Directions that one weight holds.

    Attributes:
        keys: Number of keys, with copies.
        basis: Orthonormal basis (D, R) of the directions that do not change.
    """

    keys: int
    basis: Tensor


def held_directions(refinement: Refinement, weight: Tensor, *, seed: int) -> Held:
    """Return the directions that `weight` (D_out, D), float64, must not change; `seed` is that of the copies."""
    rows = held_keys(refinement, weight, seed=seed)
    strong = span(rows, least=math.sqrt(refinement.null_below), beside=refinement.equal)
    return Held(len(rows), torch.cat([refinement.equal, strong], 1))


def held_keys(refinement: Refinement, weight: Tensor, *, seed: int) -> Tensor:
    """Return the preserved keys that a weight holds, filtered and augmented, shape (M, D), float64."""
    edit, copies = refinement.edit, refinement.copies
    residuals = (edit.sources.double() - edit.keys.double()) @ weight.T
    erasure = refinement.factors.solve(residuals)

    def affected(rows: Tensor) -> Tensor:
        """Return the rows whose outputs the erasure changes more than the mean; all without the filter."""
        if not refinement.influence_filter or not len(rows):
            return rows
        moved = (rows @ erasure.right.T @ erasure.left.T).norm(dim=1)
        return rows[moved > moved.mean()]

    rows = affected(edit.preserve.double())
    if not copies or not len(rows):
        return rows
    least = torch.linalg.svd(weight, full_matrices=False).Vh[-1]
    least = least * least[least.abs().argmax()].sign()  # a singular vector has no sign
    generator = Generator().manual_seed(seed)
    sizes = torch.randn(len(rows), copies, 1, generator=generator, dtype=torch.float64)
    return torch.cat([rows, affected((rows[:, None] + sizes * least).flatten(0, 1))])


def _unsolvable(movement: Movement) -> Movement:
    """Return a movement without the data to solve it again: with other concepts, its constraints would be others."""
    keys, residuals = movement.keys[:0], movement.residuals[:0]
    return dataclasses.replace(movement, keys=keys, residual_data=residuals, owners=())


def _check_numbers(copies: int, null_below: float, empty_tokens: int | None) -> None:
    if copies < 0:
        raise ValueError(
            f"`copies` must be 0 or more, got {copies!r}. Leave it out for the paper's 10."
        )
    if not (math.isfinite(null_below) and null_below >= 0):
        raise ValueError(
            f"`null_below` must be 0 or more and finite, got {null_below!r}. Leave it out for 0.1."
        )
    if empty_tokens is not None and empty_tokens < 1:
        raise ValueError(
            f"`empty_tokens` must be 1 or more, got {empty_tokens!r}. Leave it out to hold the whole empty prompt."
        )
