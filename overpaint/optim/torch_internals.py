"""Three private functions of torch that its optimisers use, each with a fallback for releases without it."""

from collections.abc import Callable
from functools import wraps
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["grad_if_differentiable", "group_by_device_and_dtype", "prefers_lists"]


def _grad_if_differentiable(step: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(step)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            return step(self, *args, **kwargs)

    return wrapped


def _default_path(params: list[Tensor], differentiable: bool, use_fused: bool) -> tuple[bool, bool]:
    plain = (Tensor, torch.nn.Parameter)
    return use_fused, not differentiable and all(type(p) in plain and p.is_cuda for p in params)


def _group(lists: list[list[Tensor]]) -> dict[Any, tuple[list[list[Tensor]], Any]]:
    rows: dict[Any, list[tuple[Tensor, ...]]] = {}
    for row in zip(*lists, strict=True):
        rows.setdefault((row[0].device, row[0].dtype), []).append(row)
    return {key: (list(map(list, zip(*group, strict=True))), None) for key, group in rows.items()}


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
    """Return whether torch's optimisers use the foreach path for these tensors: on accelerators, not on a CPU."""
    return _default(params, False, use_fused=False)[1]


def group_by_device_and_dtype(lists: list[list[Tensor]]) -> list[list[list[Tensor]]]:
    """Return `lists`, which have one length, split by device and dtype of the tensors in the first list."""
    group = getattr(Optimizer, "_group_tensors_by_device_and_dtype", _group)
    return [tensors for tensors, _ in group(cast(Any, lists)).values()]
