"""Muon: momentum with orthogonalised updates, for the matrices and convolutions inside a network.

Jordan et al., 2024, https://kellerjordan.github.io/posts/muon, with the scale of Liu et al., 2025 (arXiv:2502.16982),
which gives updates the size of Adam's, so that both use one learning rate. `torch.optim.Muon` accepts matrices only
and computes in bf16, which is slow on CPUs without bf16 instructions; this one accepts convolutions and uses fp32.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["Muon", "orthogonalise"]

_A, _B, _C = 3.4445, -4.7750, 2.0315  # the quintic of Jordan et al.


class Muon(torch.optim.Optimizer):
    """Orthogonalised Nesterov momentum, for parameters of two or more axes: the first is rows, the rest columns."""

    def __init__(
        self, params: Iterable[Tensor], lr: float, *, momentum: float = 0.95, decay: float = 0.01
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalise(p.grad.lerp(state["momentum"], group["momentum"]).flatten(1))
                scale = 0.2 * max(update.shape) ** 0.5
                p.mul_(1 - group["lr"] * group["decay"])
                p.add_(update.view(p.shape), alpha=-group["lr"] * scale)


def orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """Return approximately the closest semi-orthogonal matrix: a quintic iteration brings singular values to about 1.

    Each step multiplies x by a polynomial of its Gram matrix. For a matrix at least twice as wide as high, the product
    of these small factors is computed first and applied once.
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.t()
    x = wide / (wide.norm() + 1e-7)
    x = _by_gram(x, steps) if x.shape[1] >= 2 * x.shape[0] else _direct(x, steps)
    return x if matrix.shape[0] <= matrix.shape[1] else x.t()


def _direct(x: Tensor, steps: int) -> Tensor:
    for _ in range(steps):
        x = torch.addmm(x, _factor(x @ x.t()), x, beta=_A)
    return x


def _by_gram(x: Tensor, steps: int) -> Tensor:
    gram = x @ x.t()
    product = torch.eye(len(x), dtype=x.dtype, device=x.device)
    for step in range(steps):
        factor = _factor(gram)
        factor.diagonal().add_(_A)
        product = factor @ product
        if step + 1 < steps:
            gram = factor @ gram @ factor  # of the next x; all these matrices commute
    return product @ x


def _factor(gram: Tensor) -> Tensor:
    return torch.addmm(gram, gram, gram, beta=_B, alpha=_C)
