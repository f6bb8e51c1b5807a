"""The three ways to take a step: one tensor at a time, lists of tensors, and torch's fused Adam kernel."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from overpaint.optim.friction_variants import damped, friction, resistance
from overpaint.optim.private import group_alike

__all__ = ["Batch", "Scaling", "step_fused", "step_lists", "step_loop"]

_HALVES = (torch.float16, torch.bfloat16)
# Numbers that a CPU works on at once: scratch of this size stays in the cache and is not fetched anew from the system
# at every step, as that of a large tensor is; many times smaller, and threads would wait for each other.
_PIECE = 2**19
Options = dict[str, Any]  # of a group


@dataclass
class Batch:
    """Parameters with a gradient, and their state, index by index."""

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    previous: list[Tensor]
    steps: list[Tensor]

    @property
    def lists(self) -> list[list[Tensor]]:
        """The six lists, in order."""
        return [getattr(self, field.name) for field in fields(self)]

    def alike(self) -> "list[Batch]":
        """Return one batch for each device and dtype, complex numbers as pairs of real ones."""
        return [Batch(*map(_real, lists)) for lists in group_alike(self.lists)]

    def pieces(self, options: Options) -> "Iterator[Batch]":
        """Yield the batch in pieces: large tensors in flat parts, small ones together; for elementwise work."""
        first = self.params[0]
        plain = first.is_cpu and type(first) in (Tensor, torch.nn.Parameter)
        fits = sum(map(Tensor.numel, self.params)) <= _PIECE
        if fits or not plain or options["dfc"] != 0 or torch.compiler.is_compiling():
            yield self
            return
        rows: list[tuple[Tensor, ...]] = []
        size = 0
        for row in zip(*self.lists, strict=True):
            for part in _parts(row) if row[0].numel() > _PIECE else (row,):
                if rows and size + part[0].numel() > _PIECE:
                    yield Batch(*map(list, zip(*rows, strict=True)))
                    rows, size = [], 0
                rows.append(part)
                size += part[0].numel()
        yield Batch(*map(list, zip(*rows, strict=True)))


@dataclass(frozen=True)
class Scaling:
    """What a `GradScaler` leaves to the fused step: the factor to divide by, and 1 where a gradient overflowed."""

    grad_scale: Tensor | None
    found_inf: Tensor | None


def step_loop(batch: Batch, options: Options) -> None:
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
    if _on_device(options):  # in float32 the first corrections have four digits
        size, offset = _kept([torch.as_tensor(x) for x in _scalars(step.double(), options)], m)
    else:
        size, offset = _scalars(step.item(), options)
    if options["differentiable"]:
        root = v.sqrt() + offset  # the root is kept for its own derivative
        p.add_(-size * friction(last - grad, grad, dfc) * m.clone() / root)
    elif m.dtype in _HALVES:
        root = v.float().sqrt_().add_(offset)
        xi = friction(last.float().sub_(grad), grad.float(), dfc)
        p.add_(xi.mul_(m).div_(root).mul_(-size))
    elif dfc == 0 and m.is_cpu and m.dtype == torch.float32 and torch.compiler.is_compiling():
        root = v.sqrt().add_(offset)
        p.sub_(m.mul(size).div_(root.mul_(resistance(last - grad))))
    else:
        root = v.sqrt().add_(offset)
        if dfc == 0:  # the stored gradient is the scratch: it is written anew below
            xi = last.sub_(grad).abs_().sigmoid_()
        else:
            xi = friction(last - grad, grad, dfc)
        if isinstance(size, Tensor) or m.dtype != p.dtype:
            p.add_(xi.mul_(m).div_(root).mul_(-size))
        else:
            p.addcdiv_(xi.mul_(m), root, value=-size)
    last.copy_(grad)


def step_lists(batch: Batch, options: Options) -> None:
    """Update lists of tensors, an operation at a time for all of them; the same bits as the loop."""
    for part in batch.alike():
        _count(part.steps)
        for piece in part.pieces(options):
            _step_alike(piece, options)


def _step_alike(batch: Batch, options: Options) -> None:
    beta1, beta2 = options["betas"]
    params, exp_avgs, exp_avg_sqs = batch.params, batch.exp_avgs, batch.exp_avg_sqs
    grads = _decayed(batch, batch.grads, options)
    torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)
    torch._foreach_mul_(exp_avg_sqs, beta2)
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - beta2)
    sizes, offsets = _scalar_lists(batch, options)
    wide = _wide(exp_avgs[0])
    roots = list(torch._foreach_sqrt(_as(exp_avg_sqs, wide)))
    torch._foreach_add_(roots, offsets)
    moves = damped(_as(batch.previous, wide), _as(grads, wide), _as(exp_avgs, wide), options["dfc"])
    if isinstance(sizes[0], Tensor) or wide != params[0].dtype:
        torch._foreach_div_(moves, roots)
        torch._foreach_mul_(moves, sizes)
        torch._foreach_add_(params, moves)
    else:
        torch._foreach_addcdiv_(params, moves, roots, sizes)
    _store(batch.previous, grads)


def step_fused(batch: Batch, options: Options, scaling: Scaling) -> None:
    """Let torch's fused kernel take Adam's step from zero, and add it to the parameters times the friction.

    The moments are Adam's to the bit. Where `scaling` says that a gradient overflowed nothing changes, without waiting
    for the device to say so.
    """
    for part in batch.alike():
        device = part.params[0].device
        scale, found = (
            None if t is None else t.to(device) for t in (scaling.grad_scale, scaling.found_inf)
        )
        _count(part.steps)
        for piece in part.pieces(options):
            _step_kernel(piece, options, Scaling(scale, found))
        if found is not None:
            torch._foreach_sub_(part.steps, [found] * len(part.steps))


def _step_kernel(batch: Batch, options: Options, scaling: Scaling) -> None:
    params, previous = batch.params, batch.previous
    grads, found = batch.grads, scaling.found_inf
    if scaling.grad_scale is not None:
        grads = list(torch._foreach_div(grads, scaling.grad_scale))
    grads = _decayed(batch, grads, options, skip=found)
    if found is not None:  # as if the last gradient had come again
        pairs = zip(previous, grads, strict=True)
        grads = [torch.where(found.bool(), last, grad) for last, grad in pairs]
    moves = _moves(batch, grads, options, found)
    wide = moves[0].dtype
    xi = damped(_as(previous, wide), _as(grads, wide), None, options["dfc"])
    if wide == params[0].dtype:
        torch._foreach_addcmul_(params, xi, moves)
    else:
        torch._foreach_mul_(xi, moves)
        torch._foreach_add_(params, xi)
    _store(previous, grads)


def _moves(
    batch: Batch, grads: list[Tensor], options: Options, found: Tensor | None
) -> list[Tensor]:
    """Return Adam's step for each parameter, and update the moments; at least in float32, so as to round once."""
    kept, wide = batch.exp_avgs[0].dtype, _wide(batch.exp_avgs[0])
    exp_avgs, exp_avg_sqs = _as(batch.exp_avgs, wide), _as(batch.exp_avg_sqs, wide)
    grads = _as(grads, wide)
    moves = [torch.zeros_like(m) for m in exp_avgs]
    if not all(map(Tensor.is_contiguous, [*grads, *moves])):
        # The kernel goes through memory in order: a gradient laid out otherwise would be read at the wrong places.
        grads = [
            grad if grad.stride() == m.stride() else torch.empty_like(m).copy_(grad)
            for grad, m in zip(grads, exp_avgs, strict=True)
        ]
    (beta1, beta2), lr = options["betas"], options["lr"]
    if isinstance(lr, Tensor) and not lr.is_cpu:
        lr = lr.to(moves[0].device)
    lists = [moves, grads, exp_avgs, exp_avg_sqs, batch.steps]
    for rows, eps in _by_epsilon(batch.steps, options):
        part = lists if rows is None else [[whole[i] for i in rows] for whole in lists]
        torch._fused_adam_(
            part[0], part[1], part[2], part[3], [], part[4], lr=lr, beta1=beta1, beta2=beta2,
            weight_decay=0.0, eps=eps, amsgrad=False, maximize=False, grad_scale=None, found_inf=found,
        )  # fmt: skip
    if wide != kept:
        _store(batch.exp_avgs, exp_avgs)
        _store(batch.exp_avg_sqs, exp_avg_sqs)
    return moves


def _by_epsilon(steps: list[Tensor], options: Options) -> list[tuple[list[int] | None, float]]:
    """Return which rows share a kernel call, and its epsilon: the official one depends on the step."""
    if options["eps_mode"] == "paper":
        return [(None, options["eps"])]
    rows: dict[float, list[int]] = {}
    for i, step in enumerate(steps):
        rows.setdefault(step.item(), []).append(i)
    beta2 = options["betas"][1]
    return [(some, options["eps"] / (1 - beta2**t) ** 0.5) for t, some in rows.items()]


def _decayed(
    batch: Batch, grads: list[Tensor], options: Options, *, skip: Tensor | None = None
) -> list[Tensor]:
    """Return the gradients to be used, in the dtype of the moments; shrink the weights if decay is decoupled."""
    decay = options["weight_decay"]
    if options["maximize"]:
        grads = list(torch._foreach_neg(grads))
    if decay != 0 and options["decoupled_weight_decay"]:
        shrink = options["lr"] * decay
        torch._foreach_mul_(batch.params, 1 - (shrink if skip is None else shrink * (1 - skip)))
    elif decay != 0:
        grads = list(torch._foreach_add(grads, batch.params, alpha=decay))
    return _as(grads, batch.exp_avgs[0].dtype)


def _on_device(options: Options) -> bool:
    return options["capturable"] or options["differentiable"] or torch.compiler.is_compiling()


def _scalars(t: Any, options: Options) -> tuple[Any, Any]:
    """Return the size of step `t` and what to add to the uncorrected root of the second moment.

    Both corrections are folded into these two numbers, which spares a pass over the second moment.
    """
    beta1, beta2 = options["betas"]
    root = (1 - beta2**t) ** 0.5
    eps = options["eps"]
    return options["lr"] * root / (1 - beta1**t), (
        eps * root if options["eps_mode"] == "paper" else eps
    )


def _scalar_lists(batch: Batch, options: Options) -> tuple[Any, Any]:
    """Return the sizes with a minus and the offsets of `_scalars`, on the device where it must not be waited for."""
    if not _on_device(options):
        counts = [step.item() for step in batch.steps]
        found = {t: _scalars(t, options) for t in set(counts)}
        return [-found[t][0] for t in counts], [found[t][1] for t in counts]
    beta1, beta2 = options["betas"]
    first = batch.exp_avgs[0]
    steps = [
        step.double() for step in batch.steps
    ]  # in float32 the first corrections have four digits
    roots = torch._foreach_pow(beta2, steps)
    sizes = torch._foreach_pow(beta1, steps)
    torch._foreach_sub_(roots, 1)
    torch._foreach_neg_(roots)
    torch._foreach_sqrt_(roots)
    torch._foreach_sub_(sizes, 1)  # the minus of the step comes from here
    torch._foreach_reciprocal_(sizes)
    torch._foreach_mul_(sizes, roots)
    torch._foreach_mul_(sizes, options["lr"])
    if options["eps_mode"] == "official":
        return _kept(sizes, first), options["eps"]
    return _kept(sizes, first), _kept(torch._foreach_mul(roots, options["eps"]), first)


def _kept(scalars: Sequence[Tensor], buffer: Tensor) -> list[Tensor]:
    """Return `scalars` in the dtype that steps of `buffer` are computed in.

    A compiler would compute them anew, powers and all, for every element that they meet. Running sums are the thing
    that it finishes first, and that of one row is the row.
    """
    cast = [scalar.to(_wide(buffer)) for scalar in scalars]
    if not torch.compiler.is_compiling():
        return cast
    return list(torch.stack(cast).unsqueeze(0).cumsum(0)[0].unbind())


def _count(steps: list[Tensor]) -> None:
    if steps[0].is_cpu and not torch.compiler.is_compiling():
        one = torch.tensor(1.0)  # a number would be wrapped once each
        torch._foreach_add_(steps, one, alpha=1.0)
    else:
        torch._foreach_add_(steps, 1)


def _store(previous: list[Tensor], grads: list[Tensor]) -> None:
    if type(previous[0]) is Tensor:
        torch._foreach_copy_(previous, grads)
    else:  # sharded tensors have no strategy for copying lists
        for last, grad in zip(previous, grads, strict=True):
            last.copy_(grad)


def _parts(row: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, ...]]:
    """Yield a parameter, its gradient and its buffers in flat parts, each with the one step count."""
    *tensors, step = row
    if not all(t.is_contiguous() for t in tensors):
        yield row
        return
    for part in zip(*(t.view(-1).split(_PIECE) for t in tensors), strict=True):
        yield (*part, step)


def _real(tensors: list[Tensor]) -> list[Tensor]:
    return [torch.view_as_real(t) for t in tensors] if tensors[0].is_complex() else tensors


def _wide(tensor: Tensor) -> torch.dtype:
    """Return the dtype in which friction and step are computed."""
    return torch.float32 if tensor.dtype in _HALVES else tensor.dtype


def _as(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return tensors if tensors[0].dtype == dtype else [t.to(dtype) for t in tensors]
