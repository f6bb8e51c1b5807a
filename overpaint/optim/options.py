"""Checks of DiffGrad's options. The ranges are those of torch's Adam."""

from typing import Any

from torch import Tensor

from overpaint.optim.friction_variants import check_variant

__all__ = ["check_capturable", "check_options"]

_CAPTURABLE = ("cuda", "xpu", "hpu", "xla")


def check_options(options: dict[str, Any]) -> None:
    """Check the options of one parameter group.

    Raises:
        ValueError: An option is out of range, or two contradict each other.
        RuntimeError: `fused` contradicts `foreach` or `differentiable`, as in torch's Adam.
    """
    _check_rate(options)
    for name in ("lr", "eps", "weight_decay"):
        if not options[name] >= 0:
            raise ValueError(f"`{name}` must be 0 or more, got {options[name]!r}.")
    betas = options["betas"]
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(
            f"`betas` must be two numbers in [0, 1), got {betas!r}. (0.9, 0.999) is usual."
        )
    check_variant(options["dfc"])
    if options["eps_mode"] not in ("paper", "official"):
        raise ValueError(
            f"`eps_mode` must be 'paper' or 'official', got {options['eps_mode']!r}. Omit it for the paper's."
        )
    dtype = options["state_dtype"]
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"`state_dtype` must be a floating-point dtype, got {dtype}. Try float32.")
    _check_paths(options)


def _check_rate(options: dict[str, Any]) -> None:
    lr = options["lr"]
    if not isinstance(lr, Tensor):
        return
    if lr.numel() != 1:
        raise ValueError(
            f"`lr` must be a number or a tensor of one element, got shape {tuple(lr.shape)}: use parameter groups for "
            "several rates."
        )
    if options["foreach"] and not options["capturable"]:
        raise ValueError(
            "`lr` is a tensor, which `foreach=True` supports only with `capturable=True`: give a number, or omit "
            "`foreach`."
        )


def _check_paths(options: dict[str, Any]) -> None:
    if options["fused"] and options["foreach"]:
        raise RuntimeError(
            "`fused` and `foreach` exclude each other: a step has one path. Omit `foreach`."
        )
    if options["fused"] and options["differentiable"]:
        raise RuntimeError(
            "`fused` and `differentiable` exclude each other: autograd does not support the kernel. Omit `fused`."
        )
    if options["foreach"] and options["differentiable"]:
        raise ValueError(
            "`foreach` and `differentiable` exclude each other: autograd does not support in-place lists. Omit "
            "`foreach`."
        )
    if options["fused"] and options["capturable"] and options["eps_mode"] == "official":
        raise ValueError(
            "`eps_mode='official'` with `fused=True` reads the step count, which `capturable=True` forbids: use "
            "`foreach=True`, or the paper's `eps_mode`."
        )


def check_capturable(params: list[Tensor], steps: list[Tensor]) -> None:
    """Raise unless a CUDA graph can capture the step of these parameters.

    Raises:
        RuntimeError: A parameter or step count is on an unsupported device.
    """
    pairs = zip(params, steps, strict=True)
    if not all(p.device.type in _CAPTURABLE and p.device == s.device for p, s in pairs):
        raise RuntimeError(
            f"`capturable=True` needs parameters and step counts on one of {', '.join(_CAPTURABLE)}: move the model "
            "there, or omit it."
        )
