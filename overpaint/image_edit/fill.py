"""Fill a hole of a picture from its surroundings, by the smoothest surface that continues them.

The surface minimises the squared Laplacian (biharmonic inpainting), so that plain and shaded grounds are continued
exactly. It is clipped to the range of the colors around the hole. Structure (stripes, texture) is not continued.
"""

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

__all__ = ["fill", "membrane", "smooth"]

_LARGEST = 60_000  # pixels of a hole: a system of this size is solved in about a second
_RADIUS = 4  # pixels around each point of a larger hole that its color is computed from


def fill(picture: Tensor, hole: Tensor) -> Tensor:
    """Return the picture with the hole filled from its border.

    Holes of more than 60,000 pixels are filled by OpenCV's inpainting, in 256 levels.

    Args:
        picture: RGB in [0, 1], float, shape (1, 3, H, W).
        hole: bool, (H, W).

    Returns:
        Pixels outside of the hole are unchanged bit for bit; without any pixel outside, all are.

    Source: Hoang and Damelin, 2017, https://arxiv.org/abs/1707.06567, for biharmonic inpainting; Bertalmio et al.,
    2001, https://doi.org/10.1109/CVPR.2001.990497, for large holes.
    """
    if not hole.any() or hole.all():
        return picture
    pixels = picture[0].permute(1, 2, 0).contiguous().numpy()
    mask = hole.contiguous().numpy()
    values = smooth(pixels, mask) if mask.sum() <= _LARGEST else _coarse(pixels, mask)
    filled = torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))[None].to(picture)
    return torch.where(hole, filled, picture)


def membrane(values: Tensor, hole: Tensor) -> Tensor:
    """Return values (1, C, H, W) whose hole, bool (H, W), is the membrane through the pixels around it, of any sign.

    Its Laplacian is 0. Membranes of more than 60,000 pixels are computed at a smaller size.

    Source: Perez et al., 2003 (Poisson image editing), https://doi.org/10.1145/882262.882269.
    """
    if not hole.any() or hole.all():
        return values
    factor = max(1, math.ceil((float(hole.sum()) / _LARGEST) ** 0.5))
    small, missing = values, hole
    if factor > 1:
        known = (~hole)[None, None].to(values)
        share = F.avg_pool2d(known, factor, ceil_mode=True)
        small = F.avg_pool2d(values * known, factor, ceil_mode=True) / share.clamp(min=1e-6)
        missing = share[0, 0] == 0
    pixels = small[0].permute(1, 2, 0).contiguous().numpy()
    surface = torch.from_numpy(smooth(pixels, missing.contiguous().numpy(), order=1)).permute(
        2, 0, 1
    )[None]
    if factor > 1:
        surface = F.interpolate(surface, hole.shape, mode="bilinear", align_corners=False)
    return torch.where(hole, surface.to(values), values)


def smooth(pixels: NDArray[Any], hole: NDArray[np.bool_], *, order: int = 2) -> NDArray[np.float32]:
    """Return pixels (H, W, C), float32, whose hole minimises the sum of squared Laplacians.

    They are clipped to the range of the pixels next to the hole.

    Args:
        pixels: Values.
        hole: Where they are replaced.
        order: 2 counts the Laplacians in the hole and next to it, which gives a biharmonic surface; 1 those in the hole
            alone, which are then 0.
    """
    from scipy.sparse import csr_matrix, diags
    from scipy.sparse.linalg import spsolve

    height, width = hole.shape
    number = np.arange(height * width).reshape(height, width)
    pairs = np.concatenate(
        [
            np.stack([number[:, :-1], number[:, 1:]], -1).reshape(-1, 2),
            np.stack([number[:-1], number[1:]], -1).reshape(-1, 2),
        ]
    )
    inside = hole.ravel()
    pairs = pairs[inside[pairs].any(1)]  # only these touch the hole
    ring = np.unique(pairs)
    all_pairs = _neighbours(number, ring)
    ones = np.ones(len(all_pairs), np.float64)
    size = height * width
    adjacency = csr_matrix((ones, (all_pairs[:, 0], all_pairs[:, 1])), shape=(size, size))
    unknown = np.flatnonzero(inside)
    rows = ring if order == 2 else unknown
    laplacian = (diags(np.asarray(adjacency.sum(1)).ravel()) - adjacency).tocsr()[rows]
    matrix = laplacian[:, unknown]
    values = pixels.reshape(size, -1).astype(np.float64)
    known = np.where(inside[:, None], 0, values)
    right = -(matrix.T @ (laplacian @ known))
    solved = spsolve((matrix.T @ matrix).tocsc(), right)
    border = ring[~inside[ring]]
    low, high = values[border].min(0), values[border].max(0)
    values[unknown] = np.clip(np.asarray(solved).reshape(len(unknown), -1), low, high)
    return values.reshape(height, width, -1).astype(np.float32)


def _neighbours(number: NDArray[np.int64], cells: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the pairs of each cell with its four neighbours in the picture, (P, 2)."""
    height, width = number.shape
    rows, columns = np.divmod(cells, width)
    pairs = []
    for dy, dx in ((0, 1), (0, -1), (1, 0), (-1, 0)):
        y, x = rows + dy, columns + dx
        valid = (y >= 0) & (y < height) & (x >= 0) & (x < width)
        pairs.append(np.stack([cells[valid], (y * width + x)[valid]], -1))
    return np.concatenate(pairs)


def _coarse(pixels: NDArray[np.float32], hole: NDArray[np.bool_]) -> NDArray[np.float32]:
    import cv2

    levels = (pixels * 255).round().astype(np.uint8)
    filled = cv2.inpaint(levels, hole.astype(np.uint8), _RADIUS, cv2.INPAINT_NS)
    return np.asarray(filled, np.float32) / np.float32(255)
