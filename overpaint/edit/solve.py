r"""The regularised least squares that closed-form edits share; tensors only, float64 throughout.

Row convention: keys :math:`K` (N, D_in) and targets :math:`V` (N, D_out) hold one pair a row, the weight :math:`W`
(D_out, D_in) is as in `nn.Linear`. With preserved keys :math:`P` (M, D_in) and their weight :math:`a`, the edit is

.. math:: \min_{W'} \|K W'^\top - V\|_F^2 + \lambda \|W' - W\|_F^2 + a \|P (W' - W)^\top\|_F^2 .

Its solution moves :math:`W` by :math:`\Delta = R^\top (I + K A^{-1} K^\top)^{-1} K A^{-1}` with the residual
:math:`R = V - K W^\top` and the prior :math:`A = \lambda I + a P^\top P`: a product of two factors of N columns and
rows, whatever M is. Without preserved keys it is the paper's :math:`R^\top (\lambda I + K K^\top)^{-1} K`.

The targets enter by :math:`R` alone, so weights that read the same keys share everything else: `factorise` once, then
`solve` for each weight's residuals.

Source: Basu et al., 2024 (Diff-QuickFix), https://arxiv.org/abs/2310.13730, equations 8 and 9; the preserved keys are
those of Gandikota et al., 2024 (UCE), https://arxiv.org/abs/2308.14761.
Deviations: the dual form instead of the paper's D_in x D_in inverse, which float32 and nearly collinear keys break.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Factors", "Solution", "compress", "contradiction", "factorise", "solve"]

Method = Literal["auto", "dual", "primal"]


@dataclass(frozen=True, eq=False)
class Solution:
    """What moves the weight: `left @ right`, shape (D_out, D_in), and how well the problem was posed.

    Attributes:
        left: Shape (D_out, R), float64; R is N, or D_in where more keys than that were solved by the primal form.
        right: Shape (R, D_in), float64; weights that share their keys share this very tensor.
        condition_number: Of the N x N system; float64 keeps about 16 digits less its logarithm.
        effective_rank: Directions of the keys that the data, not the prior, decide.
    """

    left: Tensor
    right: Tensor
    condition_number: float
    effective_rank: int

    @property
    def delta(self) -> Tensor:
        """The movement of the weight, shape (D_out, D_in), float64."""
        return self.left @ self.right


@dataclass(frozen=True, eq=False)
class Factors:
    r"""What the movements of all weights with the same keys share; made by `factorise`.

    Attributes:
        keys: :math:`K`, shape (N, D_in), float64.
        right: What every movement is a combination of the rows of, shape (R, D_in), float64.
        system: LU factors and pivots of the N x N matrix, for the dual form; `None` for the primal.
        condition_number: As in `Solution`.
        effective_rank: As in `Solution`.
    """

    keys: Tensor
    right: Tensor
    system: tuple[Tensor, Tensor] | None
    condition_number: float
    effective_rank: int

    def solve(self, residuals: Tensor) -> Solution:
        r"""Movement of one weight.

        Args:
            residuals: :math:`R = V - K W^\top`, what the weight misses, shape (N, D_out).

        Raises:
            ValueError: There are not as many residuals as keys, or they are not finite.
        """
        if residuals.shape != (len(self.keys), residuals.shape[-1]):
            raise ValueError(
                f"residuals {tuple(residuals.shape)} do not fit {len(self.keys)} keys: give (N, D_out), a row a key."
            )
        _check_finite({"residuals": residuals})
        residual = _exact(residuals)
        if self.system is not None:
            left = torch.linalg.lu_solve(*self.system, residual).T
        elif len(self.right) == len(self.keys):
            left = residual.T
        else:
            left = residual.T @ self.keys
        return Solution(left, self.right, self.condition_number, self.effective_rank)


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
    r"""Movement of `weight` that sends `keys` to `targets` and otherwise stays near `weight`.

    Args:
        keys: Inputs :math:`K`, shape (N, D_in); N may be 0.
        targets: Wanted outputs :math:`V`, shape (N, D_out).
        weight: Present weight :math:`W`, shape (D_out, D_in).
        ridge: :math:`\lambda > 0`, in units of a key's squared norm.
        preserve: Inputs :math:`P` whose outputs should stay, shape (M, D_in).
        preserve_weight: :math:`a \ge 0`, what one preserved key counts against one edited key; 0 ignores `preserve`.
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
        kept = _exact(preserve) * math.sqrt(preserve_weight)
        gram = kept.T @ kept
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
    keys = _exact(keys)
    prior = None
    if gram is not None:
        prior = _exact(gram) + torch.eye(width, dtype=torch.float64) * ridge
    if method == "dual" or (method == "auto" and len(keys) <= width):
        return _dual(keys, ridge, prior)
    return _primal(keys, ridge, prior)


def contradiction(
    keys: Tensor, targets: Tensor, *, tolerance: float = 1e-6
) -> tuple[int, int] | None:
    """First two rows that send one key to two targets, or `None`.

    Args:
        keys: Shape (N, D_in).
        targets: Shape (N, D_out).
        tolerance: Keys nearer than this, relative to their norm, are one key; targets further apart than a hundred
            times this, relative to theirs, are two targets.
    """
    keys, targets = _exact(keys), _exact(targets)
    for start in range(0, len(keys), 1024):
        rows = slice(start, start + 1024)
        same = _distances(keys[rows], keys) <= tolerance
        apart = _distances(targets[rows], targets) > 100 * tolerance
        found = (same & apart).nonzero()
        if len(found):
            first, second = sorted((int(found[0, 0]) + start, int(found[0, 1])))
            return first, second
    return None


def compress(left: Tensor, right: Tensor, *, tolerance: float = 1e-10) -> tuple[Tensor, Tensor]:
    """Factors of least rank whose product differs from `left @ right` by at most `tolerance` of its norm.

    Args:
        left: Shape (D_out, R).
        right: Shape (R, D_in).
        tolerance: Allowed relative error in the Frobenius norm.

    Returns:
        New factors (D_out, r) and (r, D_in) with r <= R; r is 0 where the product is 0.
    """
    if left.shape[1] >= min(left.shape[0], right.shape[1]):
        u, s, vh = torch.linalg.svd(left @ right, full_matrices=False)
    else:
        q_left, r_left = torch.linalg.qr(left)
        q_right, r_right = torch.linalg.qr(right.T)
        u, s, vh = torch.linalg.svd(r_left @ r_right.T)
        u, vh = q_left @ u, vh @ q_right.T
    tail = (
        s.square().flip(0).cumsum(0).flip(0).sqrt()
    )  # norm of what is lost by cutting before each direction
    rank = int((tail > tolerance * tail[:1]).sum())
    return (u[:, :rank] * s[:rank]).contiguous(), vh[:rank].contiguous()


def _dual(keys: Tensor, ridge: float, prior: Tensor | None) -> Factors:
    if prior is None:
        half, right = keys.T / math.sqrt(ridge), keys / ridge
    else:
        root = _root(prior)
        half = torch.linalg.solve_triangular(root, keys.T, upper=False)
        right = torch.linalg.solve_triangular(root.T, half, upper=True).T
    gram = half.T @ half  # (N, N), K A^-1 K^T
    lu, pivots, _ = torch.linalg.lu_factor_ex(gram + torch.eye(len(keys), dtype=torch.float64))
    return Factors(keys, right, (lu, pivots), *_posed(gram, len(keys)))


def _primal(keys: Tensor, ridge: float, prior: Tensor | None) -> Factors:
    width = keys.shape[1]
    gram = keys.T @ keys
    identity = torch.eye(width, dtype=torch.float64)
    if prior is None:
        system, whitened = gram + ridge * identity, gram / ridge
    else:
        root = _root(prior)
        half = torch.linalg.solve_triangular(root, gram, upper=False)
        whitened = torch.linalg.solve_triangular(root, half.T, upper=False)
        system = gram + prior
    columns = keys.T if len(keys) <= width else identity
    right = torch.linalg.solve(system, columns).T
    return Factors(keys, right, None, *_posed((whitened + whitened.T) / 2, len(keys)))


def _root(prior: Tensor) -> Tensor:
    root, failed = torch.linalg.cholesky_ex(prior)
    if int(failed):
        raise ValueError(
            "`gram` is not positive semidefinite, so it is no Gram matrix of keys: compute it anew as a * P^T P."
        )
    return root


def _posed(gram: Tensor, count: int) -> tuple[float, int]:
    """Return the condition number of I + K A^-1 K^T, and how many of its directions outweigh the prior.

    `gram` is K A^-1 K^T of `count` rows, or the D_in x D_in matrix that has the same eigenvalues but for zeros.
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
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
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
            f"the solver must be 'dual' or 'primal', got {method!r}. 'auto' takes whichever is smaller."
        )
