"""States of DiffGrad: made anew, or taken up from another optimiser."""

from typing import Any

import torch
from torch import Tensor

__all__ = ["BUFFERS", "adopt_group", "complete", "dtype_of_state"]

BUFFERS = ("exp_avg", "exp_avg_sq", "previous_grad")
# Options of torch's Adam and of pytorch_optimizer's DiffGrad that make another rule of it.
REFUSED = ("amsgrad", "ams_bound", "rectify", "adanorm", "fixed_decay", "adam_debias")


def complete(state: dict[str, Any], p: Tensor, group: dict[str, Any], step: Any = 0) -> None:
    """Fill in what a fresh or a foreign state lacks, and bring the step count to where `group` wants it.

    Args:
        state: Of one parameter; changed in place.
        p: The parameter.
        group: Options of its group.
        step: The count where the state has none of its own.
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
    """Return the number format of the buffers of `p`, complex where `p` is."""
    wanted = p.dtype if dtype is None else dtype
    return wanted.to_complex() if p.is_complex() and not wanted.is_complex else wanted


def adopt_group(group: dict[str, Any], defaults: dict[str, Any]) -> Any:
    """Translate a group that another optimiser saved, fill in its options, and return its common step count.

    Raises:
        ValueError: The other optimiser did what DiffGrad does not do.
    """
    for name in REFUSED:
        if group.pop(name, False):
            raise ValueError(
                f"this state was saved with `{name}`, which diffGrad does not have: start a new run, or go on with the "
                "optimiser that saved it."
            )
    if "weight_decouple" in group:
        group["decoupled_weight_decay"] = group.pop("weight_decouple")
    for name, value in defaults.items():
        group.setdefault(name, value)
    return group.pop("step", 0)  # pytorch_optimizer counts in the group
