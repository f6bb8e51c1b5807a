r"""Exact preservation: keys without their part in the span of preserved inputs, so that those outputs do not move.

Let :math:`Q` be an orthonormal basis of the span of the preserved inputs :math:`P`. A ridge problem that is solved from
the keys :math:`k' = (I - Q Q^\top) k` with the residuals of :math:`k` moves the weight by
:math:`\Delta = R^\top (\lambda I + K' K'^\top)^{-1} K'`, whose rows are orthogonal to :math:`Q`, so
:math:`\Delta P^\top = 0`. It is the limit of a growing preserve weight. If only the :math:`r` largest directions of
:math:`P` are preserved, an output moves by at most :math:`\|\Delta\| \sigma_{r+1}(P)`.

Source: Zhang et al., 2026 (Double Projections), https://arxiv.org/abs/2604.10032.
Deviations: the paper's code was not read. A direction counts as zero below a millionth of the largest singular value,
since the inputs are float32.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

__all__ = ["EXACT", "PreserveWeight", "check_room", "outside", "span"]

EXACT: Literal["exact"] = "exact"  # in place of a preserve weight
PreserveWeight = float | Literal["exact"]
_TOLERANCE = 1e-6  # rounding of float32 inputs
_ROWS = 4096


def span(
    rows: Tensor,
    *,
    rank: int | None = None,
    least: float = 0.0,
    beside: Tensor | None = None,
) -> Tensor:
    """Return an orthonormal basis of the span of `rows`, largest directions first, shape (D, R), float64.

    Args:
        rows: Shape (M, D); M may be 0.
        rank: Largest number of directions; all if `None`.
        least: Directions whose singular value is below this are left out, as are those below a millionth of the
            largest.
        beside: An orthonormal basis (D, B). The result is orthogonal to it, and both together span `rows`.
    """
    triangle = torch.zeros(0, rows.shape[1], dtype=torch.float64)
    for block in rows.detach().cpu().split(_ROWS):
        triangle = torch.linalg.qr(torch.cat([triangle, block.double()]), mode="r").R
    if not len(triangle):
        return triangle.T
    least = max(least, _TOLERANCE * float(torch.linalg.matrix_norm(triangle, 2)))
    if beside is not None:
        triangle = outside(triangle, beside)
    _, sizes, directions = torch.linalg.svd(triangle, full_matrices=False)
    directions = directions[sizes > least][:rank]
    if beside is not None and len(directions):
        directions = torch.linalg.qr(outside(directions, beside).T).Q.T  # for rounding errors
    return directions.T


def outside(rows: Tensor, basis: Tensor) -> Tensor:
    """Return `rows` (N, D) without their part in the span of the orthonormal `basis` (D, R), float64."""
    rest = rows.detach().cpu().double()
    for _ in range(2):  # the second pass removes the rounding errors of the first
        rest = rest - rest @ basis @ basis.T
    return rest


def check_room(keys: Tensor, rest: Tensor, owners: Sequence[int], concepts: Sequence[str]) -> None:
    """Raise if the preserved inputs span all keys of a concept, so that it cannot be edited.

    Args:
        keys: The keys, shape (N, D).
        rest: Their part outside the span of the preserved inputs, shape (N, D).
        owners: For each key, the index of its concept.
        concepts: The concepts.

    Raises:
        ValueError: Nothing is left of the keys of a concept.
    """
    if not len(keys):
        return
    room = rest.norm(dim=1) > 10 * _TOLERANCE * keys.double().norm(dim=1)
    free = {owner for owner, is_free in zip(owners, room.tolist(), strict=True) if is_free}
    for owner in sorted(set(owners) - free):
        raise ValueError(
            f"the preserved prompts leave no direction of {keys.shape[1]} in which {concepts[owner]!r} could be "
            "edited: preserve fewer prompts or fewer of their directions, or with a `preserve_weight` that is a number."
        )
