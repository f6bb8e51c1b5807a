"""The foreach path: a step of DiffGrad on lists of tensors."""

import torch
from torch import Tensor

from overpaint.optim.batches import (
    Batch,
    Options,
    cast,
    count_steps,
    decayed,
    scalar_lists,
    step_dtype,
    store,
)
from overpaint.optim.friction_variants import friction_list

__all__ = ["step_foreach"]


def step_foreach(batch: Batch, options: Options) -> None:
    """Update lists of tensors, with one call of each operation for all; results equal `step_single` bit for bit."""
    for part in batch.split_by_dtype():
        count_steps(part.steps)
        for piece in part.pieces(options):
            _step_group(piece, options)


def _step_group(batch: Batch, options: Options) -> None:
    beta1, beta2 = options["betas"]
    params, exp_avgs, exp_avg_sqs = batch.params, batch.exp_avgs, batch.exp_avg_sqs
    grads = decayed(batch, batch.grads, options)
    torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)
    torch._foreach_mul_(exp_avg_sqs, beta2)
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - beta2)
    sizes, offsets = scalar_lists(batch, options)
    dtype = step_dtype(exp_avgs[0])
    roots = list(torch._foreach_sqrt(cast(exp_avg_sqs, dtype)))
    torch._foreach_add_(roots, offsets)
    updates = friction_list(
        cast(batch.previous, dtype), cast(grads, dtype), cast(exp_avgs, dtype), options["dfc"]
    )
    if isinstance(sizes[0], Tensor) or dtype != params[0].dtype:
        torch._foreach_div_(updates, roots)
        torch._foreach_mul_(updates, sizes)
        torch._foreach_add_(params, updates)
    else:
        torch._foreach_addcdiv_(params, updates, roots, sizes)
    store(batch.previous, grads)
