r"""DiffGrad: Adam, whose step in each coordinate is damped where the gradient has stopped changing.

.. math::

    m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
    \xi_t &= \mathrm{sigmoid}(|g_{t-1} - g_t|) \in [\tfrac12, 1), \qquad g_0 = 0 \\
    \theta_t &= \theta_{t-1} - \eta\, \xi_t\, \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon}

The friction :math:`\xi` damps the step and leaves both moments as Adam has them. It depends on the size of the
gradient, so unscale before clipping or stepping. With ordinary networks it stays near one half: compare with Adam at
half the learning rate before you credit it with anything.

Source: Dubey et al., 2020 (diffGrad), https://arxiv.org/abs/1909.11015, equations 11, 12 and 17 to 20.
Deviations: the previous gradient is kept by value (the first release kept a reference, so that its friction was one
half for ever); `p.grad` is never written to; L2 decay is added to a copy; complex parameters are treated as pairs of
real numbers; friction and step of half-precision parameters are computed in float32, where it does not round away.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

# Private, but all of torch's own optimisers are built on them, and no public name does the same.
from torch.optim.optimizer import (
    _default_to_fused_or_foreach,  # pyright: ignore[reportPrivateUsage]
    _disable_dynamo_if_unsupported,  # pyright: ignore[reportPrivateUsage]
    _use_grad_for_differentiable,  # pyright: ignore[reportPrivateUsage]
)

__all__ = ["DiffGrad"]

EpsMode = Literal["paper", "official"]
_HALVES = (torch.float16, torch.bfloat16)
_BUFFERS = ("exp_avg", "exp_avg_sq", "previous_grad")


@dataclass
class _Batch:
    """Parameters with a gradient, and their state, index by index."""

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    previous: list[Tensor]
    steps: list[Tensor]

    @property
    def lists(self) -> list[list[Tensor]]:
        return [
            self.params,
            self.grads,
            self.exp_avgs,
            self.exp_avg_sqs,
            self.previous,
            self.steps,
        ]


class DiffGrad(Optimizer):
    r"""Implements diffGrad in the interface of `torch.optim.Adam`.

    Args:
        params: Parameters, or groups of them with options of their own.
        lr: Learning rate :math:`\eta \ge 0`; a tensor of one element needs `capturable` where `foreach` is on.
        betas: Decay of the two moments, each in [0, 1).
        eps: Added to the denominator, :math:`\epsilon \ge 0`. At 0 a gradient that has always been 0 gives 0 / 0.
        weight_decay: :math:`\lambda \ge 0`, added to the gradient as L2; the friction then sees the decayed gradient.
        decoupled_weight_decay: Shrink the weights by :math:`\eta \lambda` instead, as AdamW does.
        eps_mode: `"paper"` adds `eps` to the corrected root, as torch's Adam; `"official"` to the uncorrected one, as
            the authors' code does, so that its runs can be resumed exactly.
        state_dtype: Number format of the moments and the stored gradient; that of the parameter if `None`.
        foreach: Work on lists of tensors; by default where torch's own optimisers do.
        maximize: Climb instead of descend.
        capturable: Keep the step count on the device, so that a CUDA graph can hold the step.
        differentiable: Let autograd go through the step; one tensor at a time.

    Raises:
        ValueError: An option is out of range.

    State of a parameter: `step`, `exp_avg`, `exp_avg_sq`, `previous_grad`; 12 bytes a float32 parameter. A parameter
    without a gradient is skipped, and keeps its state. State dicts of torch's Adam and AdamW (their friction starts as
    at the first step), of the authors' code and of `pytorch_optimizer` can be loaded.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        decoupled_weight_decay: bool = False,
        eps_mode: EpsMode = "paper",
        state_dtype: torch.dtype | None = None,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        defaults: dict[str, Any] = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay, "eps_mode": eps_mode, "state_dtype": state_dtype,
            "foreach": foreach, "maximize": maximize, "capturable": capturable, "differentiable": differentiable,
        }  # fmt: skip
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; options that it does not name are the defaults. As in `torch.optim`."""
        _check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            _adopt(group)
            for name, value in self.defaults.items():
                group.setdefault(name, value)
            shared = group.pop("step", None)  # pytorch_optimizer counts in the group
            for p in group["params"]:
                if self.state.get(p):
                    _complete(self.state[p], p, group, shared)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave; moments keep `state_dtype`, which torch alone would round to the parameter's."""
        super().load_state_dict(state_dict)
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            dtype = group["state_dtype"]
            for p, key in zip(group["params"], saved["params"], strict=True):
                found = state_dict["state"].get(key, {}) if dtype else {}
                for name in _BUFFERS:
                    if name in found:
                        self.state[p][name] = found[name].to(_dtype_of_state(p, dtype)).to(p.device)

    @_use_grad_for_differentiable
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update every parameter that has a gradient.

        Args:
            closure: Computes the gradients anew and returns the loss.

        Returns:
            What `closure` returned.

        Raises:
            RuntimeError: A gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            batch = _Batch([], [], [], [], [], [])
            self._init_group(group, batch)
            if batch.params:
                _update(*batch.lists, **_options(group))
        return loss

    def _init_group(self, group: dict[str, Any], batch: _Batch) -> None:
        for p in group["params"]:
            if p.grad is None:
                continue
            if p.grad.is_sparse:
                raise RuntimeError(
                    "DiffGrad does not support sparse gradients: build the embedding with sparse=False, or use "
                    "torch.optim.SparseAdam for it."
                )
            state = self.state[p]
            if len(state) == 0:
                _complete(state, p, group, 0)
            for into, value in zip(
                batch.lists,
                (p, p.grad, *(state[name] for name in _BUFFERS), state["step"]),
                strict=True,
            ):
                into.append(value)


def _options(group: dict[str, Any]) -> dict[str, Any]:
    names = (
        "lr", "eps", "weight_decay", "decoupled_weight_decay", "eps_mode", "maximize", "capturable",
        "differentiable", "foreach",
    )  # fmt: skip
    beta1, beta2 = group["betas"]
    return {"beta1": beta1, "beta2": beta2, **{name: group[name] for name in names}}


def _loop(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    previous: list[Tensor],
    steps: list[Tensor],
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled_weight_decay: bool,
    eps_mode: EpsMode,
    maximize: bool,
    capturable: bool,
    differentiable: bool,
) -> None:
    for p, given, m, v, last, step in zip(
        params, grads, exp_avgs, exp_avg_sqs, previous, steps, strict=True
    ):
        grad = -given if maximize else given
        step += 1
        if weight_decay != 0 and decoupled_weight_decay:
            p.mul_(1 - lr * weight_decay)
        elif weight_decay != 0:
            grad = grad.add(p, alpha=weight_decay)
        if p.is_complex():
            p, grad, m, v, last = (torch.view_as_real(t) for t in (p, grad, m, v, last))
        if grad.dtype != m.dtype:
            grad = grad.to(m.dtype)
        m.lerp_(grad, 1 - beta1)
        v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        size, offset = _scalars(
            step, lr, beta1, beta2, eps, eps_mode, on_device=capturable or differentiable
        )
        if differentiable:
            root = v.sqrt() + offset  # the root is kept for its own derivative
            damped = (last - grad).abs().sigmoid() * m.clone()
            p.add_(-size * damped / root)
        elif m.dtype in _HALVES:
            root = v.float().sqrt_().add_(offset)
            damped = last.float().sub_(grad).abs_().sigmoid_().mul_(m)
            p.add_(damped.div_(root).mul_(-size))
        else:  # the stored gradient is the scratch: it is written anew below
            root = v.sqrt().add_(offset)
            damped = last.sub_(grad).abs_().sigmoid_().mul_(m)
            if isinstance(size, Tensor) or m.dtype != p.dtype:
                p.add_(damped.div_(root).mul_(-size))
            else:
                p.addcdiv_(damped, root, value=-size)
        last.copy_(grad)


def _lists(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    previous: list[Tensor],
    steps: list[Tensor],
    **options: Any,
) -> None:
    grouped = Optimizer._group_tensors_by_device_and_dtype(
        cast(Any, [params, grads, exp_avgs, exp_avg_sqs, previous, steps])
    )
    for lists, _ in grouped.values():
        _lists_alike(*cast(list[list[Tensor]], lists), **options)


def _lists_alike(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    previous: list[Tensor],
    steps: list[Tensor],
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled_weight_decay: bool,
    eps_mode: EpsMode,
    maximize: bool,
    capturable: bool,
    differentiable: bool,
) -> None:
    """Update parameters of one device and dtype, an operation at a time for all of them."""
    assert not differentiable, "autograd does not go through lists"
    real = [t for ts in (params, grads, exp_avgs, exp_avg_sqs, previous) for t in (_real(ts),)]
    params, grads, exp_avgs, exp_avg_sqs, previous = real
    if maximize:
        grads = list(torch._foreach_neg(grads))
    _count(steps)
    if weight_decay != 0 and decoupled_weight_decay:
        torch._foreach_mul_(params, 1 - lr * weight_decay)
    elif weight_decay != 0:
        grads = list(torch._foreach_add(grads, params, alpha=weight_decay))
    kept = exp_avgs[0].dtype
    if grads[0].dtype != kept:
        grads = [grad.to(kept) for grad in grads]
    torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)
    torch._foreach_mul_(exp_avg_sqs, beta2)
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - beta2)
    scalars = [_scalars(s, lr, beta1, beta2, eps, eps_mode, on_device=capturable) for s in steps]
    wide = torch.float32 if kept in _HALVES else kept
    roots = list(torch._foreach_sqrt(_as(exp_avg_sqs, wide)))
    damped = _as(
        previous, wide
    )  # the stored gradients are the scratch: they are written anew below
    torch._foreach_add_(roots, [offset for _, offset in scalars])
    torch._foreach_sub_(damped, _as(grads, wide))
    torch._foreach_abs_(damped)
    torch._foreach_sigmoid_(damped)
    torch._foreach_mul_(damped, _as(exp_avgs, wide))
    sizes = [-size for size, _ in scalars]
    if capturable or wide != params[0].dtype:
        torch._foreach_div_(damped, roots)
        torch._foreach_mul_(damped, sizes)
        torch._foreach_add_(params, damped)
    else:
        torch._foreach_addcdiv_(params, damped, roots, cast(list[float], sizes))
    _store(previous, grads)


@_disable_dynamo_if_unsupported(single_tensor_fn=_loop)
def _update(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    previous: list[Tensor],
    steps: list[Tensor],
    *,
    foreach: bool | None,
    capturable: bool,
    differentiable: bool,
    lr: float | Tensor,
    **options: Any,
) -> None:
    if foreach is None:
        _, foreach = _default_to_fused_or_foreach(params, differentiable, use_fused=False)
        foreach = foreach and not (isinstance(lr, Tensor) and not capturable)
    if capturable and not torch.compiler.is_compiling():
        _check_capturable(params, steps)
    run = _lists if foreach and not differentiable else _loop
    run(
        params, grads, exp_avgs, exp_avg_sqs, previous, steps,
        lr=lr, capturable=capturable, differentiable=differentiable, **options,
    )  # fmt: skip


def _scalars(
    step: Tensor,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    eps_mode: EpsMode,
    *,
    on_device: bool,
) -> tuple[Any, Any]:
    """Return the size of the step and what to add to the uncorrected root of the second moment.

    Both corrections are folded into these two numbers, which spares a pass over the second moment.
    """
    t = step if on_device or torch.compiler.is_compiling() else step.item()
    root = (1 - beta2**t) ** 0.5
    return lr * root / (1 - beta1**t), (eps * root if eps_mode == "paper" else eps)


def _count(steps: list[Tensor]) -> None:
    if steps[0].is_cpu and not torch.compiler.is_compiling():
        torch._foreach_add_(
            steps, torch.tensor(1.0), alpha=1.0
        )  # a number would be wrapped once each
    else:
        torch._foreach_add_(steps, 1)


def _store(previous: list[Tensor], grads: list[Tensor]) -> None:
    if type(previous[0]) is Tensor:
        torch._foreach_copy_(previous, grads)
    else:  # sharded tensors have no strategy for copying lists
        for last, grad in zip(previous, grads, strict=True):
            last.copy_(grad)


def _real(tensors: list[Tensor]) -> list[Tensor]:
    return [torch.view_as_real(t) if t.is_complex() else t for t in tensors]


def _as(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return tensors if tensors[0].dtype == dtype else [t.to(dtype) for t in tensors]


def _dtype_of_state(p: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    wanted = p.dtype if dtype is None else dtype
    return wanted.to_complex() if p.is_complex() and not wanted.is_complex else wanted


def _complete(state: dict[str, Any], p: Tensor, group: dict[str, Any], shared: Any) -> None:
    """Fill in what a fresh or a foreign state lacks, and make the step a tensor where `group` wants it."""
    step = state.get("step", 0 if shared is None else shared)
    device = p.device if group["capturable"] else torch.device("cpu")
    if not isinstance(step, Tensor) or (group["capturable"] and step.device != device):
        state["step"] = torch.tensor(float(step), dtype=torch.float32, device=device)
    dtype = _dtype_of_state(p, group["state_dtype"])
    for name in _BUFFERS:
        if name not in state:
            state[name] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)


def _adopt(group: dict[str, Any]) -> None:
    """Translate a group that another optimiser saved, or refuse what DiffGrad does not do."""
    for name in ("amsgrad", "ams_bound", "rectify", "adanorm", "fixed_decay"):
        if group.pop(name, False):
            raise ValueError(
                f"this state was saved with `{name}`, which diffGrad does not have: start a new run, or go on with the "
                "optimiser that saved it."
            )
    if "weight_decouple" in group:
        group["decoupled_weight_decay"] = group.pop("weight_decouple")


def _check_options(options: dict[str, Any]) -> None:
    lr, betas = options["lr"], options["betas"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(
                f"`lr` must be a number or a tensor of one element, got shape {tuple(lr.shape)}: give groups their own."
            )
        if options["foreach"] and not options["capturable"]:
            raise ValueError(
                "`lr` is a tensor, which `foreach=True` takes with `capturable=True` only: give a number, or leave "
                "`foreach` out."
            )
    for name in ("lr", "eps", "weight_decay"):
        if not options[name] >= 0:
            raise ValueError(f"`{name}` must be 0 or more, got {options[name]!r}. Check the call.")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(
            f"`betas` must be two numbers in [0, 1), got {betas!r}. (0.9, 0.999) is usual."
        )
    if options["eps_mode"] not in ("paper", "official"):
        raise ValueError(
            f"`eps_mode` must be 'paper' or 'official', got {options['eps_mode']!r}. Leave it out for the paper's."
        )
    dtype = options["state_dtype"]
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"`state_dtype` must be a floating-point dtype, got {dtype}. Try float32.")
    if options["foreach"] and options["differentiable"]:
        raise ValueError(
            "`foreach` and `differentiable` exclude each other: autograd does not go through lists. Leave `foreach` "
            "out."
        )


def _check_capturable(params: list[Tensor], steps: list[Tensor]) -> None:
    kinds = ("cuda", "xpu", "hpu", "xla")
    if not all(
        p.device.type in kinds and p.device == s.device for p, s in zip(params, steps, strict=True)
    ):
        raise RuntimeError(
            f"`capturable=True` needs parameters and step counts on one of {', '.join(kinds)}: move the model there, "
            "or leave it out."
        )
