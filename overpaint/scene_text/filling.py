"""Fill a part of a picture from the pixels around it, without a network.

Source: Telea, 2004, "An image inpainting technique based on the fast marching method", as OpenCV implements it.
"""

import cv2
import numpy as np
import torch
from torch import Tensor

__all__ = ["fill"]

_SIDE = 512  # pixels; larger pictures are reduced while they are filled
_RADIUS = 5  # pixels around the border from which it is continued


def fill(image: Tensor, mask: Tensor) -> Tensor:
    """Return a picture whose pixels under `mask` continue those around it; the others are unchanged.

    Args:
        image: RGB in [0, 1], float32 (3, H, W).
        mask: True where it is filled, bool (H, W); not everywhere.
    """
    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
    hidden = mask.numpy().astype(np.uint8)
    height, width = hidden.shape
    scale = min(1.0, _SIDE / max(height, width))
    small = (max(1, round(width * scale)), max(1, round(height * scale)))
    reduced = cv2.resize(pixels, small, interpolation=cv2.INTER_AREA)
    holes = cv2.dilate(
        (cv2.resize(hidden * 255, small, interpolation=cv2.INTER_AREA) > 0).astype(np.uint8),
        np.ones((3, 3), np.uint8),  # the blurred border of the old letters
    )
    filled = cv2.inpaint(reduced, holes, _RADIUS, cv2.INPAINT_TELEA)
    large = cv2.resize(filled, (width, height), interpolation=cv2.INTER_LINEAR)
    values = torch.from_numpy(large).permute(2, 0, 1).float() / 255
    return torch.where(mask, values, image)
