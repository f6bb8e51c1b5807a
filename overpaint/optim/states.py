"""States of DiffGrad: initialisation, and conversion from the states of other optimisers."""

from typing import Any

import torch
from torch import Tensor

__all__ = ["BUFFERS", "adopt_group", "complete_state", "dtype_of_state"]

BUFFERS = ("exp_avg", "exp_avg_sq", "previous_grad")
# Options of torch's Adam and of pytorch_optimizer's DiffGrad that change the update rule.
UNSUPPORTED = ("amsgrad", "ams_bound", "rectify", "adanorm", "fixed_decay", "adam_debias")


def complete_state(state: dict[str, Any], p: Tensor, group: dict[str, Any], step: Any = 0) -> None:
    """Add the missing buffers of a state, and move its step count to the device that `group` needs.

    Args:
        state: State of one parameter; changed in place.
        p: The parameter.
        group: Options of its group.
        step: Step count for states without one.
    """
    on_device = group["capturable"] or group["fused"]
    device = p.device if on_device else torch.device("cpu")
    count = state.get("step", step)
    if not isinstance(count, Tensor) or (on_device and count.device != device):
        state["step"] = torch.tensor(float(count), dtype=torch.float32, device=device)
    elif on_device and count.dtype != torch.float32:
        state["step"] = count.float()
    dtype = dtype_of_state(p, group["state_dtype"])
    for name in BUFFERS:
        if name not in state:
            state[name] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)


def dtype_of_state(p: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """Return the dtype of the buffers of `p`; complex if `p` is."""
    state_dtype = p.dtype if dtype is None else dtype
    if p.is_complex() and not state_dtype.is_complex:
        return state_dtype.to_complex()
    return state_dtype


def adopt_group(group: dict[str, Any], defaults: dict[str, Any]) -> Any:
    """Convert a parameter group of another optimiser, add missing options, and return its step count.

    Raises:
        ValueError: The other optimiser has an update rule that DiffGrad does not have.
    """
    for name in UNSUPPORTED:
        if group.pop(name, False):
            raise ValueError(
                f"this state was saved with `{name}`, which diffGrad does not have: start a new run, or continue with "
                "the optimiser that saved it."
            )
    if "weight_decouple" in group:
        group["decoupled_weight_decay"] = group.pop("weight_decouple")
    for name, value in defaults.items():
        group.setdefault(name, value)
    return group.pop("step", 0)  # pytorch_optimizer stores the count in the group
