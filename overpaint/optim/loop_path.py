"""The loop path: a step of DiffGrad, one tensor after the other."""

import torch
from torch import Tensor

from overpaint.optim.batches import (
    HALVES,
    Batch,
    Options,
    cast_scalars,
    is_on_device,
    step_scalars,
)
from overpaint.optim.friction_variants import friction, inverse_friction

__all__ = ["step_single"]


def step_single(batch: Batch, options: Options) -> None:
    """Update one tensor after the other."""
    for p, grad, m, v, last, step in zip(*batch.lists, strict=True):
        _step_one(p, grad, m, v, last, step, options)


def _step_one(
    p: Tensor, grad: Tensor, m: Tensor, v: Tensor, last: Tensor, step: Tensor, options: Options
) -> None:
    beta1, beta2 = options["betas"]
    dfc, decay = options["dfc"], options["weight_decay"]
    if options["maximize"]:
        grad = -grad
    step += 1
    if decay != 0 and options["decoupled_weight_decay"]:
        p.mul_(1 - options["lr"] * decay)
    elif decay != 0:
        grad = grad.add(p, alpha=decay)
    if p.is_complex():
        p, grad, m, v, last = (torch.view_as_real(t) for t in (p, grad, m, v, last))
    if grad.dtype != m.dtype:
        grad = grad.to(m.dtype)
    m.lerp_(grad, 1 - beta1)
    v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    if is_on_device(options):  # in float32 the first corrections have four digits
        size, offset = cast_scalars(
            [torch.as_tensor(x) for x in step_scalars(step.double(), options)], m
        )
    else:
        size, offset = step_scalars(step.item(), options)
    if options["differentiable"]:
        root = v.sqrt() + offset  # not in place: autograd needs the root
        p.add_(-size * friction(last - grad, grad, dfc) * m.clone() / root)
    elif m.dtype in HALVES:
        root = v.float().sqrt_().add_(offset)
        xi = friction(last.float().sub_(grad), grad.float(), dfc)
        p.add_(xi.mul_(m).div_(root).mul_(-size))
    elif dfc == 0 and m.is_cpu and m.dtype == torch.float32 and torch.compiler.is_compiling():
        root = v.sqrt().add_(offset)
        p.sub_(m.mul(size).div_(root.mul_(inverse_friction(last - grad))))
    else:
        root = v.sqrt().add_(offset)
        if dfc == 0:  # in the memory of the stored gradient, which is overwritten below
            xi = last.sub_(grad).abs_().sigmoid_()
        else:
            xi = friction(last - grad, grad, dfc)
        if isinstance(size, Tensor) or m.dtype != p.dtype:
            p.add_(xi.mul_(m).div_(root).mul_(-size))
        else:
            p.addcdiv_(xi.mul_(m), root, value=-size)
    last.copy_(grad)
