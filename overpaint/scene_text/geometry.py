"""Regions of a picture: their mask, the rectangle that their line of text fills, and the warp to the fixed line.

A region is a box (x, y, width, height), four corners or another polygon of points (x, y), or a mask. The rectangle of
a polygon or mask is the one of least area around it; its text runs along the side that is closest to horizontal. Points
are in pixels, with (0, 0) at the upper left corner of the upper left pixel.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from overpaint.scene_text.line import Line

__all__ = ["Region", "blend", "line_box", "read_region", "rectify", "restore"]


@dataclass(frozen=True)
class Region:
    """A part of a picture that is to hold one line of text.

    Attributes:
        mask: True inside, bool (H, W).
        corners: Of the rectangle around it, in the order upper left, upper right, lower right, lower left as seen by
            the reader of the text, float64 (4, 2).
    """

    mask: Tensor
    corners: np.ndarray

    @property
    def size(self) -> tuple[float, float]:
        """Width and height of the rectangle, in pixels."""
        first, second, third, _ = self.corners
        return float(np.linalg.norm(second - first)), float(np.linalg.norm(third - second))


def read_region(region: Any, size: tuple[int, int]) -> Region:
    """Return the region of a picture.

    Args:
        region: Box (x, y, width, height), polygon of at least three points (x, y), or mask of the picture's size.
        size: Height and width of the picture.

    Raises:
        ValueError: The region is empty, outside of the picture, of another size, or not finite.
    """
    height, width = size
    values = region.detach().cpu().numpy() if isinstance(region, Tensor) else np.asarray(region)
    if values.ndim == 2 and values.dtype == bool:
        return _from_mask(values, size)
    if values.dtype.kind not in "iuf" or not np.isfinite(values).all():
        raise ValueError(
            "`region` must hold finite numbers, or be a mask of true and false: give a box (x, y, width, height), "
            "points (x, y), or a bool mask."
        )
    values = values.astype(np.float64)
    if values.shape == (4,):
        x, y, w, h = values
        if w <= 0 or h <= 0:
            raise ValueError(
                f"the box of `region` must have a positive size, got {w:g}x{h:g}: give x, y, width, height."
            )
        corners = np.array([[x, y], [x + w, y], [x + w, y + h], [x, y + h]])
        points = corners
    elif values.ndim == 2 and values.shape[1] == 2 and len(values) >= 3:
        points = values
        corners = values if len(values) == 4 and _is_convex(values) else _rectangle(values)
        corners = _ordered(corners)
    else:
        raise ValueError(
            f"`region` must be a box of 4 numbers, at least 3 points (x, y), or a mask {height}x{width}, got shape "
            f"{values.shape}: give one of them."
        )
    if values.ndim == 1:  # exact for boxes: fillPoly adds the border
        mask = _box_mask(values, size)
    else:
        mask = np.zeros(size, np.uint8)
        # With 4 fractional bits; the centre of pixel (0, 0) is at (0.5, 0.5).
        fine = np.round((points - 0.5) * 16).clip(-(2**28), 2**28)
        cv2.fillPoly(mask, [fine.astype(np.int32)], 1, shift=4)
    if not mask.any():
        raise ValueError(
            f"`region` is outside of the picture of {width}x{height} pixels or empty: give a region inside of it."
        )
    return Region(torch.from_numpy(mask.astype(bool)), corners)


def line_box(
    line: Line, size: tuple[float, float], natural: float | None = None
) -> tuple[float, float]:
    """Return the left and right edge of a region on the fixed line, in pixels.

    The region is scaled to the height of the line; if it is wider than the line it is squeezed.

    Args:
        line: Sizes of the line.
        size: Width and height of the region, in pixels of the picture.
        natural: Least width on the line, in pixels.
    """
    room = line.width - 2 * line.margin
    width = size[0] / size[1] * (line.bottom - line.top)
    width = min(room, max(width, natural or 0, 4.0))
    left = (line.width - width) / 2
    return left, left + width


def rectify(image: Tensor, region: Region, line: Line, box: tuple[float, float]) -> Tensor:
    """Return the line around a region, RGB (1, 3, H, W); beyond the picture its border is repeated.

    Pixels are averaged where the picture is larger than the line.

    Args:
        image: RGB in [0, 1], (3, H, W).
        region: The region.
        line: Sizes of the line.
        box: Left and right edge of the region on the line, of `line_box`.
    """
    matrix = _to_picture(region, line, box)
    scale = region.size[1] / (line.bottom - line.top)
    across = region.size[0] / (box[1] - box[0])
    fine = min(8, max(1, math.ceil(max(scale, across))))
    points = _apply(matrix, _centres(line.height, line.width, fine))
    picture = F.grid_sample(
        image[None].float(), _normalised(points, image.shape[-2:]), padding_mode="border", align_corners=False
    )  # fmt: skip
    return F.avg_pool2d(picture, fine) if fine > 1 else picture


def restore(
    written: Tensor, region: Region, line: Line, box: tuple[float, float], size: tuple[int, int]
) -> Tensor:
    """Return a line at its place in a picture, RGB (3, H, W); valid inside of the region.

    Args:
        written: The line, RGB (1, 3, h, w).
        region: The region.
        line: Sizes of the line.
        box: As in `rectify`.
        size: Height and width of the picture.
    """
    matrix = np.linalg.inv(_to_picture(region, line, box))
    points = _apply(matrix, _centres(size[0], size[1], 1))
    grid = _normalised(points, written.shape[-2:])
    result = F.grid_sample(
        written.float(), grid, mode="bicubic", padding_mode="border", align_corners=False
    )
    return result[0].clamp(0, 1)


def blend(image: Tensor, written: Tensor, mask: Tensor, feather: float) -> Tensor:
    """Return `image` with `written` inside of the mask; pixels outside are those of `image`, bit for bit.

    Args:
        image: RGB, (3, H, W).
        written: RGB, (3, H, W).
        mask: True inside, bool (H, W).
        feather: Width in pixels, inside of the mask, over which `written` grows from 0 to 1; 0 for none.
    """
    inside = mask.cpu().numpy().astype(np.uint8)
    padded = np.pad(inside, 1, mode="edge")  # the border of the picture is no border of the mask
    distance = cv2.distanceTransform(padded, cv2.DIST_L2, 5)[1:-1, 1:-1]
    weight = torch.from_numpy(
        np.clip(distance / (feather + 1), 0, 1) if feather > 0 else inside.astype(np.float32)
    )
    mixed = torch.lerp(image.float(), written.float(), weight.float().to(image.device))
    return torch.where(mask.to(image.device), mixed.to(image.dtype), image)


def _from_mask(values: np.ndarray, size: tuple[int, int]) -> Region:
    if values.shape != size:
        raise ValueError(
            f"the mask of `region` must have the picture's size {size[1]}x{size[0]}, got "
            f"{values.shape[1]}x{values.shape[0]}: resize it."
        )
    if not values.any():
        raise ValueError(
            "`region` is an empty mask: set the pixels that are to hold the text to true."
        )
    rows, columns = np.nonzero(values)
    corners = np.array([[dx, dy] for dx in (0, 1) for dy in (0, 1)])
    points = (np.stack([columns, rows], 1)[:, None] + corners).reshape(-1, 2)
    return Region(torch.from_numpy(values.copy()), _ordered(_rectangle(points)))


def _box_mask(box: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return the pixels whose centres are inside of a box."""
    x, y, w, h = box
    columns, rows = np.arange(size[1]) + 0.5, np.arange(size[0]) + 0.5
    return ((rows >= y) & (rows < y + h))[:, None] & ((columns >= x) & (columns < x + w))[None]


def _rectangle(points: np.ndarray) -> np.ndarray:
    """Return the corners of the rectangle of least area around points, upright if it is nearly so."""
    (x, y), (w, h), angle = cv2.minAreaRect(points.astype(np.float32))
    if min(angle % 90, 90 - angle % 90) < 1:
        low, high = points.min(0), points.max(0)
        return np.array([low, [high[0], low[1]], high, [low[0], high[1]]], np.float64)
    if min(w, h) < 1:
        w, h = max(w, 1.0), max(h, 1.0)
    return cv2.boxPoints(((x, y), (w, h), angle)).astype(np.float64)


def _ordered(corners: np.ndarray) -> np.ndarray:
    """Return corners in the order upper left, upper right, lower right, lower left of the text's reader."""
    best = corners
    for quad in (corners, corners[::-1]):
        for turn in range(4):
            turned = np.roll(quad, turn, axis=0)
            across, down = turned[1] - turned[0], turned[2] - turned[1]
            is_clockwise = across[0] * down[1] - across[1] * down[0] > 0
            if is_clockwise and across[0] > abs(across[1]) - 1e-9 and down[1] >= 0:
                return turned
            best = turned if is_clockwise and across[0] > 0 else best
    return best


def _is_convex(points: np.ndarray) -> bool:
    steps = np.roll(points, -1, axis=0) - points
    after = np.roll(steps, -1, axis=0)
    turns = steps[:, 0] * after[:, 1] - steps[:, 1] * after[:, 0]
    return bool((turns > 0).all() or (turns < 0).all())


def _to_picture(region: Region, line: Line, box: tuple[float, float]) -> np.ndarray:
    """Return the homography from points of the line to points of the picture, (3, 3)."""
    left, right = box
    source: Sequence[Sequence[float]] = [
        [left, line.top], [right, line.top], [right, line.bottom], [left, line.bottom],
    ]  # fmt: skip
    return cv2.getPerspectiveTransform(
        np.array(source, np.float32), region.corners.astype(np.float32)
    )


def _centres(height: int, width: int, fine: int) -> np.ndarray:
    """Return the centres of pixels, or of `fine` x `fine` parts of each, (height * fine, width * fine, 2)."""
    xs, ys = (np.arange(width * fine) + 0.5) / fine, (np.arange(height * fine) + 0.5) / fine
    return np.stack(np.meshgrid(xs, ys), -1)


def _apply(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    moved = points @ matrix[:, :2].T + matrix[:, 2]
    depth = moved[..., 2:]
    return moved[..., :2] / np.where(np.abs(depth) < 1e-9, 1e-9, depth)


def _normalised(points: np.ndarray, size: Sequence[int]) -> Tensor:
    """Return points in pixels as `grid_sample` needs them, (1, H, W, 2)."""
    height, width = size
    return (
        torch.from_numpy(points / np.array([width, height]) * 2 - 1)[None].float().clamp(-1e3, 1e3)
    )
