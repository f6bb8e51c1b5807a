"""Weights that accelerate keeps outside their modules, and the device on which a module runs.

`enable_sequential_cpu_offload` and accelerate's `cpu_offload` replace each parameter by one on the meta device, and
store its numbers in a hook of the module that holds it.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

__all__ = ["run_device", "stored_tensor"]


def stored_tensor(module: Module, name: str) -> Tensor | None:
    """Return the tensor that accelerate stores in memory for the parameter `name` of `module`; `None` if there is none.

    Args:
        module: The module that holds the parameter itself, not one of its parents.
        name: Name of the parameter in that module.
    """
    for hook in _hooks(module):
        values = getattr(hook, "weights_map", None)
        if values is None:
            continue
        try:
            tensor = values[name]
            again = values[name]
        except (KeyError, OSError):
            continue
        # A map that reads from disk returns a new tensor at each access.
        if tensor is again and tensor.device.type != "meta":
            return tensor
    return None


def run_device(module: Module) -> torch.device:
    """Return the device of a module's weights, or the one that accelerate moves them to when it runs."""
    device = next(module.parameters()).device
    if device.type != "meta":
        return device
    for inner in module.modules():
        for hook in _hooks(inner):
            target = getattr(hook, "execution_device", None)
            if target is not None:
                return torch.device(target)
    return device


def _hooks(module: Module) -> list[Any]:
    hook = getattr(module, "_hf_hook", None)
    return list(getattr(hook, "hooks", [hook]))
