r"""DiffGrad: Adam with a smaller step in coordinates whose gradient changes little.

.. math::

    m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
    \xi_t &= \mathrm{sigmoid}(|g_{t-1} - g_t|) \in [\tfrac12, 1), \qquad g_0 = 0 \\
    \theta_t &= \theta_{t-1} - \eta\, \xi_t\, \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon}

The friction :math:`\xi` scales the step; both moments equal Adam's. It depends on the magnitude of the gradient, so
unscale gradients before clipping or stepping. With ordinary networks it is close to one half, so that a comparison
needs Adam at half the learning rate.

Source: Dubey et al., 2020 (diffGrad), https://arxiv.org/abs/1909.11015, equations 11, 12 and 17 to 20.
Deviations: the previous gradient is stored as a copy (the authors' first release stored a reference, so that its
friction was always one half); `p.grad` is never written; L2 decay is added to a copy; complex parameters are treated as
pairs of real numbers; friction and step of half-precision parameters are computed in float32.
"""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from overpaint.optim.batches import Batch, Scaling
from overpaint.optim.foreach_path import step_foreach
from overpaint.optim.fused_path import step_fused
from overpaint.optim.loop_path import step_single
from overpaint.optim.options import check_capturable, check_options
from overpaint.optim.states import BUFFERS, adopt_group, complete_state, dtype_of_state
from overpaint.optim.torch_internals import grad_if_differentiable, prefers_lists

__all__ = ["DiffGrad"]

EpsMode = Literal["paper", "official"]


class DiffGrad(Optimizer):
    r"""The optimiser diffGrad, with the interface of `torch.optim.Adam`.

    Args:
        params: Parameters, or parameter groups with their options.
        lr: Learning rate :math:`\eta \ge 0`; with `foreach` a tensor of one element needs `capturable`.
        betas: Decay of the two moments, each in [0, 1).
        eps: Added to the denominator, :math:`\epsilon \ge 0`. At 0, coordinates with only zero gradients become NaN.
        weight_decay: :math:`\lambda \ge 0`, added to the gradient as L2 decay; the friction uses that sum.
        decoupled_weight_decay: Multiply the weights by :math:`1 - \eta \lambda` instead, as AdamW does.
        dfc: Variant of the friction, 0 (the method) to 5; see `overpaint.optim.friction`.
        eps_mode: `"paper"` adds `eps` to the corrected root, as torch's Adam; `"official"` to the uncorrected one, as
            the authors' code does, so that its runs can be resumed exactly.
        state_dtype: Dtype of the moments and the stored gradient; by default that of the parameter.
        foreach: Use operations on lists of tensors; by default under the same conditions as torch's optimisers.
        fused: Use torch's fused Adam kernel; the fastest path, also on a CPU. Off by default, as in torch.
        maximize: Maximise the objective instead.
        capturable: Keep the step count on the device, so that a CUDA graph can capture the step.
        differentiable: Make the step differentiable by autograd; it then runs one tensor after the other.

    Raises:
        ValueError: An option is out of range, or two contradict each other.
        RuntimeError: `fused` together with `foreach` or `differentiable`.

    State of a parameter: `step`, `exp_avg`, `exp_avg_sq`, `previous_grad`; 12 bytes for each float32 number. Parameters
    without a gradient are skipped, and their state does not change. State dicts of torch's Adam and AdamW (the friction
    then starts as at the first step), of the authors' code, of `torch_optimizer` and of `pytorch_optimizer` can be
    loaded.
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
        """True if `step` unscales gradients and skips overflows itself; `GradScaler` reads this attribute."""
        return all(group["fused"] for group in self.param_groups)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; missing options are the defaults, as in `torch.optim`."""
        check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            common = adopt_group(group, self.defaults)
            for p in group["params"]:
                if self.state.get(p):
                    complete_state(self.state[p], p, group, common)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict; moments keep `state_dtype`, whereas torch would cast them to the parameter's dtype."""
        super().load_state_dict(state_dict)
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            dtype = group["state_dtype"]
            for p, key in zip(group["params"], saved["params"], strict=True):
                state = state_dict["state"].get(key, {}) if dtype else {}
                for name in BUFFERS:
                    if name in state:
                        self.state[p][name] = state[name].to(p.device, dtype_of_state(p, dtype))

    @grad_if_differentiable
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update every parameter that has a gradient.

        Args:
            closure: Recomputes the gradients and returns the loss.

        Returns:
            The value that `closure` returned.

        Raises:
            RuntimeError: A gradient is sparse, or `capturable` is on and the parameters are on a CPU.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scaling = Scaling(getattr(self, "grad_scale", None), getattr(self, "found_inf", None))
        for group in self.param_groups:
            # torch.compile recognises a method of this name with lists of tensors, and runs it instead of tracing it.
            params, grads, exp_avgs, exp_avg_sqs, previous, steps = [], [], [], [], [], []
            self._init_group(group, params, grads, exp_avgs, exp_avg_sqs, previous, steps)
            if params:
                batch = Batch(params, grads, exp_avgs, exp_avg_sqs, previous, steps)
                _update(batch, group, scaling)
        return loss

    def _init_group(self, group: dict[str, Any], *lists: list[Tensor]) -> None:
        """Append parameters, gradients and states to `lists`, in the order of `Batch`; initialise missing states."""
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
                complete_state(state, p, group)
            params.append(p)
            grads.append(grad)
            exp_avgs.append(state["exp_avg"])
            exp_avg_sqs.append(state["exp_avg_sq"])
            previous.append(state["previous_grad"])
            steps.append(state["step"])


def _update(batch: Batch, group: dict[str, Any], scaling: Scaling) -> None:
    if group["capturable"] and not torch.compiler.is_compiling():
        check_capturable(batch.params, batch.steps)
    # Compilers cannot trace torch's kernel and generate their own. With a `GradScaler` the fused path must run, because
    # the others ignore its values.
    is_traced = torch.compiler.is_compiling() and scaling.found_inf is None
    if group["fused"] and not is_traced:
        step_fused(batch, group, scaling)
        return
    foreach, is_rate_fixed = group["foreach"], not isinstance(group["lr"], Tensor)
    if foreach is None and not group["differentiable"]:
        foreach = prefers_lists(batch.params) and (is_rate_fixed or group["capturable"])
    (step_foreach if foreach else step_single)(batch, group)
