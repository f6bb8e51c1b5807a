"""The baselines of `quality_match`; none of them is in the package.

Every function takes source and target, RGB in [0, 1], shape (3, H, W), of one size, and returns a flow (2, H, W) on the
target's grid, pointing into the source, in pixels.
"""

from dataclasses import replace

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from scipy.interpolate import LinearNDInterpolator, NearestNDInterpolator
from scipy.ndimage import median_filter
from scipy.spatial import KDTree
from torch import Tensor
from torch.nn import functional as F

from overpaint.match import Matcher, correlation
from overpaint.match.conditioning import extract_features

__all__ = ["Initial", "dis", "farneback", "sift", "zero"]

Points = NDArray[np.float64]
RATIO = 0.8  # Lowe's
NEAREST = 10  # neighbours of a vector
FAR = 0.05  # vectors farther from their neighbours' median than this part of a side are removed
# Offset of a feature from the centre of its cell, in cells. It does not follow from the architecture, since the strides
# begin at a corner and maps of three strides are summed. Chosen on the photographs of `photographs.VALIDATION`, warped
# as in training (40 pairs, from -1/2 to 0 by eighths): it has the least error of the initial flow and its medians at
# 256 and 512, and of the mutual flow at 512, half a per cent below that at 0. Shifted pictures cannot determine it.
OFFSET = -0.25


def zero(source: Tensor, target: Tensor) -> Tensor:
    """Return a zero flow."""
    return torch.zeros(2, *target.shape[1:])


def dis(source: Tensor, target: Tensor) -> Tensor:
    """Return OpenCV's DIS flow with the preset "medium"."""
    solver = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)  # type: ignore[attr-defined]
    return _tensor(solver.calc(_grey(target), _grey(source), None))  # type: ignore[call-overload]


def farneback(source: Tensor, target: Tensor) -> Tensor:
    """Return OpenCV's Farneback flow with six levels and a window of 21."""
    flow = cv2.calcOpticalFlowFarneback(
        _grey(target), _grey(source), None, 0.5, 6, 21, 3, 7, 1.5, 0  # type: ignore[call-overload]
    )  # fmt: skip
    return _tensor(flow)


def sift(source: Tensor, target: Tensor) -> Tensor:
    """Return SIFT's matches after the ratio test and a check against their neighbours, interpolated linearly."""
    finder = cv2.SIFT_create()  # type: ignore[attr-defined]
    keys_a, descriptors_a = finder.detectAndCompute(_grey(source), None)
    keys_b, descriptors_b = finder.detectAndCompute(_grey(target), None)
    if descriptors_a is None or descriptors_b is None or len(keys_a) < 2 or len(keys_b) < 2:
        return zero(source, target)
    pairs = cv2.BFMatcher().knnMatch(descriptors_b, descriptors_a, k=2)
    good = [first for first, second in pairs if first.distance < RATIO * second.distance]
    if not good:
        return zero(source, target)
    at = np.array([keys_b[m.queryIdx].pt for m in good])
    flow = np.array([keys_a[m.trainIdx].pt for m in good]) - at
    size = (target.shape[1], target.shape[2])
    return _spread(*_consistent(at, flow, FAR * max(size)), size)


class Initial:
    """The matcher's initial flow, to the most similar cell of the feature map, and filtered versions of it.

    Args:
        matcher: Its backbone is used.
        source: RGB in [0, 1], shape (3, H, W).
        target: RGB in [0, 1], shape (3, H, W).
        side: Side that both pictures are resized to; the feature map has an eighth of it.
    """

    def __init__(self, matcher: Matcher, source: Tensor, target: Tensor, side: int) -> None:
        config = replace(matcher.config, image=side, grid=side // 8, sr_grid=side // 4)
        shrunk = (
            F.interpolate(x[None], (side, side), mode="bilinear", antialias=True).clamp(0, 1)
            for x in (source, target)
        )
        a, b = (extract_features(matcher.backbone, config, x) for x in shrunk)
        volume = correlation.global_cost(a.coarse, b.coarse)
        self.size = (target.shape[1], target.shape[2])
        self.cells = correlation.initial_flow(volume)[0].numpy()  # (2, g, g)
        self.cycle_error = correlation.cycle_error(volume)[0, 0].numpy()

    def flow(self) -> Tensor:
        """Return the flow itself, enlarged."""
        return self._full(self.cells)

    def median(self, kernel: int) -> Tensor:
        """Return the flow after a median filter of `kernel` by `kernel` cells."""
        return self._full(np.stack([median_filter(c, kernel, mode="nearest") for c in self.cells]))

    def mutual(self) -> Tensor:
        """Return the vectors of cycle error 1 or less that agree with their neighbours, interpolated linearly."""
        side = self.cells.shape[-1]
        rows, columns = np.nonzero(self.cycle_error <= 1)
        if len(rows) == 0:
            return self.flow()
        scale = np.array([self.size[1], self.size[0]]) / side
        at = (np.stack([columns, rows], 1) + 0.5 + OFFSET) * scale - 0.5
        flow = self.cells[:, rows, columns].T * scale
        return _spread(*_consistent(at, flow, FAR * max(self.size)), self.size)

    def uncertainty(self) -> Tensor:
        """Return the cycle error in cells, enlarged, (H, W)."""
        return self._enlarged(self.cycle_error[None])[0]

    def _full(self, cells: NDArray[np.float32]) -> Tensor:
        side = cells.shape[-1]
        scale = torch.tensor([self.size[1] / side, self.size[0] / side]).view(2, 1, 1)
        return self._enlarged(cells) * scale

    def _enlarged(self, cells: NDArray[np.float32]) -> Tensor:
        """Return cells (C, g, g) interpolated to every pixel, with the offset of the features: (C, H, W)."""
        side = cells.shape[-1]
        y, x = ((2 * torch.arange(n) + 1) / n - 1 - 2 * OFFSET / side for n in self.size)
        points = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)[None]
        values = torch.from_numpy(np.ascontiguousarray(cells, dtype=np.float32))[None]
        return F.grid_sample(values, points, padding_mode="border", align_corners=False)[0]


def _consistent(at: Points, flow: Points, far: float) -> tuple[Points, Points]:
    """Return the vectors that are within `far` of the median of their nearest neighbours, or all if none is."""
    if len(at) < NEAREST:
        return at, flow
    _, neighbours = KDTree(at).query(at, k=NEAREST)
    good = np.linalg.norm(flow - np.median(flow[neighbours], axis=1), axis=1) <= far
    return (at[good], flow[good]) if good.any() else (at, flow)


def _spread(at: Points, flow: Points, size: tuple[int, int]) -> Tensor:
    """Return scattered vectors interpolated linearly; outside of their convex hull the nearest one is used."""
    at, first = np.unique(at, axis=0, return_index=True)
    flow = flow[first]
    y, x = np.indices(size)
    pixels = np.stack([x.ravel(), y.ravel()], 1).astype(float)
    values = np.full((len(pixels), 2), np.nan)
    if len(at) >= 4 and np.linalg.matrix_rank(at - at[0]) == 2:
        values = LinearNDInterpolator(at, flow)(pixels)
    outside = np.isnan(values[:, 0])
    values[outside] = NearestNDInterpolator(at, flow)(pixels[outside])
    return _tensor(values.reshape(*size, 2))


def _grey(image: Tensor) -> NDArray[np.uint8]:
    pixels = (image * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
    return cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)  # type: ignore[return-value]


def _tensor(flow: NDArray[np.float64]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(flow.transpose(2, 0, 1))).float()
