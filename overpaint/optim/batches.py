"""Batches of parameters with their gradients and states, and the operations that all update paths share."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from overpaint.optim.torch_internals import group_by_device_and_dtype

__all__ = [
    "HALVES", "Batch", "Options", "Scaling", "cast", "cast_scalars", "count_steps", "decayed", "is_on_device",
    "scalar_lists", "step_dtype", "step_scalars", "store",
]  # fmt: skip

HALVES = (torch.float16, torch.bfloat16)
# Numbers that a CPU processes at once. Temporary tensors of this size fit into the cache and are not allocated from the
# system at every step, unlike those of a large tensor. With much smaller pieces, threads would wait for each other.
PIECE = 2**19
Options = dict[str, Any]  # of a parameter group


@dataclass
class Batch:
    """Parameters with a gradient and their states, in lists with the same order."""

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    previous: list[Tensor]
    steps: list[Tensor]

    @property
    def lists(self) -> list[list[Tensor]]:
        """The six lists, in the order of the fields."""
        return [getattr(self, field.name) for field in fields(self)]

    def split_by_dtype(self) -> "list[Batch]":
        """Return one batch for each device and dtype, with complex numbers as pairs of real ones."""
        return [Batch(*map(_real, lists)) for lists in group_by_device_and_dtype(self.lists)]

    def pieces(self, options: Options) -> "Iterator[Batch]":
        """Yield the batch in pieces of about `PIECE` numbers: parts of large tensors, or several small tensors.

        The pieces are for elementwise operations. On other devices, and for sharded or compiled steps, the batch is
        one piece.
        """
        first = self.params[0]
        is_plain = first.is_cpu and type(first) in (Tensor, torch.nn.Parameter)
        fits = sum(map(Tensor.numel, self.params)) <= PIECE
        if fits or not is_plain or options["dfc"] != 0 or torch.compiler.is_compiling():
            yield self
            return
        rows: list[tuple[Tensor, ...]] = []
        size = 0
        for row in zip(*self.lists, strict=True):
            for part in _parts(row) if row[0].numel() > PIECE else (row,):
                if rows and size + part[0].numel() > PIECE:
                    yield Batch(*map(list, zip(*rows, strict=True)))
                    rows, size = [], 0
                rows.append(part)
                size += part[0].numel()
        yield Batch(*map(list, zip(*rows, strict=True)))


@dataclass(frozen=True)
class Scaling:
    """Values that a `GradScaler` passes to the fused step: the divisor of gradients, and 1 if a gradient overflowed."""

    grad_scale: Tensor | None
    found_inf: Tensor | None


def decayed(
    batch: Batch, grads: list[Tensor], options: Options, *, skip: Tensor | None = None
) -> list[Tensor]:
    """Return the gradients with L2 decay in the dtype of the moments; apply decoupled decay to the parameters.

    `skip` is 1 if a gradient overflowed; decoupled decay is then skipped.
    """
    decay = options["weight_decay"]
    if options["maximize"]:
        grads = list(torch._foreach_neg(grads))
    if decay != 0 and options["decoupled_weight_decay"]:
        shrink = options["lr"] * decay
        torch._foreach_mul_(batch.params, 1 - (shrink if skip is None else shrink * (1 - skip)))
    elif decay != 0:
        grads = list(torch._foreach_add(grads, batch.params, alpha=decay))
    return cast(grads, batch.exp_avgs[0].dtype)


def is_on_device(options: Options) -> bool:
    """Return whether step counts must stay tensors, as CUDA graphs, autograd and compilers need."""
    return options["capturable"] or options["differentiable"] or torch.compiler.is_compiling()


def step_scalars(t: Any, options: Options) -> tuple[Any, Any]:
    """Return the size of step `t` and the number to add to the root of the uncorrected second moment.

    Both bias corrections are part of these two numbers, so that no pass over the second moment is needed for them.
    """
    beta1, beta2 = options["betas"]
    root = (1 - beta2**t) ** 0.5
    eps = options["eps"]
    offset = eps * root if options["eps_mode"] == "paper" else eps
    return options["lr"] * root / (1 - beta1**t), offset


def scalar_lists(batch: Batch, options: Options) -> tuple[Any, Any]:
    """Return the negative step sizes and the offsets of `step_scalars`, as tensors if `is_on_device`."""
    if not is_on_device(options):
        counts = [step.item() for step in batch.steps]
        scalars = {t: step_scalars(t, options) for t in set(counts)}
        return [-scalars[t][0] for t in counts], [scalars[t][1] for t in counts]
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
    torch._foreach_sub_(sizes, 1)  # this makes the sizes negative
    torch._foreach_reciprocal_(sizes)
    torch._foreach_mul_(sizes, roots)
    torch._foreach_mul_(sizes, options["lr"])
    if options["eps_mode"] == "official":
        return cast_scalars(sizes, first), options["eps"]
    return cast_scalars(sizes, first), cast_scalars(
        torch._foreach_mul(roots, options["eps"]), first
    )


def cast_scalars(scalars: Sequence[Tensor], buffer: Tensor) -> list[Tensor]:
    """Return `scalars` in the dtype that steps of `buffer` are computed in.

    A compiler would fuse their computation, with its powers, into that of every element. It computes cumulative sums
    separately, and the cumulative sum of a single row is that row.
    """
    converted = [scalar.to(step_dtype(buffer)) for scalar in scalars]
    if not torch.compiler.is_compiling():
        return converted
    return list(torch.stack(converted).unsqueeze(0).cumsum(0)[0].unbind())


def count_steps(steps: list[Tensor]) -> None:
    """Add 1 to each step count."""
    if steps[0].is_cpu and not torch.compiler.is_compiling():
        one = torch.tensor(1.0)  # a Python number would be converted once for each count
        torch._foreach_add_(steps, one, alpha=1.0)
    else:
        torch._foreach_add_(steps, 1)


def store(targets: list[Tensor], values: list[Tensor]) -> None:
    """Copy `values` into `targets`."""
    if type(targets[0]) is Tensor:
        torch._foreach_copy_(targets, values)
    else:  # sharded tensors do not support copying lists
        for target, value in zip(targets, values, strict=True):
            target.copy_(value)


def _parts(row: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, ...]]:
    """Yield flat parts of a parameter, its gradient and its buffers, each with the common step count."""
    *tensors, step = row
    if not all(t.is_contiguous() for t in tensors):
        yield row
        return
    for part in zip(*(t.view(-1).split(PIECE) for t in tensors), strict=True):
        yield (*part, step)


def _real(tensors: list[Tensor]) -> list[Tensor]:
    return [torch.view_as_real(t) for t in tensors] if tensors[0].is_complex() else tensors


def step_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype in which friction and step are computed: float32 for half precision."""
    return torch.float32 if tensor.dtype in HALVES else tensor.dtype


def cast(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return the tensors in `dtype`; the same list if they have it already."""
    return tensors if tensors[0].dtype == dtype else [t.to(dtype) for t in tensors]
