r"""Regularised least squares for closed-form edits, on plain tensors, in float64 throughout.

Row convention: keys :math:`K` (N, D_in) and targets :math:`V` (N, D_out) hold one pair per row, the weight :math:`W`
(D_out, D_in) is as in `nn.Linear`. With preserved keys :math:`P` (M, D_in) and their weight :math:`a`, the edit is

.. math:: \min_{W'} \|K W'^\top - V\|_F^2 + \lambda \|W' - W\|_F^2 + a \|P (W' - W)^\top\|_F^2 .

Its solution moves :math:`W` by :math:`\Delta = R^\top (I + K A^{-1} K^\top)^{-1} K A^{-1}` with the residual
:math:`R = V - K W^\top` and the prior :math:`A = \lambda I + a P^\top P`: a product of two factors of N columns and
rows for any M. Without preserved keys it is the paper's :math:`R^\top (\lambda I + K K^\top)^{-1} K`.

The targets enter by :math:`R` alone, so weights that read the same keys share everything else: `factorise` once, then
`solve` for each weight's residuals. Where there are more keys than D_in, the sums :math:`K^\top K` and :math:`R^\top K`
are sufficient, and :math:`\Delta = R^\top K (A + K^\top K)^{-1}`.

Source: Basu et al., 2024 (Diff-QuickFix), https://arxiv.org/abs/2310.13730, equations 8 and 9; the preserved keys are
those of Gandikota et al., 2024 (UCE), https://arxiv.org/abs/2308.14761.
Deviations: the dual form where it is the smaller; float64 sums, since float32 and nearly collinear keys break the
paper's D_in x D_in inverse.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = [
    "Factors",
    "Solution",
    "compress",
    "contradiction",
    "factorise",
    "one_thread",
    "product",
    "solve",
]

Method = Literal["auto", "dual", "primal"]
_ROWS = 4096  # of keys in double at a time


@contextmanager
def one_thread() -> Iterator[None]:
    """Limit torch to one thread, for small tensors: on a busy machine, synchronising two threads takes far longer."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True, eq=False)
class Solution:
    """The movement of a weight, `left @ right`, shape (D_out, D_in), and the condition of the problem.

    Attributes:
        left: Shape (D_out, R), float64; R is N or D_in, the smaller of them.
        right: Shape (R, D_in), float64; weights with the same keys share one tensor.
        condition_number: Condition of the N x N system; about 16 minus its decimal logarithm digits are correct.
        effective_rank: Number of directions of the keys in which the data outweigh the prior.
        orthonormal: The rows of `right` are orthonormal, as `factorise` makes them.
    """

    left: Tensor
    right: Tensor
    condition_number: float
    effective_rank: int
    orthonormal: bool = False

    @property
    def delta(self) -> Tensor:
        """The movement of the weight, shape (D_out, D_in), float64."""
        return self.left @ self.right


@dataclass(frozen=True, eq=False)
class Factors:
    r"""Factorised system of keys and prior, shared by all weights with the same keys; made by `factorise`.

    Attributes:
        keys: :math:`K`, shape (N, D_in).
        right: Right factor of every movement, shape (R, D_in), float64, with orthonormal rows.
        turn: Maps the solution for N keys to the left factor, shape (N, R), float64; `None` where sums are used.
        system: LU factors and pivots of the N x N matrix, for the dual form, or of the D_in x D_in matrix, for the
            sums.
        gram: :math:`K^\top K`, shape (D_in, D_in), float64, where sums are used; else `None`.
        condition_number: As in `Solution`.
        effective_rank: As in `Solution`.
    """

    keys: Tensor
    right: Tensor
    turn: Tensor | None
    system: tuple[Tensor, Tensor] | None
    gram: Tensor | None
    condition_number: float
    effective_rank: int

    def solve(self, residuals: Tensor) -> Solution:
        r"""Return the movement of one weight.

        Args:
            residuals: :math:`R = V - K W^\top`, shape (N, D_out).

        Raises:
            ValueError: The number of residuals is not that of the keys, or they are not finite.
        """
        if residuals.shape != (len(self.keys), residuals.shape[-1]):
            raise ValueError(
                f"residuals {tuple(residuals.shape)} do not fit {len(self.keys)} keys: give (N, D_out), a row per key."
            )
        _check_finite({"residuals": residuals})
        if self.turn is None:
            return self.solve_sums(product(residuals, self.keys))
        residual = _exact(residuals)
        if self.system is not None:
            residual = torch.linalg.lu_solve(*self.system, residual)
        return self._solution(residual.T @ self.turn)

    def solve_sums(self, cross: Tensor) -> Solution:
        r"""Return the movement of one weight from the sums of its residuals with the keys.

        Args:
            cross: :math:`R^\top K`, shape (D_out, D_in), float64.

        Raises:
            ValueError: The number of keys is at most D_in, or the method is the dual form: then `solve` is needed.
        """
        if self.turn is not None or self.system is None:
            raise ValueError(
                f"{len(self.keys)} keys of width {self.keys.shape[1]} were not factorised by their sums: call `solve` "
                "with the residuals."
            )
        return self._solution(torch.linalg.lu_solve(*self.system, _exact(cross).T).T)

    def _solution(self, left: Tensor) -> Solution:
        return Solution(
            left, self.right, self.condition_number, self.effective_rank, orthonormal=True
        )


def solve(
    keys: Tensor,
    targets: Tensor,
    *,
    weight: Tensor,
    ridge: float,
    preserve: Tensor | None = None,
    preserve_weight: float = 0.0,
    method: Method = "dual",
) -> Solution:
    r"""Return the movement of `weight` that maps `keys` to `targets` and otherwise stays near `weight`.

    Args:
        keys: Inputs :math:`K`, shape (N, D_in); N may be 0.
        targets: New outputs :math:`V`, shape (N, D_out).
        weight: Present weight :math:`W`, shape (D_out, D_in).
        ridge: :math:`\lambda > 0`, in units of a key's squared norm.
        preserve: Inputs :math:`P` whose outputs should stay, shape (M, D_in).
        preserve_weight: :math:`a \ge 0`, weight of one preserved key against one edited key; 0 ignores `preserve`.
        method: As in `factorise`.

    Returns:
        The factors of the movement, in float64 on the CPU.

    Raises:
        ValueError: Shapes disagree, a number is not finite, or `ridge`, `preserve_weight` or `method` is out of range.
    """
    _check(keys, targets, weight, preserve)
    _check_knobs(ridge, preserve_weight, method)
    keys, targets, weight = (_exact(tensor) for tensor in (keys, targets, weight))
    gram = None
    if preserve is not None and len(preserve) and preserve_weight > 0:
        gram = product(preserve) * preserve_weight
    factors = factorise(keys, ridge=ridge, gram=gram, method=method)
    return factors.solve(targets - keys @ weight.T)


def factorise(
    keys: Tensor, *, ridge: float, gram: Tensor | None = None, method: Method = "dual"
) -> Factors:
    r"""Factorise the system of `keys` and prior once, for any number of weights.

    Args:
        keys: Inputs :math:`K`, shape (N, D_in); N may be 0.
        ridge: :math:`\lambda > 0`, in units of a key's squared norm.
        gram: :math:`a P^\top P` of the preserved keys, shape (D_in, D_in), symmetric; `None` where there are none.
        method: `"dual"` solves N x N; `"primal"` solves D_in x D_in, less precise when keys are nearly collinear;
            `"auto"` takes the smaller.

    Raises:
        ValueError: A shape, a number or the method is wrong, or `gram` is not positive semidefinite.
    """
    _check_knobs(ridge, 0.0, method)
    width = keys.shape[-1]
    _check_gram(keys, gram)
    keys = keys.detach().cpu()
    prior = None
    if gram is not None:
        prior = _exact(gram) + torch.eye(width, dtype=torch.float64) * ridge
    if method == "dual" or (method == "auto" and len(keys) <= width):
        return _dual(_exact(keys), ridge, prior)
    return _primal(keys, ridge, prior)


def product(a: Tensor, b: Tensor | None = None) -> Tensor:
    """Return `a.T @ b`, or `a.T @ a` in less time, summed in float64, shape (D_a, D_b).

    Args:
        a: Shape (N, D_a), of any dtype; it is converted to double in blocks.
        b: Shape (N, D_b); `a` if `None`.
    """
    width = a.shape[1]
    if b is not None:
        total = torch.zeros(width, b.shape[1], dtype=torch.float64)
        for rows, others in zip(_blocks(a), _blocks(b), strict=True):
            total.addmm_(rows.T, others)
        return total
    total = torch.zeros(width, width, dtype=torch.float64)
    step = max(64, min(384, -(-width // 4)))
    for rows in _blocks(a):
        for first in range(0, width, step):
            columns = slice(first, first + step)
            total[columns, first:].addmm_(rows[:, columns].T, rows[:, first:])
    return total.triu() + total.triu(1).T


def contradiction(
    keys: Tensor, targets: Tensor | Callable[[Tensor], Tensor], *, tolerance: float = 1e-6
) -> tuple[int, int] | None:
    """Return the first two rows that map one key to two targets, or `None`.

    Keys are sorted along a few axes, and only keys that are close on all of them are compared. A group of such keys is
    skipped if all its targets are close to the first one.

    Args:
        keys: Shape (N, D_in).
        targets: Shape (N, D_out), or a function that returns the targets of some rows; it is called for few rows.
        tolerance: Keys closer than this, relative to their norm, are one key; targets further apart than a hundred
            times this, relative to their norm, are two targets.
    """
    targets_at = targets.__getitem__ if isinstance(targets, Tensor) else targets
    best: tuple[int, int] | None = None
    for rows in _neighbours(keys, tolerance):
        if best is not None and int(rows[0]) > best[0]:
            break
        values = _exact(targets_at(rows))
        far = (values - values[0]).norm(dim=1) * (1 + 50 * tolerance)
        if bool((far <= 49.9 * tolerance * values[0].norm()).all()):
            continue  # so no two are further apart than 100 times the tolerance
        clash = _first_clash(_exact(keys[rows]), values, tolerance)
        if clash is not None:
            first, second = sorted(int(rows[place]) for place in clash)
            best = (first, second) if best is None else min(best, (first, second))
    return best


@one_thread()
def compress(
    left: Tensor, right: Tensor, *, orthonormal: bool = False, tolerance: float = 1e-10
) -> tuple[Tensor, Tensor]:
    """Return factors of least rank whose product differs from `left @ right` by at most `tolerance` of its norm.

    Args:
        left: Shape (D_out, R).
        right: Shape (R, D_in).
        orthonormal: The rows of `right` are orthonormal. If the rank cannot be reduced, the new right factor is then
            the same tensor.
        tolerance: Allowed relative error in the Frobenius norm.

    Returns:
        New factors (D_out, r) and (r, D_in) with r <= R; r is 0 where the product is 0.
    """
    if not orthonormal:
        q, r = torch.linalg.qr(right.T)
        left, right = left @ r.T, q.T
    if _full(left, tolerance):
        if left.shape[1] <= left.shape[0]:
            return left.contiguous(), right.contiguous()
        return torch.eye(len(left), dtype=left.dtype), left @ right
    if left.shape[0] > left.shape[1]:
        q, r = torch.linalg.qr(left)
        u, s, vh = torch.linalg.svd(r)
        u = q @ u
    else:
        u, s, vh = torch.linalg.svd(left, full_matrices=False)
    tail = (
        s.square().flip(0).cumsum(0).flip(0).sqrt()
    )  # norm of the part that is cut, for each number of directions kept
    rank = int((tail > tolerance * tail[:1]).sum())
    return (u[:, :rank] * s[:rank]).contiguous(), (vh[:rank] @ right).contiguous()


def _full(left: Tensor, tolerance: float) -> bool:
    """Return whether `left` certainly has full rank; `False` where singular values are needed to decide.

    The Cholesky factorisation takes a hundredth of the time of the singular values.
    """
    if not left.numel():
        return False
    square = left.T @ left if left.shape[1] <= left.shape[0] else left @ left.T
    least = max(1e-14, (10 * tolerance) ** 2) * square.trace()
    square.diagonal().sub_(least)
    return float(least) > 0 and int(torch.linalg.cholesky_ex(square)[1]) == 0


def _neighbours(keys: Tensor, tolerance: float) -> Iterator[Tensor]:
    """Yield groups of rows, ascending in and between groups: keys of different groups are not close."""
    if len(keys) < 2:
        return
    width = keys.shape[1]
    random = torch.randn(width, min(8, width), generator=torch.Generator().manual_seed(0)).double()
    axes = torch.linalg.qr(random)[0]
    places = torch.cat([rows @ axes for rows in _blocks(keys)])
    largest = float(keys.float().norm(dim=1).max())
    radius = tolerance * (1 + 1e-3) * largest  # keys that are close are close on every axis
    order = torch.arange(len(keys))
    group = torch.zeros(
        len(keys), dtype=torch.long
    )  # of the rows in `order`, those of a group together
    for place in places.T:
        sorting = place[order].argsort(stable=True)
        sorting = sorting[group[sorting].argsort(stable=True)]
        order, group = order[sorting], group[sorting]
        split = (place[order].diff() > radius) | (group.diff() != 0)
        group = torch.cat([group.new_zeros(1), split.cumsum(0)])
        many = torch.bincount(group)[group] > 1
        order, group = order[many], group[many]
        if not len(order):
            return
    sorting = order.argsort()
    sorting = sorting[group[sorting].argsort(stable=True)]
    sizes = torch.unique_consecutive(group, return_counts=True)[1]
    groups = order[sorting].split(sizes.tolist())
    yield from sorted(groups, key=lambda rows: int(rows[0]))


def _first_clash(keys: Tensor, targets: Tensor, tolerance: float) -> tuple[int, int] | None:
    for start in range(0, len(keys), 256):
        rows = slice(start, start + 256)
        same = _distances(keys[rows], keys) <= tolerance
        apart = _distances(targets[rows], targets) > 100 * tolerance
        clashes = (same & apart).nonzero()
        if len(clashes):
            return int(clashes[0, 0]) + start, int(clashes[0, 1])
    return None


@one_thread()
def _dual(keys: Tensor, ridge: float, prior: Tensor | None) -> Factors:
    if prior is None:
        half, right = keys.T / math.sqrt(ridge), keys / ridge
    else:
        root = _root(prior)
        half = torch.linalg.solve_triangular(root, keys.T, upper=False)
        right = torch.linalg.solve_triangular(root.T, half, upper=True).T
    gram = half.T @ half  # (N, N), K A^-1 K^T
    lu, pivots, _ = torch.linalg.lu_factor_ex(gram + torch.eye(len(keys), dtype=torch.float64))
    q, r = torch.linalg.qr(right.T)
    return Factors(keys, q.T, r.T, (lu, pivots), None, *_posed(gram, len(keys)))


def _primal(keys: Tensor, ridge: float, prior: Tensor | None) -> Factors:
    gram = product(keys)
    with one_thread():
        return _by_columns(keys, gram, ridge, prior)


def _by_columns(keys: Tensor, gram: Tensor, ridge: float, prior: Tensor | None) -> Factors:
    width = keys.shape[1]
    identity = torch.eye(width, dtype=torch.float64)
    if prior is None:
        system, whitened = gram + ridge * identity, gram / ridge
    else:
        root = _root(prior)
        half = torch.linalg.solve_triangular(root, gram, upper=False)
        whitened = torch.linalg.solve_triangular(root, half.T, upper=False)
        system = gram + prior
    posed = _posed((whitened + whitened.T) / 2, len(keys))
    lu, pivots, _ = torch.linalg.lu_factor_ex(system)
    if len(keys) > width:
        return Factors(keys, identity, None, (lu, pivots), gram, *posed)
    q, r = torch.linalg.qr(torch.linalg.lu_solve(lu, pivots, _exact(keys).T))
    return Factors(keys, q.T, r.T, None, None, *posed)


def _root(prior: Tensor) -> Tensor:
    root, failed = torch.linalg.cholesky_ex(prior)
    if int(failed):
        raise ValueError(
            "`gram` is not positive semidefinite, so it is not a Gram matrix of keys: compute it as a * P^T P."
        )
    return root


def _posed(gram: Tensor, count: int) -> tuple[float, int]:
    """Return the condition number of I + K A^-1 K^T, and the number of its directions that outweigh the prior.

    `gram` is K A^-1 K^T of `count` rows, or the D_in x D_in matrix with the same nonzero eigenvalues.
    """
    if count == 0:
        return 1.0, 0
    values = torch.linalg.eigvalsh(gram).clamp(min=0)
    least = values[-count] if count <= len(values) else 0.0
    return float((1 + values[-1]) / (1 + least)), int((values > 1).sum())


def _distances(rows: Tensor, others: Tensor) -> Tensor:
    """Return distances relative to the larger norm of the two, shape (len(rows), len(others))."""
    a, b = rows.square().sum(1)[:, None], others.square().sum(1)[None]
    squared = (a + b - 2 * rows @ others.T).clamp(min=0)
    return (squared / torch.maximum(a, b).clamp(min=1e-300)).sqrt()


def _blocks(rows: Tensor) -> Iterator[Tensor]:
    """Yield blocks of rows, in double."""
    return (_exact(block) for block in rows.split(_ROWS))


def _exact(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64)


def _check(keys: Tensor, targets: Tensor, weight: Tensor, preserve: Tensor | None) -> None:
    out, width = weight.shape
    if keys.shape != (len(keys), width) or targets.shape != (len(keys), out):
        raise ValueError(
            f"keys {tuple(keys.shape)} and targets {tuple(targets.shape)} do not fit a weight {tuple(weight.shape)}: "
            f"keys must be (N, {width}) and targets (N, {out})."
        )
    if preserve is not None and preserve.shape != (len(preserve), width):
        raise ValueError(f"`preserve` must be (M, {width}), got {tuple(preserve.shape)}.")
    _check_finite({"keys": keys, "targets": targets, "weight": weight, "preserve": preserve})


def _check_gram(keys: Tensor, gram: Tensor | None) -> None:
    width = keys.shape[-1]
    if keys.ndim != 2 or (gram is not None and gram.shape != (width, width)):
        shape = None if gram is None else tuple(gram.shape)
        raise ValueError(
            f"keys {tuple(keys.shape)} and gram {shape} do not fit one another: keys must be (N, D_in) and `gram` "
            "(D_in, D_in)."
        )
    _check_finite({"keys": keys, "gram": gram})


def _check_finite(named: Mapping[str, Tensor | None]) -> None:
    for name, tensor in named.items():
        if tensor is None or not tensor.numel():
            continue
        ends = torch.stack(tensor.detach().aminmax())  # NaN is both the minimum and the maximum
        if not bool(torch.isfinite(ends).all()):
            raise ValueError(
                f"`{name}` holds NaN or infinity: look for a damaged weight before editing."
            )


def _check_knobs(ridge: float, preserve_weight: float, method: str) -> None:
    if not (math.isfinite(ridge) and ridge > 0):
        raise ValueError(
            f"`ridge` must be positive and finite, got {ridge!r}. 0.01 is the usual choice."
        )
    if not (math.isfinite(preserve_weight) and preserve_weight >= 0):
        raise ValueError(
            f"`preserve_weight` must be 0 or more and finite, got {preserve_weight!r}. 0.1 is the usual choice."
        )
    if method not in ("auto", "dual", "primal"):
        raise ValueError(
            f"the solver must be 'dual' or 'primal', got {method!r}. 'auto' solves the smaller system."
        )
