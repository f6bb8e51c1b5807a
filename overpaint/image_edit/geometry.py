"""Masks, crops, and moving pixels and cells: with clipped borders, never wrapped.

Points and offsets are (x, y) in pixels; (0, 0) is the centre of the upper left pixel.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from overpaint.images.read import load_picture

__all__ = [
    "Frame",
    "Move",
    "bounds",
    "box_mask",
    "cells",
    "centroid",
    "choose_frame",
    "dilate",
    "feathered",
    "load_mask",
    "moved_cells",
    "pixel_centres",
    "placed",
    "sample",
]

Box = tuple[int, int, int, int]
"""First column, first row, last column + 1, last row + 1."""

_MARGIN = 0.06  # of the side of a crop: least distance of the edited region from its border


@dataclass(frozen=True)
class Move:
    """A shift and a scaling about a pivot: p goes to `pivot + offset + scale * (p - pivot)`.

    Attributes:
        offset: (x, y) in pixels.
        scale: Factor of the size.
        pivot: (x, y) in pixels.
    """

    offset: tuple[float, float]
    scale: float = 1.0
    pivot: tuple[float, float] = (0.0, 0.0)

    def sources(self, points: Tensor) -> Tensor:
        """Return where points (..., 2) come from."""
        pivot, offset = points.new_tensor(self.pivot), points.new_tensor(self.offset)
        return pivot + (points - pivot - offset) / self.scale

    def within(self, left: int, top: int) -> "Move":
        """Return the same move in the pixels of a crop that begins at a column and row."""
        return Move(self.offset, self.scale, (self.pivot[0] - left, self.pivot[1] - top))

    def box(self, box: Box, size: tuple[int, int]) -> Box:
        """Return the box of the moved pixels of a box, clipped to a picture of `size`; it can be empty."""
        edges = []
        for axis, limit in ((0, size[1]), (1, size[0])):
            pivot, offset = self.pivot[axis], self.offset[axis]
            ends = [
                pivot + offset + self.scale * (v - 0.5 - pivot) + 0.5
                for v in (box[axis], box[axis + 2])
            ]
            edges.append(
                (max(math.floor(ends[0] + 1e-9), 0), min(math.ceil(ends[1] - 1e-9), limit))
            )
        return edges[0][0], edges[1][0], edges[0][1], edges[1][1]

    def apply(self, picture: Tensor) -> tuple[Tensor, Tensor]:
        """Return a moved picture (B, C, H, W) and where it is defined, bool (H, W); elsewhere it is 0.

        Whole offsets without scaling copy pixels exactly. Otherwise pixels are interpolated linearly, and averaged over
        the area that they cover if the picture is reduced.
        """
        if self.scale == 1 and all(float(v).is_integer() for v in self.offset):
            return _shift(picture, *(int(v) for v in self.offset))
        height, width = picture.shape[-2:]
        parts = max(1, math.ceil(1 / self.scale))
        grid = pixel_centres(height, width)
        total, inside = torch.zeros_like(picture), torch.ones(height, width, dtype=torch.bool)
        for i in range(parts):
            for j in range(parts):
                part = torch.tensor([(i + 0.5) / parts - 0.5, (j + 0.5) / parts - 0.5]).double()
                where = self.sources(grid + part)
                total += sample(picture, where)
                limit = where.new_tensor([width, height])
                inside &= ((where >= -0.5) & (where <= limit - 0.5)).all(-1)
        return total / parts**2 * inside, inside


@dataclass(frozen=True)
class Frame:
    """A crop of a picture and the size that it is resized to.

    Attributes:
        left: First column of the crop.
        top: First row.
        width: Columns.
        height: Rows.
        size: Height and width after resizing.
    """

    left: int
    top: int
    width: int
    height: int
    size: tuple[int, int]

    def crop(self, values: Tensor) -> Tensor:
        """Return the crop of (..., H, W)."""
        rows, columns = self.slices
        return values[..., rows, columns]

    @property
    def slices(self) -> tuple[slice, slice]:
        """Rows and columns of the crop."""
        return slice(self.top, self.top + self.height), slice(self.left, self.left + self.width)

    def enter(self, crop: Tensor) -> Tensor:
        """Return a crop (B, C, height, width) resized."""
        return _resize(crop, self.size).clamp(0, 1)

    def leave(self, values: Tensor) -> Tensor:
        """Return resized values (B, C, *size) at the size of the crop, not clamped."""
        return _resize(values, (self.height, self.width))


def choose_frame(
    picture: tuple[int, int],
    region: Box,
    *,
    object_side: float,
    size: int,
    unit: int,
    share: float | None,
) -> Frame:
    """Return the crop in which the object fills about `share` of the side, the whole region inside.

    Args:
        picture: Height and width of the picture.
        region: Box of the pixels that may change.
        object_side: Longer side of the object, in pixels.
        size: Longer side of the resized crop.
        unit: Its sides are multiples of this.
        share: `None` for the whole picture.
    """
    height, width = picture
    left, top, right, bottom = region
    side = max(height, width)
    if share is not None:
        extent = max(right - left, bottom - top)
        side = math.ceil(max(object_side / share, extent / (1 - 2 * _MARGIN)))
    side_w, side_h = min(side, width), min(side, height)
    first = [
        min(max(round((low + high - length) / 2), 0), limit - length)
        for low, high, length, limit in (
            (left, right, side_w, width),
            (top, bottom, side_h, height),
        )
    ]
    factor = size / max(side_w, side_h)
    sides = [max(round(length * factor / unit), 1) * unit for length in (side_h, side_w)]
    return Frame(first[0], first[1], side_w, side_h, (sides[0], sides[1]))


def bounds(mask: Tensor) -> Box:
    """Return the box of a mask (H, W) that is not empty."""
    rows, columns = (mask.any(axis).nonzero().flatten() for axis in (1, 0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def centroid(mask: Tensor) -> tuple[float, float]:
    """Return the mean (x, y) of the pixels of a mask (H, W) that is not empty."""
    rows, columns = mask.nonzero().double().mean(0).tolist()
    return columns, rows


def load_mask(mask: Any, size: tuple[int, int], name: str = "mask") -> Tensor:
    """Return a mask as bool, shape (H, W): where the value is at least half of white, or true.

    Args:
        mask: A path, a PIL image, an array (H, W) or a tensor (H, W) or (1, H, W); bool, floats in [0, 1], or bytes, in
            which 1 counts as true too if nothing is larger.
        size: Height and width of the picture.
        name: Name of the argument in messages.

    Raises:
        TypeError: The mask has another type.
        ValueError: It is empty, or has another size than the picture.
    """
    if isinstance(mask, np.ndarray | Tensor):
        values = (
            torch.as_tensor(np.array(mask)) if isinstance(mask, np.ndarray) else mask.detach().cpu()
        )
        is_binary = (
            not values.is_floating_point()
            and values.numel()
            and values.min() >= 0
            and values.max() <= 1
        )
        mask = values.bool() if is_binary else values
        _check_mask_size(tuple(values.shape[-2:]), size, name)
    pixels = load_picture(mask, name)[0].mean(0) >= 0.5
    _check_mask_size(tuple(pixels.shape), size, name)
    if not pixels.any():
        raise ValueError(f"`{name}` is empty: mark the pixels of the object, with white or true.")
    return pixels


def _check_mask_size(shape: tuple[int, ...], size: tuple[int, int], name: str) -> None:
    if shape != size:
        raise ValueError(
            f"`{name}` is {'x'.join(str(v) for v in reversed(shape))} pixels, but the picture is {size[1]}x{size[0]}: "
            "give one of the same size."
        )


def box_mask(box: Any, size: tuple[int, int], name: str = "box") -> Tensor:
    """Return the mask, bool (H, W), of a box (x, y, width, height) in pixels, clipped to the picture.

    Raises:
        ValueError: The box has not four numbers, no area, or lies outside of the picture.
    """
    numbers = list(box) if isinstance(box, tuple | list) else []
    if len(numbers) != 4 or not all(
        isinstance(v, int | float) and math.isfinite(v) for v in numbers
    ):
        raise ValueError(
            f"`{name}` must be four numbers x, y, width, height, got {box!r}: give them in pixels."
        )
    left, top, width, height = (float(v) for v in numbers)
    mask = torch.zeros(size, dtype=torch.bool)
    if width > 0 and height > 0:
        rows = slice(max(round(top), 0), max(round(top + height), 0))
        mask[rows, max(round(left), 0) : max(round(left + width), 0)] = True
    if not mask.any():
        raise ValueError(
            f"`{name}` {box!r} holds no pixel of a picture of {size[1]}x{size[0]}: give x, y, width and height in "
            "pixels from the upper left corner."
        )
    return mask


def dilate(mask: Tensor, pixels: int) -> Tensor:
    """Return a mask (H, W) grown by a disc of a radius in pixels."""
    if pixels == 0:
        return mask
    return _distance(~mask) <= pixels + 0.25


def feathered(mask: Tensor, pixels: float) -> Tensor:
    """Return weights (H, W), 0 outside of a mask and rising to 1 over some pixels inside of it."""
    padded = F.pad(mask[None, None].float(), (1, 1, 1, 1), mode="replicate")[0, 0] > 0.5
    return (_distance(padded)[1:-1, 1:-1] / (pixels + 1)).clamp(0, 1)


def cells(mask: Tensor, grid: tuple[int, int], *, least: float = 0.5) -> Tensor:
    """Return the cells, bool (h, w), of which a share of at least `least` is masked; never none.

    If no cell reaches it, as for small or thin objects, the cells with the largest share.
    """
    share = F.adaptive_avg_pool2d(mask[None, None].float(), grid)[0, 0]
    return share >= min(least, float(share.max())) if mask.any() else share > 1


def moved_cells(source: Tensor, move: Move) -> tuple[Tensor, Tensor]:
    """Return pairs of cells: the flat number of each target cell, and of the source cell that it shows, int64 (P,).

    Args:
        source: The cells of the object, bool (h, w).
        move: In cells.
    """
    height, width = source.shape
    where = move.sources(pixel_centres(height, width)).round().long()
    x, y = where.unbind(-1)
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    flat = y.clamp(0, height - 1) * width + x.clamp(0, width - 1)
    target = (inside & source.flatten()[flat]).flatten().nonzero().flatten()
    return target, flat.flatten()[target]


def placed(picture: Tensor, move: Move, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return a moved picture (1, C, H, W) on a canvas of `size`, and where it covers the canvas, bool (h, w)."""
    height, width = (max(a, b) for a, b in zip(picture.shape[-2:], size, strict=True))
    known = torch.ones_like(picture[:, :1])
    both = torch.cat([picture, known], 1)
    margins = (0, width - picture.shape[-1], 0, height - picture.shape[-2])
    moved, inside = move.apply(F.pad(both, margins))
    moved = moved[..., : size[0], : size[1]]
    return moved[:, :-1], inside[: size[0], : size[1]] & (moved[0, -1] > 0.999)


def sample(picture: Tensor, where: Tensor) -> Tensor:
    """Return the picture (B, C, H, W) at points (h, w, 2), interpolated linearly; borders are repeated."""
    height, width = picture.shape[-2:]
    unit = (where + 0.5) * 2 / where.new_tensor([width, height]) - 1
    grid = unit.to(picture).expand(len(picture), -1, -1, -1)
    return F.grid_sample(picture, grid, mode="bilinear", padding_mode="border", align_corners=False)


def pixel_centres(height: int, width: int) -> Tensor:
    """Return the centre (x, y) of each pixel, float64 (H, W, 2)."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([x, y], -1).double()


def _shift(picture: Tensor, dx: int, dy: int) -> tuple[Tensor, Tensor]:
    height, width = picture.shape[-2:]
    result, inside = torch.zeros_like(picture), torch.zeros(height, width, dtype=torch.bool)
    if abs(dx) < width and abs(dy) < height:
        target = slice(max(dy, 0), height + min(dy, 0)), slice(max(dx, 0), width + min(dx, 0))
        source = slice(max(-dy, 0), height + min(-dy, 0)), slice(max(-dx, 0), width + min(-dx, 0))
        result[..., target[0], target[1]] = picture[..., source[0], source[1]]
        inside[target] = True
    return result, inside


def _resize(values: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(values.shape[-2:]) == tuple(size):
        return values
    return F.interpolate(values, size, mode="bicubic", align_corners=False, antialias=True)


def _distance(mask: Tensor) -> Tensor:
    """Return the distance of each pixel to the nearest one that is not masked, float32 (H, W)."""
    import cv2

    pixels = mask.to(torch.uint8).contiguous().numpy()
    if pixels.all():
        return torch.full(mask.shape, float(sum(mask.shape)))
    return torch.from_numpy(cv2.distanceTransform(pixels, cv2.DIST_L2, cv2.DIST_MASK_PRECISE))
