"""The two private functions of torch that its own optimisers are built on, with a stand-in should one be gone."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

__all__ = ["grad_if_differentiable", "prefers_lists"]


def _grad_if_differentiable(step: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(step)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            return step(self, *args, **kwargs)

    return wrapped


def _default_path(params: list[Tensor], differentiable: bool, use_fused: bool) -> tuple[bool, bool]:
    plain = (Tensor, torch.nn.Parameter)
    return use_fused, not differentiable and all(type(p) in plain and p.is_cuda for p in params)


try:
    from torch.optim.optimizer import (
        _use_grad_for_differentiable as grad_if_differentiable,  # pyright: ignore[reportPrivateUsage]
    )
except ImportError:
    grad_if_differentiable = _grad_if_differentiable
try:
    from torch.optim.optimizer import (
        _default_to_fused_or_foreach as _default,  # pyright: ignore[reportPrivateUsage]
    )
except ImportError:
    _default = _default_path


def prefers_lists(params: list[Tensor]) -> bool:
    """Return whether torch's own optimisers would take these tensors as lists: on accelerators, not on a CPU."""
    return _default(params, False, use_fused=False)[1]
