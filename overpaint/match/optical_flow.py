"""Refine a flow by what the pictures look like.

The source is seen through the flow, and the optical flow from the target to what is seen is what the flow misses. The
matcher's grid of cells says which thing is where, small motions say where exactly.

Source: Kroeger et al., 2016 (DIS optical flow), https://arxiv.org/abs/1603.03590, as OpenCV has it.
Deviations: ours; neither paper puts the one behind the other.
"""

import threading
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from overpaint.match import flow as flows

__all__ = ["FARTHEST", "refined"]

FARTHEST = 1 / 16  # of the longer side: what lies beyond is no refinement
_LEAST = 16  # pixels of a side that patches of 8 need
_ONE = threading.Lock()


def refined(source: Tensor, target: Tensor, flow: Tensor) -> Tensor:
    """Return the flow with what it misses added, where that is less than a sixteenth of the longer side.

    Args:
        source: RGB in [0, 1], shape (1, 3, Ha, Wa).
        target: Shape (1, 3, Hb, Wb).
        flow: On the target's grid, pointing into the source, in pixels, shape (1, 2, Hb, Wb).

    Returns:
        A flow of the same kind; `flow` itself for pictures of less than 16 pixels a side.
    """
    h, w = target.shape[2:]
    if min(h, w) < _LEAST:
        return flow
    height, width = source.shape[2:]
    size = torch.tensor([width, height], device=flow.device)
    places = (2 * flows.to_mapping(flow).permute(0, 2, 3, 1) + 1) / size - 1
    # The border goes on where the source ends: a black edge would be followed.
    seen = F.grid_sample(source, places, padding_mode="border", align_corners=False)
    missed = torch.from_numpy(_dis(_grey(target), _grey(seen)))
    missed = missed.permute(2, 0, 1)[None].to(flow)
    near = missed.norm(dim=1, keepdim=True) < FARTHEST * max(h, w)
    return flows.compose(flow, missed * near)


def _dis(target: NDArray[np.uint8], seen: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return where each pixel of the target lies in what is seen, (H, W, 2), by one thread: more change the answer."""
    import cv2

    solver: Any = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    solver.setFinestScale(0)
    with _ONE:  # the number of threads is the process's
        threads = cv2.getNumThreads()
        cv2.setNumThreads(1)
        try:
            return solver.calc(target, seen, None)
        finally:
            cv2.setNumThreads(threads)


def _grey(image: Tensor) -> NDArray[np.uint8]:
    import cv2

    pixels = (image[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    return np.asarray(cv2.cvtColor(np.ascontiguousarray(pixels), cv2.COLOR_RGB2GRAY), np.uint8)
