"""Refine a flow by optical flow on the pictures themselves.

The source is warped by the flow, and the optical flow from the target to the warped source is added to the flow. The
matcher finds the corresponding object on a coarse grid; the optical flow gives its position to less than a cell.

Source: Kroeger et al., 2016 (DIS optical flow), https://arxiv.org/abs/1603.03590, OpenCV's implementation.
Deviations: the combination is ours; neither paper refines a matcher by optical flow.
"""

import threading
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from overpaint.match import flow as flows

__all__ = ["MAX_CORRECTION", "refine"]

MAX_CORRECTION = 1 / 16  # of the longer side; larger corrections are ignored
_MIN_SIDE = 16  # pixels; DIS needs it for its patches of 8
_LOCK = threading.Lock()


def refine(source: Tensor, target: Tensor, flow: Tensor) -> Tensor:
    """Return the flow plus a correction by optical flow where it is less than a sixteenth of the longer side.

    Args:
        source: RGB in [0, 1], shape (1, 3, Ha, Wa).
        target: Shape (1, 3, Hb, Wb).
        flow: On the target's grid, pointing into the source, in pixels, shape (1, 2, Hb, Wb).

    Returns:
        A flow of the same shape; `flow` itself if the target has a side of less than 16 pixels.
    """
    h, w = target.shape[2:]
    if min(h, w) < _MIN_SIDE:
        return flow
    height, width = source.shape[2:]
    size = torch.tensor([width, height], device=flow.device)
    points = (2 * flows.to_mapping(flow).permute(0, 2, 3, 1) + 1) / size - 1
    # Padded with the border's colors, since optical flow would follow a black edge.
    warped = F.grid_sample(source, points, padding_mode="border", align_corners=False)
    correction = torch.from_numpy(_dis(_grey(target), _grey(warped)))
    correction = correction.permute(2, 0, 1)[None].to(flow)
    small = correction.norm(dim=1, keepdim=True) < MAX_CORRECTION * max(h, w)
    return flows.compose(flow, correction * small)


def _dis(target: NDArray[np.uint8], warped: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return the optical flow from the target to the warped source, (H, W, 2).

    Computed in one thread, since the result depends on the number of threads.
    """
    import cv2

    solver: Any = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    solver.setFinestScale(0)
    with _LOCK:  # the number of threads is a setting of the process
        threads = cv2.getNumThreads()
        cv2.setNumThreads(1)
        try:
            return solver.calc(target, warped, None)
        finally:
            cv2.setNumThreads(threads)


def _grey(image: Tensor) -> NDArray[np.uint8]:
    import cv2

    pixels = (image[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    return np.asarray(cv2.cvtColor(np.ascontiguousarray(pixels), cv2.COLOR_RGB2GRAY), np.uint8)
