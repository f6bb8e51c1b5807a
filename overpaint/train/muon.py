"""Muon: momentum whose update is orthogonalised, for the matrices and convolutions inside a network.

Jordan et al., 2024, https://kellerjordan.github.io/posts/muon, with the scale of Liu et al., 2025 (arXiv:2502.16982),
which gives an update the size of Adam's, so that both take one learning rate. `torch.optim.Muon` takes matrices only
and works in bf16, which CPUs without the instruction emulate slowly; this one takes convolutions and stays in fp32.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["Muon", "orthogonalise"]


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised; parameters of two or more axes, the first is rows, the rest columns."""

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
    """Return nearly the closest semi-orthogonal matrix: the singular values go to about 1, by a quintic iteration."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.t()
    x = wide / (wide.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.t()
        x = 3.4445 * x + torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315) @ x
    return x if matrix.shape[0] <= matrix.shape[1] else x.t()
