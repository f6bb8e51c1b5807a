r"""A change cut down to kilobytes: factors of a given rank, and as few keys as lead to the same movement.

Of the movement :math:`\Delta` the largest singular directions remain, measured as the solve measures, by :math:`H =
\lambda I + a P^\top P + K^\top K`: cutting :math:`\Delta H^{1/2}` loses least of what was asked for and kept.

Where a solve ends, :math:`\Delta A = \alpha^\top K` with :math:`A = \lambda I + a P^\top P` and the slack
:math:`\alpha = R - K \Delta^\top` that each key keeps. So the cut movement is the solution for any keys whose span
holds the rows of :math:`\Delta A`, if their residuals are what it makes of them and the right slack. The directions of
that span are shared out among the concepts; each concept's rows weigh there what its keys did, and a few more hold the
largest of what its keys are besides, so that other concepts do not move them. Solved again, alone or with other
changes, such keys ask for what the movement does.

Keeping the largest singular directions of the keys instead, so as to preserve :math:`K^\top K` and :math:`R^\top K`
best, fails: these are what all captions share, and nearly all of the movement is elsewhere. Cutting each concept's part
of the movement on its own fails too: the parts are large and cancel.
"""

import dataclasses

import torch
from torch import Tensor

from overpaint.edit.change import Change, Movement
from overpaint.edit.weights import EMBEDDING

__all__ = ["compact"]

_DTYPES = (torch.float16, torch.float32, torch.float64)


def compact(change: Change, *, rank: int = 16, dtype: torch.dtype = torch.float16) -> Change:
    """Return `change` with factors of at most `rank` and half as many keys again, rounded to `dtype`.

    Args:
        change: Left as it is.
        rank: For each weight, how many directions remain of all its concepts together. About 16 for one concept, 8 for
            each of many. Rows of the token embedding all remain.
        dtype: `torch.float16`, or 32 or 64 to round less.

    Returns:
        A change of its own, with another digest. Its report says how far its movement is from the whole one, relative,
        in the Frobenius norm over all weights (`compact_error`), and what it misses at the keys, relative to what was
        asked (`compact_residual`), to be compared with the whole one's `compact_residual_before`.

    Raises:
        ValueError: `rank` is below 1, `dtype` is another or its range too small, or the change lacks its preserve
            terms.
    """
    if rank < 1:
        raise ValueError(f"`rank` must be 1 or more, got {rank!r}. 16 is the usual choice.")
    if dtype not in _DTYPES:
        raise ValueError(
            f"a change is kept as torch.float16, torch.float32 or torch.float64, got {dtype!r}: name one of them."
        )
    named = change.protocol.get("preserve") and change.protocol.get("preserve_weight")
    kept, repaired = named or change.protocol.get("terms"), change.protocol.get("repair")
    solved = [m for m in change.movements if m.site != EMBEDDING]
    if kept and any(m.gram is None and (repaired or len(m.keys)) for m in solved):
        raise ValueError(
            "this change preserves prompts but lacks their terms, which are not saved unless asked for: use "
            "`change.complete(model)` first."
        )
    movements = tuple(_cut(m, rank, dtype, change.ridge) for m in change.movements)
    return Change(movements, change.protocol, {**change.report, **_losses(change, movements)})


def _losses(change: Change, movements: tuple[Movement, ...]) -> dict[str, float]:
    """Return what the cut movements are, and how far they are from those of `change`."""
    pairs = list(zip(change.movements, movements, strict=True))
    lost = torch.stack([_distance(a, b) for a, b in pairs]).norm()
    whole = torch.stack([_distance(a, None) for a, _ in pairs]).norm()
    asked = torch.stack([a.residuals.double().norm() for a, _ in pairs]).norm()
    told = {
        "rank": max(m.left.shape[1] for m in movements),
        "compact_error": float(lost / whole) if float(whole) else 0.0,
    }
    if float(asked):
        missed = torch.tensor([[_missed(a, a), _missed(a, b)] for a, b in pairs])
        before, after = (missed.norm(dim=0) / asked).tolist()
        told |= {"compact_residual_before": before, "compact_residual": after}
    return told


def _missed(asked: Movement, moved: Movement) -> float:
    """Return the norm of what `moved` leaves of the residuals of `asked`."""
    outputs = asked.keys.double() @ moved.right.double().T @ moved.left.double().T
    return float((asked.residuals.double() - outputs).norm())


def _cut(movement: Movement, rank: int, dtype: torch.dtype, ridge: float | None) -> Movement:
    """Return one movement cut and rounded, with the keys and residuals that lead to it."""
    if movement.site == EMBEDDING:  # a row a token: none can be left out
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
    slack = torch.linalg.lstsq(pseudo.double().T, (right.double() @ prior).T, driver="gelsd")
    combined = (slack.solution + pseudo.double() @ right.double().T).float()  # (N, R)
    residuals = combined.double() @ left.double().T
    return dataclasses.replace(
        movement, left=left, right=right, keys=pseudo, residuals=residuals, owners=owners
    )


def _principal(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return factors (D_out, R) and (R, D_in) of the best approximation of `left @ right` of rank R <= `rank`."""
    outer, first = torch.linalg.qr(left.double())
    inner, second = torch.linalg.qr(right.double().T)
    u, sizes, vh = torch.linalg.svd(first @ second.T)
    kept = min(rank, int((sizes > 1e-12 * sizes[:1]).sum()))
    return outer @ u[:, :kept] * sizes[:kept], vh[:kept] @ inner.T


def _rounded(
    movement: Movement, left: Tensor, right: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the factors in `dtype`, the size split evenly, so that neither leaves the range of float16."""
    scale = (left.norm(dim=0) / right.norm(dim=1).clamp(min=1e-150)).sqrt().clamp(min=1e-150)
    left, right = (left / scale).to(dtype), (right * scale[:, None]).to(dtype)
    _check_range(movement, left, right, dtype)
    return left, right


def _check_range(movement: Movement, left: Tensor, right: Tensor, dtype: torch.dtype) -> None:
    if not bool(left.isfinite().all() and right.isfinite().all()):
        raise ValueError(
            f"{dtype} cannot hold the numbers of the movement of {movement.site}: keep it in torch.float32."
        )


def _pseudo_keys(movement: Movement, wanted: Tensor, rank: int) -> tuple[Tensor, tuple[int, ...]]:
    """Return keys (N, D_in) that span the rows of `wanted`, shared out among the concepts, and their owners."""
    rest = torch.linalg.qr(wanted.T).Q  # (D_in, R), what is not shared out yet
    concepts = sorted(set(movement.owners))
    owners = torch.tensor(movement.owners)
    found: list[Tensor] = []
    owned: list[int] = []
    for left, owner in zip(range(len(concepts), 0, -1), concepts, strict=True):
        keys = movement.keys.double()[owners == owner]
        share = -(-rest.shape[1] // left)
        turn = torch.linalg.svd(keys @ rest).Vh.T  # (R, R), what the concept reads most comes first
        span, rest = rest @ turn[:, :share], rest @ turn[:, share:]
        besides = torch.linalg.svd(keys - keys @ span @ span.T, full_matrices=False).Vh
        more = besides[: max(1, rank // 2 // len(concepts))].T
        span = torch.linalg.qr(torch.cat([span, more], 1)).Q
        _, sizes, turn = torch.linalg.svd(keys @ span)
        least = sizes.new_full((span.shape[1],), 1e-6 * float(sizes[0]))
        least[: len(sizes)] = sizes.clamp(min=float(least[0]))
        found.append(least[:, None] * (turn @ span.T))
        owned += [owner] * span.shape[1]
    return torch.cat(found), tuple(owned)


def _distance(movement: Movement, other: Movement | None) -> Tensor:
    """Return the Frobenius norm of a movement, or of its difference from another."""
    lefts, rights = [movement.left.double()], [movement.right.double()]
    if other is not None:
        lefts, rights = [*lefts, -other.left.double()], [*rights, other.right.double()]
    triangle = torch.linalg.qr(torch.cat(lefts, dim=1)).R
    return (triangle @ torch.cat(rights)).norm()
