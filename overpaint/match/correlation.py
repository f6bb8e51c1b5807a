r"""Cosine similarity between every cell of one feature map and every cell of another.

The features of both pictures are normalised to unit length, so that a dot product of two is their cosine. Flows here
are in **cells** of the feature maps, shape (B, 2, H, W), on the target's map and pointing into the source's, as in
`flow`.

A local cost has a channel for each offset of a window of :math:`2 r + 1` by :math:`2 r + 1` cells around the cell
that the flow points to, row by row from the upper left: channel :math:`(d_y + r)(2 r + 1) + d_x + r` belongs to the
offset :math:`(d_x, d_y)`. Between cells the cosine is interpolated bilinearly; outside of the source it is 0.

Source: Nam et al., 2024 (DiffMatch), https://arxiv.org/abs/2305.19094, section 4.2.
Deviations: the reference's windows have x and y exchanged; and it normalises the features of the fine stage once more
after interpolating them, which a volume of cosines cannot express.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from overpaint.match.flow import pixel_grid, to_mapping

__all__ = [
    "cycle_error",
    "global_cost",
    "initial_flow",
    "local_cost",
    "max_cosine",
    "normalise",
    "slice_cost",
]


def normalise(features: Tensor) -> Tensor:
    """Return the features, (B, C, H, W), at unit length over C, float32."""
    return F.normalize(features.float(), dim=1, eps=1e-5)


def global_cost(source: Tensor, target: Tensor) -> Tensor:
    """Return the cosine of every cell of the target with every cell of the source.

    Args:
        source: Features, shape (B, C, Hs, Ws).
        target: Features, shape (B, C, Ht, Wt).

    Returns:
        Shape (B, Ht, Wt, Hs, Ws), float32, in [-1, 1].
    """
    b, _, ht, wt = target.shape
    volume = normalise(target).flatten(2).transpose(1, 2) @ normalise(source).flatten(2)
    return volume.view(b, ht, wt, *source.shape[2:])


def initial_flow(cost: Tensor) -> Tensor:
    """Return the flow to the most similar cell of the source, in cells, shape (B, 2, Ht, Wt)."""
    b, ht, wt, _, ws = cost.shape
    best = cost.flatten(3).argmax(3)  # (B, Ht, Wt)
    cells = torch.stack([best % ws, best // ws], dim=1).to(cost.dtype)
    return cells - pixel_grid(ht, wt, dtype=cost.dtype).to(cost.device)


def cycle_error(cost: Tensor) -> Tensor:
    """Return the forward-backward error of the most similar cells, in cells, shape (B, 1, Ht, Wt).

    It is the distance from a cell of the target to the cell of the target that is most similar to its most similar cell
    of the source.
    """
    b, ht, wt, hs, ws = cost.shape
    volume = cost.view(b, ht * wt, hs * ws)
    forth = volume.argmax(2)  # (B, Ht * Wt)
    back = volume.argmax(1).gather(1, forth)
    start = torch.arange(ht * wt, device=cost.device)
    x, y = back % wt - start % wt, back // wt - start // wt
    return torch.hypot(x.to(cost.dtype), y.to(cost.dtype)).view(b, 1, ht, wt)


def max_cosine(cost: Tensor) -> Tensor:
    """Return the cosine with the most similar cell, shape (B, 1, Ht, Wt)."""
    return cost.flatten(3).amax(3)[:, None]


def slice_cost(cost: Tensor, flow: Tensor, radius: int = 4) -> Tensor:
    """Return the local cost around `flow`, read from the full volume.

    Args:
        cost: The volume that `global_cost` returns.
        flow: In cells, shape (B, 2, Ht, Wt).
        radius: Radius of the window, in cells.

    Returns:
        Shape (B, (2 radius + 1)^2, Ht, Wt).
    """
    b, ht, wt, hs, ws = cost.shape
    volume = cost.view(b, ht * wt, hs * ws)
    rows = []
    for index, valid in _window_rows(flow, radius, (hs, ws)):
        rows.append(volume.gather(2, index.transpose(1, 2)).transpose(1, 2) * valid)
    return _interpolate(torch.stack(rows, 1).view(b, len(rows), len(rows), ht, wt), flow)


def local_cost(source: Tensor, target: Tensor, flow: Tensor, radius: int = 4) -> Tensor:
    """Return the same local cost as `slice_cost`, computed without the full volume.

    Args:
        source: Features, shape (B, C, Hs, Ws).
        target: Features, shape (B, C, Ht, Wt).
        flow: In cells, shape (B, 2, Ht, Wt).
        radius: Radius of the window, in cells.

    Returns:
        Shape (B, (2 radius + 1)^2, Ht, Wt), float32.
    """
    b, c, hs, ws = source.shape
    ht, wt = target.shape[2:]
    keys = normalise(source).permute(0, 2, 3, 1).reshape(b * hs * ws, c)
    queries = normalise(target).permute(0, 2, 3, 1).reshape(b * ht * wt, c)
    start = torch.arange(b, device=source.device)[:, None] * (hs * ws)
    rows = []
    for index, valid in _window_rows(flow.float(), radius, (hs, ws)):
        cosines = [
            (keys[(index[:, i] + start).flatten()] * queries).sum(1).view(b, ht * wt)
            for i in range(index.shape[1])
        ]
        rows.append(torch.stack(cosines, 1) * valid)
    window = torch.stack(rows, 1).view(b, len(rows), len(rows), ht, wt)
    return _interpolate(window, flow.float())


def _window_rows(flow: Tensor, radius: int, size: tuple[int, int]) -> list[tuple[Tensor, Tensor]]:
    """Return, for each row of the window, the cells that interpolation needs: 2 radius + 2 of them.

    Returns:
        For each row the flat indices of its cells, clamped to the source, (B, 2 radius + 2, Ht * Wt), and a mask of
        those that lie in the source.
    """
    hs, ws = size
    corner = to_mapping(flow).floor().long().flatten(2)  # (B, 2, Ht * Wt)
    span = torch.arange(-radius, radius + 2, device=flow.device).view(1, -1, 1)
    x = corner[:, :1] + span
    in_x = (x >= 0) & (x < ws)
    rows = []
    for dy in span.flatten():
        y = corner[:, 1:] + dy
        index = y.clamp(0, hs - 1) * ws + x.clamp(0, ws - 1)
        rows.append((index, in_x & (y >= 0) & (y < hs)))
    return rows


def _interpolate(window: Tensor, flow: Tensor) -> Tensor:
    """Interpolate windows at whole cells, (B, n + 1, n + 1, H, W), to the flow's fractions: (B, n * n, H, W)."""
    mapping = to_mapping(flow)
    x, y = (mapping - mapping.floor())[:, :, None, None].unbind(1)  # (B, 1, 1, H, W)
    rows = window[:, :-1] * (1 - y) + window[:, 1:] * y
    return (rows[:, :, :-1] * (1 - x) + rows[:, :, 1:] * x).flatten(1, 2)
