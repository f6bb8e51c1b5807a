r"""Reduce a change to kilobytes: factors of a given rank, and a few keys whose solution is the same movement.

The movement :math:`\Delta` is cut to its largest singular directions in the metric of the least-squares problem,
:math:`H = \lambda I + a P^\top P + K^\top K`: cutting :math:`\Delta H^{1/2}` increases the objective least.

A solution fulfils :math:`\Delta A = \alpha^\top K` with :math:`A = \lambda I + a P^\top P` and the remaining
residuals :math:`\alpha = R - K \Delta^\top`. So the cut movement is the solution for any keys whose span contains the
rows of :math:`\Delta A`, if the residual of each key is its output under the cut movement plus the matching
:math:`\alpha`. The directions of that span are divided among the concepts. On its directions, the new keys of a
concept have the same Gram matrix as its old keys. A few more keys hold the largest directions of the old keys outside
the span, so that changes of other concepts do not move them. The solution for these keys, alone or with other changes,
is the cut movement.

Two simpler methods fail. The first keeps the largest singular directions of the keys, which preserves :math:`K^\top K`
and :math:`R^\top K` best. These directions are common to all captions, but nearly all of the movement is in other
directions. The second cuts the movement of each concept alone; it fails because these movements are large and cancel.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from overpaint.edit.movement import Contents, Movement
from overpaint.edit.null_space import EXACT
from overpaint.edit.weights import is_embedding

__all__ = ["compact"]

_DTYPES = (torch.float16, torch.float32, torch.float64)


def compact(change: Contents, *, rank: int = 16, dtype: torch.dtype = torch.float16) -> Contents:
    """Return `change` with factors of at most `rank` and about 1.5 times as many keys, rounded to `dtype`.

    Args:
        change: The whole change.
        rank: Number of directions that remain of each weight, for all its concepts together. About 16 for one concept,
            8 for each of many. Rows of the token embedding all remain.
        dtype: `torch.float16`, or `torch.float32` or `torch.float64` for smaller rounding errors.

    Returns:
        A new change with another digest. Its report has the distance of its movement from the whole one, relative, in
        the Frobenius norm over all weights (`compact_error`), and the residuals that remain at the keys of the whole
        change, relative to its residuals: of the compact movement (`compact_residual`) and of the whole one
        (`compact_residual_before`). `concept_movement` is that of the compact movement.

    Raises:
        ValueError: `rank` is below 1, `dtype` is another one or its range is too small, or the change lacks its
            preserve terms.
    """
    if rank < 1:
        raise ValueError(f"`rank` must be 1 or more, got {rank!r}. 16 is the usual choice.")
    if dtype not in _DTYPES:
        raise ValueError(
            f"`dtype` must be torch.float16, torch.float32 or torch.float64, got {dtype!r}."
        )
    weight = change.protocol.get("preserve_weight")
    named = change.protocol.get("preserve") and weight and weight != EXACT
    preserves, repaired = named or change.protocol.get("terms"), change.protocol.get("repair")
    solved = [m for m in change.movements if not is_embedding(m.site)]
    if preserves and any(m.gram is None and (repaired or len(m.keys)) for m in solved):
        raise ValueError(
            "this change preserves prompts but lacks their terms, which are saved only with `gram=True`: use "
            "`edit.complete(model, change)` first."
        )
    movements = tuple(_cut(m, rank, dtype, change.ridge_at(m.site)) for m in change.movements)
    return Contents(movements, change.protocol, {**change.report, **_losses(change, movements)})


def _losses(change: Contents, movements: tuple[Movement, ...]) -> dict[str, Any]:
    """Return the rank of the cut movements, and their errors against those of `change`."""
    pairs = list(zip(change.movements, movements, strict=True))
    lost = torch.stack([_distance(a, b) for a, b in pairs]).norm()
    whole = torch.stack([_distance(a, None) for a, _ in pairs]).norm()
    residuals = torch.stack([a.residuals.double().norm() for a, _ in pairs]).norm()
    report: dict[str, Any] = {
        "rank": max(m.left.shape[1] for m in movements),
        "compact_error": float(lost / whole) if float(whole) else 0.0,
    }
    if isinstance(shares := change.report.get("concept_movement"), Mapping):
        report["concept_movement"] = _concept_movement(shares, list(change.pairs), pairs)
    if float(residuals):
        missed = torch.tensor([[_missed(a, a), _missed(a, b)] for a, b in pairs])
        before, after = (missed.norm(dim=0) / residuals).tolist()
        report |= {"compact_residual_before": before, "compact_residual": after}
    return report


def _concept_movement(
    shares: Mapping[str, Any], concepts: Sequence[str], pairs: Sequence[tuple[Movement, Movement]]
) -> dict[str, Any]:
    """Return the `concept_movement` of a report times the part of it that the cut movements keep at the keys."""
    squares = torch.zeros(2, len(concepts), dtype=torch.float64)
    for whole, cut in pairs:
        if len(whole.keys):
            norms = [
                (whole.keys.double() @ m.right.double().T @ m.left.double().T).square().sum(1)
                for m in (whole, cut)
            ]
            squares.index_add_(1, torch.tensor(whole.owners), torch.stack(norms))
    parts = dict(zip(concepts, zip(*squares.tolist(), strict=True), strict=True))
    ratios = {old: (cut / whole) ** 0.5 for old, (whole, cut) in parts.items() if whole}
    return {
        old: share * ratios.get(old, 1.0) if isinstance(share, int | float) else share
        for old, share in shares.items()
    }


def _missed(whole: Movement, cut: Movement) -> float:
    """Return the norm of the residuals of `whole` that remain at its keys under the movement `cut`."""
    outputs = whole.keys.double() @ cut.right.double().T @ cut.left.double().T
    return float((whole.residuals.double() - outputs).norm())


def _cut(movement: Movement, rank: int, dtype: torch.dtype, ridge: float | None) -> Movement:
    """Return one movement, cut and rounded, with keys and residuals whose solution it is."""
    if is_embedding(movement.site):  # one row for each token: none can be left out
        left, right = movement.left.to(dtype), movement.right.to(dtype)
        _check_range(movement, left, right, dtype)
        return dataclasses.replace(movement, left=left, right=right)
    if ridge is None or (movement.gram is None and not len(movement.keys)):
        left, right = _rounded(movement, *_principal(movement.left, movement.right, rank), dtype)
        left[movement.left.abs().sum(1) == 0] = 0.0
        return dataclasses.replace(movement, left=left, right=right)
    prior = torch.eye(movement.right.shape[1], dtype=torch.float64) * ridge
    if movement.gram is not None:
        prior += movement.gram.double()
    keys = movement.keys.double()
    metric = torch.linalg.cholesky(prior + keys.T @ keys)  # H^1/2
    left, rows = _principal(movement.left, movement.right.double() @ metric, rank)
    right = torch.linalg.solve_triangular(metric, rows, upper=False, left=False)
    left, right = _rounded(movement, left, right, dtype)
    if not len(keys):  # a repair
        return dataclasses.replace(movement, left=left, right=right)
    pseudo, owners = _pseudo_keys(movement, right.double() @ prior, rank)
    pseudo = pseudo.to(dtype)
    remaining = torch.linalg.lstsq(pseudo.double().T, (right.double() @ prior).T, driver="gelsd")
    combined = (remaining.solution + pseudo.double() @ right.double().T).float()  # (N, R)
    residuals = combined.double() @ left.double().T
    return dataclasses.replace(
        movement, left=left, right=right, keys=pseudo, residual_data=residuals, owners=owners
    )


def _principal(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return factors (D_out, R) and (R, D_in) of the best approximation of `left @ right` of rank R <= `rank`."""
    outer, first = torch.linalg.qr(left.double())
    inner, second = torch.linalg.qr(right.double().T)
    u, sizes, vh = torch.linalg.svd(first @ second.T)
    count = min(rank, int((sizes > 1e-12 * sizes[:1]).sum()))
    return outer @ u[:, :count] * sizes[:count], vh[:count] @ inner.T


def _rounded(
    movement: Movement, left: Tensor, right: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the factors in `dtype`, scaled to equal norms, so that neither leaves the range of float16."""
    scale = (left.norm(dim=0) / right.norm(dim=1).clamp(min=1e-150)).sqrt().clamp(min=1e-150)
    left, right = (left / scale).to(dtype), (right * scale[:, None]).to(dtype)
    _check_range(movement, left, right, dtype)
    return left, right


def _check_range(movement: Movement, left: Tensor, right: Tensor, dtype: torch.dtype) -> None:
    if not bool(left.isfinite().all() and right.isfinite().all()):
        raise ValueError(
            f"{dtype} cannot hold the numbers of the movement of {movement.site}: use `dtype=torch.float32`."
        )


def _pseudo_keys(movement: Movement, rows: Tensor, rank: int) -> tuple[Tensor, tuple[int, ...]]:
    """Return keys (N, D_in) whose span contains `rows` (R, D_in), divided among the concepts, and their owners."""
    rest = torch.linalg.qr(rows.T).Q  # (D_in, R), directions that no concept has yet
    concepts = sorted(set(movement.owners))
    owners = torch.tensor(movement.owners)
    parts: list[Tensor] = []
    part_owners: list[int] = []
    for left, owner in zip(range(len(concepts), 0, -1), concepts, strict=True):
        keys = movement.keys.double()[owners == owner]
        share = -(-rest.shape[1] // left)
        rotation = torch.linalg.svd(
            keys @ rest
        ).Vh.T  # (R, R), the largest directions of the keys first
        span, rest = rest @ rotation[:, :share], rest @ rotation[:, share:]
        outside = torch.linalg.svd(keys - keys @ span @ span.T, full_matrices=False).Vh
        more = outside[: max(1, rank // 2 // len(concepts))].T
        span = torch.linalg.qr(torch.cat([span, more], 1)).Q
        _, sizes, rotation = torch.linalg.svd(keys @ span)
        norms = sizes.new_full((span.shape[1],), 1e-6 * float(sizes[0]))
        norms[: len(sizes)] = sizes.clamp(min=float(norms[0]))
        parts.append(norms[:, None] * (rotation @ span.T))
        part_owners += [owner] * span.shape[1]
    return torch.cat(parts), tuple(part_owners)


def _distance(movement: Movement, other: Movement | None) -> Tensor:
    """Return the Frobenius norm of a movement, or of its difference from another."""
    lefts, rights = [movement.left.double()], [movement.right.double()]
    if other is not None:
        lefts, rights = [*lefts, -other.left.double()], [*rights, other.right.double()]
    triangle = torch.linalg.qr(torch.cat(lefts, dim=1)).R
    return (triangle @ torch.cat(rights)).norm()
