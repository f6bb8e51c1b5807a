"""Dragged points: their checks, and the warp of the picture's pixels that moves them."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from overpaint.image_edit.fill import smooth
from overpaint.image_edit.geometry import dilate, pixel_centres, sample

__all__ = ["around", "displacements", "read_landmarks", "read_points", "warp"]

_GRID = 160  # pixels of the longer side that the field of displacements is computed at
_REACH = 2.0  # radius of the default region, in longest displacements
_LEAST_REACH = 0.06  # the same, in longer sides of the picture


def read_points(points: Any, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return starts and ends, float64 (K, 2) each, (x, y) in pixels.

    Args:
        points: Points (x, y), alternating start and end, or pairs of them; at least one pair.
        size: Height and width of the picture.

    Raises:
        ValueError: Their number is odd, one lies outside of the picture, or they are no points.
    """
    values = _numbers(points)
    if (
        values is None
        or values.shape[-1:] != (2,)
        or not values.numel()
        or not values.isfinite().all()
    ):
        raise ValueError(
            f"`points` must be points (x, y) in pixels, alternating start and end, got {points!r}: give at least two."
        )
    flat = values.reshape(-1, 2)
    if len(flat) % 2:
        raise ValueError(
            f"`points` must hold a start and an end for each drag, got {len(flat)} points: give pairs."
        )
    _check_inside(flat, size, "points")
    return flat[::2], flat[1::2]


def read_landmarks(points: Any, size: tuple[int, int], name: str) -> Tensor:
    """Return the landmarks of one face, float64 (K, 2), (x, y) in pixels.

    Args:
        points: Points (x, y); also with a dimension of 1 for one face.
        size: Height and width of the picture, for landmarks that must be inside; both 0 for others.
        name: Name of the argument in messages.

    Raises:
        ValueError: There are none, as where no face was detected, or they are those of several faces.
    """
    values = _numbers(points)
    if values is None or not values.numel():
        raise ValueError(
            f"`{name}` holds no landmarks, as where no face was detected: give the points (x, y) of one face."
        )
    if values.ndim == 3 and len(values) == 1:
        values = values[0]
    if values.ndim == 3:
        raise ValueError(f"`{name}` holds the landmarks of {len(values)} faces: give those of one.")
    if values.ndim != 2 or values.shape[1] != 2 or not values.isfinite().all():
        raise ValueError(
            f"`{name}` must be points (x, y) in pixels, got shape {tuple(values.shape)}: give (K, 2)."
        )
    if any(size):
        _check_inside(values, size, name)
    return values


def around(starts: Tensor, ends: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the region that a drag changes by default, bool (H, W): the hull of all points, grown.

    It is grown by twice the longest displacement, and by at least 6 % of the picture's longer side.
    """
    import cv2

    corners = torch.cat([starts, ends]).round().int().numpy()
    mask = np.zeros(size, np.uint8)
    cv2.fillConvexPoly(mask, cv2.convexHull(corners), 1)
    reach = max(_REACH * float((ends - starts).norm(dim=1).max()), _LEAST_REACH * max(size))
    return dilate(torch.from_numpy(mask).bool(), math.ceil(reach))


def warp(picture: Tensor, starts: Tensor, ends: Tensor, region: Tensor) -> tuple[Tensor, Tensor]:
    """Return the picture with each start at its end, and the displacements (H, W, 2) that it was sampled with.

    Args:
        picture: Shape (1, C, H, W).
        starts: (x, y) in pixels, (K, 2).
        ends: The same.
        region: Pixels that may move, bool (H, W); the displacement falls to 0 at its border.

    Source: thin-plate interpolation, Bookstein, 1989, https://doi.org/10.1109/34.24792, here with a border.
    """
    height, width = region.shape
    field = displacements(starts, ends, region)
    warped = sample(picture, pixel_centres(height, width) - field)
    return torch.where((field != 0).any(-1), warped, picture), field


def displacements(starts: Tensor, ends: Tensor, region: Tensor) -> Tensor:
    """Return the smooth field, float64 (H, W, 2), that is `end - start` at each end and 0 outside of the region."""
    height, width = region.shape
    factor = max(1, math.ceil(max(height, width) / _GRID))
    grid = (math.ceil(height / factor), math.ceil(width / factor))
    free = F.interpolate(region[None, None].float(), grid, mode="nearest")[0, 0] > 0.5
    scale = torch.tensor([grid[1] / width, grid[0] / height]).double()
    cell = ((ends + 0.5) * scale - 0.5).round().long()
    cell = cell.clamp(min=0).minimum(torch.tensor([grid[1] - 1, grid[0] - 1]))
    values = torch.zeros(*grid, 2, dtype=torch.float64)
    values[cell[:, 1], cell[:, 0]] = ends - starts
    free[cell[:, 1], cell[:, 0]] = False
    surface = torch.from_numpy(smooth(values.numpy(), free.numpy())) if free.any() else values
    field = F.interpolate(
        surface.permute(2, 0, 1)[None], (height, width), mode="bilinear", align_corners=False
    )
    return field[0].permute(1, 2, 0).double() * region[..., None]


def _numbers(points: Any) -> Tensor | None:
    if isinstance(points, Tensor):
        return points.detach().cpu().double()
    if isinstance(points, np.ndarray | Sequence) and not isinstance(points, str):
        try:
            return torch.from_numpy(np.asarray(points, np.float64))
        except (TypeError, ValueError):
            return None
    return None


def _check_inside(points: Tensor, size: tuple[int, int], name: str) -> None:
    limit = points.new_tensor([size[1], size[0]])
    outside = ((points < -0.5) | (points > limit - 0.5)).any(1)
    if outside.any():
        first = tuple(points[outside][0].tolist())
        raise ValueError(
            f"`{name}` holds {first}, which is outside of the picture of {size[1]}x{size[0]} pixels: give points "
            "(x, y) inside."
        )
