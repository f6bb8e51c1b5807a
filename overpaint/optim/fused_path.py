"""The fused path: torch's fused Adam kernel computes Adam's step, which the friction then scales."""

import torch
from torch import Tensor

from overpaint.optim.batches import (
    Batch,
    Options,
    Scaling,
    cast,
    count_steps,
    decayed,
    step_dtype,
    store,
)
from overpaint.optim.friction_variants import friction_list

__all__ = ["step_fused"]


def step_fused(batch: Batch, options: Options, scaling: Scaling) -> None:
    """Compute Adam's step with torch's fused kernel, and add it, times the friction, to the parameters.

    The moments equal those of torch's fused Adam bit for bit. If a gradient overflowed (`scaling.found_inf`), nothing
    changes; this needs no synchronisation with the device.
    """
    for part in batch.split_by_dtype():
        device = part.params[0].device
        grad_scale, found_inf = (
            None if t is None else t.to(device) for t in (scaling.grad_scale, scaling.found_inf)
        )
        count_steps(part.steps)
        for piece in part.pieces(options):
            _step_kernel(piece, options, Scaling(grad_scale, found_inf))
        if found_inf is not None:
            torch._foreach_sub_(part.steps, [found_inf] * len(part.steps))


def _step_kernel(batch: Batch, options: Options, scaling: Scaling) -> None:
    params, previous = batch.params, batch.previous
    grads, found_inf = batch.grads, scaling.found_inf
    if scaling.grad_scale is not None:
        grads = list(torch._foreach_div(grads, scaling.grad_scale))
    grads = decayed(batch, grads, options, skip=found_inf)
    if found_inf is not None:  # after an overflow, the stored gradient is used again
        pairs = zip(previous, grads, strict=True)
        grads = [torch.where(found_inf.bool(), last, grad) for last, grad in pairs]
    adam_steps = _adam_steps(batch, grads, options, found_inf)
    dtype = adam_steps[0].dtype
    xi = friction_list(cast(previous, dtype), cast(grads, dtype), None, options["dfc"])
    if dtype == params[0].dtype:
        torch._foreach_addcmul_(params, xi, adam_steps)
    else:
        torch._foreach_mul_(xi, adam_steps)
        torch._foreach_add_(params, xi)
    store(previous, grads)


def _adam_steps(
    batch: Batch, grads: list[Tensor], options: Options, found_inf: Tensor | None
) -> list[Tensor]:
    """Return Adam's step for each parameter and update the moments; computed at least in float32, to round once."""
    stored_dtype, dtype = batch.exp_avgs[0].dtype, step_dtype(batch.exp_avgs[0])
    exp_avgs, exp_avg_sqs = cast(batch.exp_avgs, dtype), cast(batch.exp_avg_sqs, dtype)
    grads = cast(grads, dtype)
    adam_steps = [torch.zeros_like(m) for m in exp_avgs]
    if not all(map(Tensor.is_contiguous, [*grads, *adam_steps])):
        # The kernel reads memory in order, so all tensors must have the same strides.
        grads = [
            grad if grad.stride() == m.stride() else torch.empty_like(m).copy_(grad)
            for grad, m in zip(grads, exp_avgs, strict=True)
        ]
    (beta1, beta2), lr = options["betas"], options["lr"]
    if isinstance(lr, Tensor) and not lr.is_cpu:
        lr = lr.to(adam_steps[0].device)
    lists = [adam_steps, grads, exp_avgs, exp_avg_sqs, batch.steps]
    for rows, eps in _rows_by_epsilon(batch.steps, options):
        part = lists if rows is None else [[whole[i] for i in rows] for whole in lists]
        torch._fused_adam_(
            part[0], part[1], part[2], part[3], [], part[4], lr=lr, beta1=beta1, beta2=beta2,
            weight_decay=0.0, eps=eps, amsgrad=False, maximize=False, grad_scale=None, found_inf=found_inf,
        )  # fmt: skip
    if dtype != stored_dtype:
        store(batch.exp_avgs, exp_avgs)
        store(batch.exp_avg_sqs, exp_avg_sqs)
    return adam_steps


def _rows_by_epsilon(steps: list[Tensor], options: Options) -> list[tuple[list[int] | None, float]]:
    """Return the rows of each kernel call and its epsilon; the official epsilon depends on the step count."""
    if options["eps_mode"] == "paper":
        return [(None, options["eps"])]
    rows: dict[float, list[int]] = {}
    for i, step in enumerate(steps):
        rows.setdefault(step.item(), []).append(i)
    beta2 = options["betas"][1]
    return [(group, options["eps"] / (1 - beta2**t) ** 0.5) for t, group in rows.items()]
