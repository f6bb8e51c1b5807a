r"""Movement: the change of one weight as data, and the plain contents of a change, which algorithms work on.

A movement is a product of two factors that is added to a weight :math:`W`. It stores the keys and residuals that it was
solved from, so that it can be solved again together with others.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from overpaint.edit.least_squares import Solution, compress, one_thread
from overpaint.edit.weights import cast_hashes, fingerprint, half_sample

__all__ = ["Contents", "Movement", "Targets", "digest"]

_BLOCK = 64  # rows of a weight that are added at once
_KEYS = 4096  # keys whose residuals are computed at once


@dataclass(frozen=True, eq=False)
class Targets:
    r"""Targets of N keys: for each key, the output of the weight at another input, plus a bias.

    Several keys may share one input.

    Attributes:
        keys: :math:`K`, shape (N, D_in).
        inputs: Inputs whose outputs are the targets, shape (M, D_in).
        rows: For each key, its row of `inputs`, int64, shape (N,).
        weight: :math:`W`, shape (D_out, D_in), float64.
        bias: Added to every target, shape (D_out,), float64.
    """

    keys: Tensor
    inputs: Tensor
    rows: Tensor
    weight: Tensor
    bias: Tensor

    def at(self, places: Tensor) -> Tensor:
        """Return the targets of the keys at `places`, shape (len(places), D_out), float64."""
        return self.inputs[self.rows[places]].double() @ self.weight.T + self.bias

    def residuals(self) -> Tensor:
        r"""Return :math:`R = V - K W^\top`, the targets minus the present outputs, shape (N, D_out), float64."""
        residuals = torch.empty(len(self.keys), len(self.weight), dtype=torch.float64)
        for start in range(0, len(residuals), _KEYS):
            block = slice(start, start + _KEYS)
            shift = self.inputs[self.rows[block]].double() - self.keys[block].double()
            torch.addmm(self.bias, shift, self.weight.T, out=residuals[block])
        return residuals


@dataclass(frozen=True, eq=False)
class Movement:
    r"""A movement `left @ right` of one weight, and the data that it was solved from.

    Attributes:
        site: The weight, named as in `find_weight`.
        base_hash: `fingerprint` of the weight that the movement starts from.
        left: Shape (D_out, R), float16, 32 or 64; a row of zeros leaves that row of the weight unchanged.
        right: Shape (R, D_in), of the same dtypes.
        keys: Inputs :math:`K` whose outputs the edit replaces, shape (N, D_in); N is 0 where nothing was solved.
        residual_data: The residuals, shape (N, D_out), or the targets that `residuals` is computed from.
        owners: For each key, the index of its concept among the pairs of the change.
        gram: :math:`a P^\top P` of the preserved keys, shape (D_in, D_in); `None` if there are none, or if the change
            was loaded from a file without them.
        casts: `cast_hashes` of the weight that the movement starts from; empty in old files.
        base_norm: Frobenius norm of the weight that the movement starts from; `None` in old files.
        base_sample: `half_sample` of the weight that the movement starts from; empty in old files.
    """

    site: str
    base_hash: str
    left: Tensor = field(repr=False)
    right: Tensor = field(repr=False)
    keys: Tensor = field(repr=False)
    residual_data: Tensor | Targets = field(repr=False)
    owners: tuple[int, ...] = field(repr=False)
    gram: Tensor | None = field(repr=False)
    casts: tuple[str, ...] = field(default=(), repr=False)
    base_norm: float | None = field(default=None, repr=False)
    base_sample: tuple[float, ...] = field(default=(), repr=False)

    @classmethod
    def of_weight(
        cls, site: str, parameter: Tensor, left: Tensor, right: Tensor, gram: Tensor | None = None
    ) -> "Movement":
        """Return the movement of `parameter` by `left @ right`, which was not solved from keys.

        Args:
            site: Name of the weight.
            parameter: The weight; its present numbers are the base of the movement.
            left: As in `Movement`.
            right: As in `Movement`.
            gram: As in `Movement`.
        """
        no_keys = torch.zeros(0, right.shape[1]), torch.zeros(0, len(left))
        return cls(
            site, fingerprint(parameter), left, right, *no_keys, (), gram, cast_hashes(parameter), _norm(parameter),
            half_sample(parameter),
        )  # fmt: skip

    @classmethod
    def to_weight(cls, site: str, parameter: Tensor, goal: Tensor) -> "Movement":
        """Return the movement of `parameter` to `goal`, of full rank: one factor is the difference in float32.

        Args:
            site: Name of the weight.
            parameter: The weight; its present numbers are the base of the movement.
            goal: The weight after the movement, shape (D_out, D_in).
        """
        delta = (goal.detach().cpu().double() - parameter.detach().cpu().double()).float()
        out, width = delta.shape
        left, right = (torch.eye(out), delta) if out <= width else (delta, torch.eye(width))
        return cls.of_weight(site, parameter, left, right)

    @classmethod
    def from_solution(
        cls,
        site: str,
        parameter: Tensor,
        solution: Solution,
        keys: Tensor,
        residual_data: Tensor | Targets,
        owners: Sequence[int],
        gram: Tensor | None,
    ) -> "Movement":
        """Return the movement of `parameter` by `solution`, whose factors are cut to their exact rank.

        Args:
            site: Name of the weight.
            parameter: The weight; its present bytes are the base of the movement.
            solution: From `Factors.solve`.
            keys: As in `Movement`.
            residual_data: As in `Movement`.
            owners: As in `Movement`.
            gram: As in `Movement`.
        """
        left, right = compress(solution.left, solution.right, orthonormal=solution.orthonormal)
        if isinstance(residual_data, Tensor):
            residual_data = residual_data.detach().cpu()
        return cls(
            site, fingerprint(parameter), left, right, keys.detach().cpu(), residual_data, tuple(owners), gram,
            cast_hashes(parameter), _norm(parameter), half_sample(parameter),
        )  # fmt: skip

    @cached_property
    def residuals(self) -> Tensor:
        r"""Targets minus the outputs of the base weight, :math:`V - K W^\top`, shape (N, D_out)."""
        data = self.residual_data
        return data if isinstance(data, Tensor) else data.residuals()

    @cached_property
    def delta(self) -> Tensor:
        """The movement of the weight, shape (D_out, D_in), float64; cached after the first access."""
        return self.left.double() @ self.right.double()

    @cached_property
    def relative_norm(self) -> float | None:
        """Frobenius norm of the movement, relative to that of its weight; `None` if the latter is not known.

        It is 0 for a weight of zeros.
        """
        if self.base_norm is None:
            return None
        norm = _product_norm(self.left, self.right)
        return norm / self.base_norm if self.base_norm else 0.0

    def added_to(self, weight: Tensor) -> Tensor:
        """Return `weight` plus the movement, on the CPU, in its dtype. Rows that do not move keep their bytes.

        The sum is computed in float64 and rounded once.
        """
        with one_thread():
            result = weight.detach().cpu().clone()
        if not self.left.numel():
            return result
        with one_thread():
            rows = self.left.abs().amax(1) > 0
        if not bool(rows.all()):
            shift = self.left[rows].double() @ self.right.double()
            result[rows] = _rounded(result[rows].double() + shift, result.dtype)
            return result
        # A cached `delta` is used, but none is cached here: it would stay in memory with the change.
        shift = self.delta if "delta" in vars(self) else self.left.double() @ self.right.double()
        # In blocks, since allocating the whole weight in double takes longer than the sum.
        with one_thread():
            for old, by in zip(result.split(_BLOCK), shift.split(_BLOCK), strict=True):
                old.copy_(_rounded(by + old, result.dtype))
        return result


def _norm(parameter: Tensor) -> float:
    return float(torch.linalg.vector_norm(parameter.detach().cpu(), dtype=torch.float64))


def _product_norm(left: Tensor, right: Tensor) -> float:
    """Return the Frobenius norm of `left @ right`, from the smaller of the product and of both Gram matrices."""
    (out, rank), width = left.shape, right.shape[1]
    if rank * (out + width) > out * width:
        return float(torch.linalg.norm(left.float() @ right.float()))
    grams = (left.double().T @ left.double()) * (right.double() @ right.double().T)
    return max(float(grams.sum()), 0.0) ** 0.5


def _rounded(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Return float64 numbers rounded once to `dtype`, to the nearest, ties to even.

    torch converts float64 to half precision by way of float32, which rounds twice. Here float64 is
    rounded to float32 by rounding to odd: of the two neighbours, the one with a last bit of 1 is used. The second
    rounding can then distinguish a tie from a number beside it.

    Source: Boldo and Melquiond, 2008, https://doi.org/10.1109/TC.2007.70819.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        return exact.to(dtype)
    near = exact.float()
    even = (near.view(torch.int32) & 1) == 0
    inexact = (near.double() != exact) & even & near.isfinite()
    ends = torch.where(near.double() < exact, math.inf, -math.inf)
    return torch.where(inexact, torch.nextafter(near, ends.float()), near).to(dtype)


def digest(movements: Iterable[Movement]) -> str:
    """Return a SHA-256 of sites and factors: equal for movements and their saved copies, in any order."""
    lines = [
        f"{m.site} {m.base_hash} {fingerprint(m.left)} {fingerprint(m.right)}" for m in movements
    ]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


class Contents(NamedTuple):
    """Contents of a change.

    Attributes:
        movements: One for each weight.
        protocol: The arguments that made the change, ready for JSON.
        report: Measurements of the solve.
    """

    movements: tuple[Movement, ...]
    protocol: Mapping[str, Any]
    report: Mapping[str, Any]

    @property
    def sites(self) -> tuple[str, ...]:
        """The weights that move."""
        return tuple(movement.site for movement in self.movements)

    @property
    def pairs(self) -> dict[str, str]:
        """The concepts, old to new."""
        return dict(self.protocol.get("pairs", {}))

    @property
    def ridge(self) -> float | None:
        """The pull towards the old weight, or `None` where nothing was solved."""
        return self.protocol.get("ridge")

    def ridge_at(self, site: str) -> float | None:
        """Return the ridge of one weight; in a change by `auto` each text encoder has its own."""
        chosen = self.protocol.get("encoders", {}).get(site.partition(".")[0], {})
        return chosen.get("ridge", self.ridge)
