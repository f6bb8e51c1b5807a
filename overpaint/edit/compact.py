r"""A change cut down to kilobytes: factors of a given rank, and as few keys as lead to the same movement.

Where the solve ends, each key keeps a slack :math:`\alpha = r - \Delta k`, and :math:`\Delta A = \sum_o \alpha_o^\top
K_o` over the concepts :math:`o`, with :math:`A = \lambda I + a P^\top P`. So the movement is a sum of one part a
concept, :math:`\Delta_o = \alpha_o^\top K_o A^{-1}`. Of their singular directions the largest remain, measured as the
solve measures, by :math:`H = A + K^\top K`: cutting :math:`\Delta_o H^{1/2}` loses least of what was asked for.

In place of a concept's keys come a few rows: those of the span of its cut :math:`\Delta_o A`, with the weight that the
keys had there, and the largest of what the keys hold besides, which keeps other concepts from moving them. As residuals
they have what makes the cut movement their solution. Solved again, alone or with other changes, they ask for what the
movement does.

Keeping the largest singular directions of the keys instead, so as to preserve :math:`K^\top K` and :math:`R^\top K`
best, fails: these are what all captions share, and nearly all of the movement is elsewhere.
"""

import dataclasses

import torch
from torch import Tensor

from overpaint.edit.change import Change, Movement
from overpaint.edit.solve import compress

__all__ = ["compact"]

_DTYPES = (torch.float16, torch.float32, torch.float64)


@dataclasses.dataclass(frozen=True, eq=False)
class _Part:
    """What one concept adds to the movement, `left @ right`, and its keys (N, D_in)."""

    owner: int
    left: Tensor
    right: Tensor
    keys: Tensor


def compact(change: Change, *, rank: int = 16, dtype: torch.dtype = torch.float16) -> Change:
    """Return `change` with factors of at most `rank` and half as many keys again, rounded to `dtype`.

    Args:
        change: Left as it is.
        rank: For each weight, how many directions remain of all its concepts together, at least one a concept. About
            16 for each concept.
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
    kept = change.protocol.get("preserve") and change.protocol.get("preserve_weight")
    if kept and any(m.gram is None and len(m.keys) for m in change.movements):
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
    if ridge is None or not len(movement.keys):
        left, right = compress(movement.left.double(), movement.right.double())
        left, right = _rounded(movement, left[:, :rank], right[:rank], dtype)
        left[movement.left.abs().sum(1) == 0] = 0.0
        return dataclasses.replace(movement, left=left, right=right)
    prior = torch.eye(movement.keys.shape[1], dtype=torch.float64) * ridge
    if movement.gram is not None:
        prior += movement.gram.double()
    parts = _shared_out(_parts(movement, prior), rank)
    left, right = torch.cat([p.left for p in parts], 1), torch.cat([p.right for p in parts])
    left, right = _rounded(movement, left, right, dtype)
    keys, owners, wanted = _pseudo_keys(parts, right.double(), prior, rank, dtype)
    coefficients = (wanted + keys.double() @ right.double().T).float()  # (N, R)
    residuals = coefficients.double() @ left.double().T
    return dataclasses.replace(
        movement, left=left, right=right, keys=keys, residuals=residuals, owners=owners
    )


def _parts(movement: Movement, prior: Tensor) -> list[_Part]:
    """Return what each concept adds to the movement, in factors whose columns are the solve's own, largest first."""
    keys, residuals = movement.keys.double(), movement.residuals.double()
    slack = residuals - keys @ movement.right.double().T @ movement.left.double().T
    right = torch.cholesky_solve(keys.T, torch.linalg.cholesky(prior)).T  # (N, D_in), K A^-1
    metric = torch.linalg.cholesky(prior + keys.T @ keys)  # H^1/2
    owners = torch.tensor(movement.owners)
    found: list[_Part] = []
    for owner in sorted(set(movement.owners)):
        own = owners == owner
        left, rows = compress(slack[own].T, right[own] @ metric)
        rows = torch.linalg.solve_triangular(metric, rows, upper=False, left=False)
        found.append(_Part(owner, left, rows, keys[own]))
    return found


def _shared_out(parts: list[_Part], rank: int) -> list[_Part]:
    """Return the parts cut to the `rank` largest directions among all, one each at least."""
    sizes = [
        (i > 0, -float(size), place)
        for place, part in enumerate(parts)
        for i, size in enumerate(part.left.norm(dim=0))
    ]
    least = sum(not later for later, *_ in sizes)
    counts = [0] * len(parts)
    for _, _, place in sorted(sizes)[: max(rank, least)]:
        counts[place] += 1
    return [
        dataclasses.replace(part, left=part.left[:, :n], right=part.right[:n])
        for part, n in zip(parts, counts, strict=True)
    ]


def _rounded(
    movement: Movement, left: Tensor, right: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the factors in `dtype`, the size split evenly, so that neither leaves the range of float16."""
    scale = (left.norm(dim=0) / right.norm(dim=1).clamp(min=1e-150)).sqrt().clamp(min=1e-150)
    left, right = (left / scale).to(dtype), (right * scale[:, None]).to(dtype)
    if not bool(left.isfinite().all() and right.isfinite().all()):
        raise ValueError(
            f"{dtype} cannot hold the numbers of the movement of {movement.site}: keep it in torch.float32."
        )
    return left, right


def _pseudo_keys(
    parts: list[_Part], right: Tensor, prior: Tensor, rank: int, dtype: torch.dtype
) -> tuple[Tensor, tuple[int, ...], Tensor]:
    """Return keys (N, D_in), their owners, and coefficients (N, R) whose product with them is `right` A."""
    keys: list[Tensor] = []
    owners: list[int] = []
    blocks: list[Tensor] = []
    besides = max(1, rank // 2 // len(parts))
    start = 0
    for part in parts:
        own = slice(start, start + len(part.right))
        start += len(part.right)
        span = torch.linalg.qr((right[own] @ prior).T).Q  # (D_in, r)
        rest = torch.linalg.svd(part.keys - part.keys @ span @ span.T, full_matrices=False)
        span = torch.linalg.qr(torch.cat([span, rest.Vh[:besides].T], 1)).Q
        _, sizes, turn = torch.linalg.svd(part.keys @ span, full_matrices=False)
        rows = (sizes.clamp(min=1e-6 * float(sizes[0]))[:, None] * (turn @ span.T)).to(dtype)
        keys.append(rows)
        owners += [part.owner] * len(rows)
        aimed = (right[own] @ prior).T
        blocks.append(torch.linalg.lstsq(rows.double().T, aimed, driver="gelsd").solution)
    return torch.cat(keys), tuple(owners), torch.block_diag(*blocks)


def _distance(movement: Movement, other: Movement | None) -> Tensor:
    """Return the Frobenius norm of a movement, or of its difference from another."""
    lefts, rights = [movement.left.double()], [movement.right.double()]
    if other is not None:
        lefts, rights = [*lefts, -other.left.double()], [*rights, other.right.double()]
    triangle = torch.linalg.qr(torch.cat(lefts, dim=1)).R
    return (triangle @ torch.cat(rights)).norm()
