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
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from overpaint.optim.options import check_capturable, check_options
from overpaint.optim.paths import (
    Batch,
    Scaling,
    step_fused,
    step_lists,
    step_loop,
)
from overpaint.optim.private import grad_if_differentiable, prefers_lists
from overpaint.optim.states import BUFFERS, adopt_group, complete, dtype_of_state

__all__ = ["DiffGrad"]

EpsMode = Literal["paper", "official"]


class DiffGrad(Optimizer):
    r"""Implements diffGrad in the interface of `torch.optim.Adam`.

    Args:
        params: Parameters, or groups of them with options of their own.
        lr: Learning rate :math:`\eta \ge 0`; a tensor of one element needs `capturable` where `foreach` is on.
        betas: Decay of the two moments, each in [0, 1).
        eps: Added to the denominator, :math:`\epsilon \ge 0`. At 0 a gradient that has always been 0 gives 0 / 0.
        weight_decay: :math:`\lambda \ge 0`, added to the gradient as L2; the friction then sees the decayed gradient.
        decoupled_weight_decay: Shrink the weights by :math:`\eta \lambda` instead, as AdamW does.
        dfc: Variant of the friction, 0 (the method) to 5; see `overpaint.optim.friction`.
        eps_mode: `"paper"` adds `eps` to the corrected root, as torch's Adam; `"official"` to the uncorrected one, as
            the authors' code does, so that its runs can be resumed exactly.
        state_dtype: Number format of the moments and the stored gradient; that of the parameter if `None`.
        foreach: Work on lists of tensors; by default where torch's own optimisers do.
        fused: Let torch's fused Adam kernel do Adam's part; the fastest path, on a CPU too. Off by default, as there.
        maximize: Climb instead of descend.
        capturable: Keep the step count on the device, so that a CUDA graph can hold the step.
        differentiable: Let autograd go through the step; one tensor at a time.

    Raises:
        ValueError: An option is out of range, or two contradict each other.
        RuntimeError: `fused` together with `foreach` or `differentiable`.

    State of a parameter: `step`, `exp_avg`, `exp_avg_sq`, `previous_grad`; 12 bytes a float32 parameter. A parameter
    without a gradient is skipped, and keeps its state. State dicts of torch's Adam and AdamW (their friction starts as
    at the first step), of the authors' code, of `torch_optimizer` and of `pytorch_optimizer` can be loaded.
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
        dfc: int = 0,
        eps_mode: EpsMode = "paper",
        state_dtype: torch.dtype | None = None,
        foreach: bool | None = None,
        fused: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        defaults: dict[str, Any] = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay, "dfc": dfc, "eps_mode": eps_mode,
            "state_dtype": state_dtype, "foreach": foreach, "fused": fused, "maximize": maximize,
            "capturable": capturable, "differentiable": differentiable,
        }  # fmt: skip
        super().__init__(params, defaults)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether `GradScaler` may leave unscaling and skipping to the step: it asks for this name."""
        return all(group["fused"] for group in self.param_groups)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; options that it does not name are the defaults. As in `torch.optim`."""
        check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            common = adopt_group(group, self.defaults)
            for p in group["params"]:
                if self.state.get(p):
                    complete(self.state[p], p, group, common)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave; moments keep `state_dtype`, which torch alone would round to the parameter's."""
        super().load_state_dict(state_dict)
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            dtype = group["state_dtype"]
            for p, key in zip(group["params"], saved["params"], strict=True):
                found = state_dict["state"].get(key, {}) if dtype else {}
                for name in BUFFERS:
                    if name in found:
                        self.state[p][name] = found[name].to(p.device, dtype_of_state(p, dtype))

    @grad_if_differentiable
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update every parameter that has a gradient.

        Args:
            closure: Computes the gradients anew and returns the loss.

        Returns:
            What `closure` returned.

        Raises:
            RuntimeError: A gradient is sparse, or `capturable` is on and the parameters are on a CPU.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scaling = Scaling(getattr(self, "grad_scale", None), getattr(self, "found_inf", None))
        for group in self.param_groups:
            # Six bare lists and this method's name: torch.compile knows both, and runs it instead of tracing it.
            params, grads, exp_avgs, exp_avg_sqs, previous, steps = [], [], [], [], [], []
            self._init_group(group, params, grads, exp_avgs, exp_avg_sqs, previous, steps)
            if params:
                batch = Batch(params, grads, exp_avgs, exp_avg_sqs, previous, steps)
                _update(batch, group, scaling)
        return loss

    def _init_group(self, group: dict[str, Any], *lists: list[Tensor]) -> None:
        """Gather what the step needs, in the order of `Batch`, and make the state of what is new."""
        params, grads, exp_avgs, exp_avg_sqs, previous, steps = lists
        for p in group["params"]:
            grad = p.grad
            if grad is None:
                continue
            if grad.is_sparse:
                raise RuntimeError(
                    "DiffGrad does not support sparse gradients: build the embedding with sparse=False, or use "
                    "torch.optim.SparseAdam for it."
                )
            state = self.state[p]
            if len(state) == 0:
                complete(state, p, group)
            params.append(p)
            grads.append(grad)
            exp_avgs.append(state["exp_avg"])
            exp_avg_sqs.append(state["exp_avg_sq"])
            previous.append(state["previous_grad"])
            steps.append(state["step"])


def _update(batch: Batch, group: dict[str, Any], scaling: Scaling) -> None:
    if group["capturable"] and not torch.compiler.is_compiling():
        check_capturable(batch.params, batch.steps)
    # Compilers cannot trace torch's kernel, and make one themselves; with scaling they must fail, not forget it.
    traced = torch.compiler.is_compiling() and scaling.found_inf is None
    if group["fused"] and not traced:
        step_fused(batch, group, scaling)
        return
    foreach, fixed_rate = group["foreach"], not isinstance(group["lr"], Tensor)
    if foreach is None and not group["differentiable"]:
        foreach = prefers_lists(batch.params) and (fixed_rate or group["capturable"])
    (step_lists if foreach else step_loop)(batch, group)
