"""What `quality_match` measures the matcher against. None of it is in the package.

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
from overpaint.match.conditioning import describe

__all__ = ["Initial", "dis", "farneback", "sift", "zero"]

Points = NDArray[np.float64]
RATIO = 0.8  # Lowe's
NEAREST = 10  # neighbours of a vector
FAR = 0.05  # a vector farther from its neighbours' median than this share of a side goes
# How far a feature lies from the centre of its cell, in cells. The backbone's strides begin at a corner, and it adds up
# maps of three strides, so that no formula tells. Chosen on the photographs of `photographs.VALIDATION`, warped as in
# training (40 pairs, from -1/2 to 0 by eighths): the least error there of the initial flow and its medians at 256 and
# 512, and of the mutual one at 512, half a per cent below that at 0. Whole pictures that are shifted cannot tell.
OFFSET = -0.25


def zero(source: Tensor, target: Tensor) -> Tensor:
    """Return a flow of nothing."""
    return torch.zeros(2, *target.shape[1:])


def dis(source: Tensor, target: Tensor) -> Tensor:
    """Return OpenCV's DIS flow, its preset "medium"."""
    solver = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)  # type: ignore[attr-defined]
    return _tensor(solver.calc(_grey(target), _grey(source), None))  # type: ignore[call-overload]


def farneback(source: Tensor, target: Tensor) -> Tensor:
    """Return OpenCV's Farneback flow: six levels, a window of 21."""
    found = cv2.calcOpticalFlowFarneback(
        _grey(target), _grey(source), None, 0.5, 6, 21, 3, 7, 1.5, 0  # type: ignore[call-overload]
    )  # fmt: skip
    return _tensor(found)


def sift(source: Tensor, target: Tensor) -> Tensor:
    """Return SIFT's matches by the ratio test that their neighbours bear out, interpolated linearly."""
    finder = cv2.SIFT_create()  # type: ignore[attr-defined]
    keys_a, told_a = finder.detectAndCompute(_grey(source), None)
    keys_b, told_b = finder.detectAndCompute(_grey(target), None)
    if told_a is None or told_b is None or len(keys_a) < 2 or len(keys_b) < 2:
        return zero(source, target)
    pairs = cv2.BFMatcher().knnMatch(told_b, told_a, k=2)
    good = [first for first, second in pairs if first.distance < RATIO * second.distance]
    if not good:
        return zero(source, target)
    at = np.array([keys_b[m.queryIdx].pt for m in good])
    flow = np.array([keys_a[m.trainIdx].pt for m in good]) - at
    size = (target.shape[1], target.shape[2])
    return _spread(*_borne_out(at, flow, FAR * max(size)), size)


class Initial:
    """The matcher's initial flow, to the most alike place of its features' grid, and what filters make of it.

    Args:
        matcher: Whose backbone to take.
        source: As above.
        target: As above.
        side: That both pictures are resized to; the features' grid has an eighth of it.
    """

    def __init__(self, matcher: Matcher, source: Tensor, target: Tensor, side: int) -> None:
        config = replace(matcher.config, image=side, grid=side // 8, sr_grid=side // 4)
        shrunk = (
            F.interpolate(x[None], (side, side), mode="bilinear", antialias=True).clamp(0, 1)
            for x in (source, target)
        )
        a, b = (describe(matcher.backbone, config, x) for x in shrunk)
        volume = correlation.global_cost(a.coarse, b.coarse)
        self.size = (target.shape[1], target.shape[2])
        self.cells = correlation.initial_flow(volume)[0].numpy()  # (2, g, g)
        self.missed = correlation.cycle_error(volume)[0, 0].numpy()

    def flow(self) -> Tensor:
        """Return it as it is, enlarged."""
        return self._full(self.cells)

    def median(self, kernel: int) -> Tensor:
        """Return it after a median filter of `kernel` by `kernel` cells."""
        return self._full(np.stack([median_filter(c, kernel, mode="nearest") for c in self.cells]))

    def mutual(self) -> Tensor:
        """Return what there-and-back confirms to a cell, and its neighbours bear out, interpolated linearly."""
        side = self.cells.shape[-1]
        rows, columns = np.nonzero(self.missed <= 1)
        if len(rows) == 0:
            return self.flow()
        scale = np.array([self.size[1], self.size[0]]) / side
        at = (np.stack([columns, rows], 1) + 0.5 + OFFSET) * scale - 0.5
        flow = self.cells[:, rows, columns].T * scale
        return _spread(*_borne_out(at, flow, FAR * max(self.size)), self.size)

    def doubt(self) -> Tensor:
        """Return by how many cells there-and-back misses, enlarged, (H, W)."""
        return self._enlarged(self.missed[None])[0]

    def _full(self, cells: NDArray[np.float32]) -> Tensor:
        side = cells.shape[-1]
        scale = torch.tensor([self.size[1] / side, self.size[0] / side]).view(2, 1, 1)
        return self._enlarged(cells) * scale

    def _enlarged(self, cells: NDArray[np.float32]) -> Tensor:
        """Read cells (C, g, g) at every pixel, bilinearly, each where its feature lies: (C, H, W)."""
        side = cells.shape[-1]
        y, x = ((2 * torch.arange(n) + 1) / n - 1 - 2 * OFFSET / side for n in self.size)
        places = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)[None]
        values = torch.from_numpy(np.ascontiguousarray(cells, dtype=np.float32))[None]
        return F.grid_sample(values, places, padding_mode="border", align_corners=False)[0]


def _borne_out(at: Points, flow: Points, far: float) -> tuple[Points, Points]:
    """Keep the vectors that are within `far` of the median of their nearest neighbours."""
    if len(at) < NEAREST:
        return at, flow
    _, near = KDTree(at).query(at, k=NEAREST)
    kept = np.linalg.norm(flow - np.median(flow[near], axis=1), axis=1) <= far
    return (at[kept], flow[kept]) if kept.any() else (at, flow)


def _spread(at: Points, flow: Points, size: tuple[int, int]) -> Tensor:
    """Interpolate scattered vectors linearly; outside of their hull the nearest one holds."""
    at, first = np.unique(at, axis=0, return_index=True)
    flow = flow[first]
    y, x = np.indices(size)
    places = np.stack([x.ravel(), y.ravel()], 1).astype(float)
    found = np.full((len(places), 2), np.nan)
    if len(at) >= 4 and np.linalg.matrix_rank(at - at[0]) == 2:
        found = LinearNDInterpolator(at, flow)(places)
    outside = np.isnan(found[:, 0])
    found[outside] = NearestNDInterpolator(at, flow)(places[outside])
    return _tensor(found.reshape(*size, 2))


def _grey(image: Tensor) -> NDArray[np.uint8]:
    pixels = (image * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
    return cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)  # type: ignore[return-value]


def _tensor(flow: NDArray[np.float64]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(flow.transpose(2, 0, 1))).float()
