"""Parameters, gradients and runs for the tests of DiffGrad; every tensor is drawn from a seed, the same in each run."""

import torch
from torch import nn

from overpaint.optim import DiffGrad

LOOP, FOREACH, FUSED = {"foreach": False}, {"foreach": True}, {"fused": True}
PATHS = [LOOP, FOREACH, FUSED]


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def parameters(dtype=torch.float64):
    shapes = ((3,), (4, 5), (2, 3, 2))
    return [nn.Parameter(draw(*s, seed=i, dtype=dtype)) for i, s in enumerate(shapes)]


def set_gradients(params, t, *, scale=1.0):
    for i, p in enumerate(params):
        p.grad = scale * draw(*p.shape, seed=100 * t + i).to(p.dtype)


def run(params, steps=50, *, scale=1.0, start=1, make=DiffGrad, **options):
    optimizer = make(params, **options)
    for t in range(start, start + steps):
        set_gradients(params, t, scale=scale)
        optimizer.step()
    return optimizer


def one_number(value=0.5, **options):
    p = nn.Parameter(torch.tensor([value], dtype=torch.float64))
    return p, DiffGrad([p], **options)


def all_equal(first, second):
    return all(torch.equal(p, q) for p, q in zip(first, second, strict=True))


def largest_difference(first, second):
    """Return the largest absolute difference of corresponding numbers."""
    return max(float((p - q).detach().abs().max()) for p, q in zip(first, second, strict=True))
