"""Convert flows between resolutions: relative to the side of a grid, in pixels, and between reduced pictures.

A **relative** flow is divided by the side of its grid: 1 is the whole picture. Its zero maps each pixel to the pixel at
the same fraction of the other picture's sides.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from overpaint.match import flow as flows
from overpaint.match.optical_flow import refine

__all__ = ["RefinedFlow", "interpolate", "reduce", "size_of", "std_in_pixels", "to_pixels"]

Size = tuple[int, int]  # height, width


@dataclass(frozen=True, eq=False)
class RefinedFlow:
    """A refined flow, (1, 2, h, w), in pixels, and the two pictures that it was refined on."""

    source: Tensor
    target: Tensor
    flow: Tensor

    @classmethod
    def compute(
        cls, relative: Tensor, align_corners: bool, source: Tensor, target: Tensor
    ) -> "RefinedFlow | None":
        """Refine a relative flow on two pictures; `None` if they are too small for that."""
        start = to_pixels(relative, size_of(source), size_of(target), align_corners)
        flow = refine(source, target, start)
        return None if flow is start else cls(source, target, flow)

    def resize(self, source: Size, target: Size) -> Tensor:
        """Return the flow between pictures of other sizes, (1, 2, H, W)."""
        size = size_of(self.source)
        if (size, size_of(self.target)) == (source, target):
            return self.flow
        return to_pixels(_to_relative(self.flow, size), source, target, False)


def size_of(image: Tensor) -> Size:
    """Return height and width of pictures (..., H, W)."""
    return image.shape[-2], image.shape[-1]


def reduce(source: Tensor, target: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """Return both pictures, each reduced so that its longer side is at most `longest` pixels."""
    result = []
    for image in (source, target):
        h, w = size_of(image)
        factor = longest / max(h, w)
        if factor < 1:
            size = (max(1, round(h * factor)), max(1, round(w * factor)))
            image = F.interpolate(
                image, size, mode="bilinear", antialias=True, align_corners=False
            ).clamp_(0, 1)
        result.append(image)
    return result[0], result[1]


def to_pixels(relative: Tensor, source: Size, target: Size, align_corners: bool) -> Tensor:
    """Return a relative flow on the target's grid, in the source's pixels, (1, 2, H, W)."""
    flow = interpolate(relative, target, align_corners)
    for channel, axis in ((0, 1), (1, 0)):
        # Shift to the same fraction of the other picture's side: zero if both have one size.
        pixel = torch.arange(target[axis], dtype=torch.float64)
        shift = ((pixel + 0.5) * (source[axis] / target[axis]) - 0.5 - pixel).float()
        flow[:, channel].mul_(source[axis]).add_(shift.view(-1, 1) if axis == 0 else shift)
    return flow


def std_in_pixels(squares: Tensor, source: Size, target: Size, align_corners: bool) -> Tensor:
    """Return the root of mean squares (1, 2, h, w) of a relative flow, in the source's pixels, (H, W)."""
    scale = squares.new_tensor([source[1], source[0]]).view(1, 2, 1, 1)
    total = (squares * scale**2).sum(1, keepdim=True)
    return interpolate(total, target, align_corners)[0, 0].sqrt_()


def interpolate(values: Tensor, size: Size, align_corners: bool = False) -> Tensor:
    """Return values (B, C, h, w) interpolated bilinearly to another size."""
    return F.interpolate(values, size, mode="bilinear", align_corners=align_corners)


def _to_relative(flow: Tensor, source: Size) -> Tensor:
    """Return a flow in the source's pixels as a relative flow on the same grid; the inverse of `to_pixels`."""
    h, w = size_of(flow)
    size = flow.new_tensor([source[1], source[0]]).view(1, 2, 1, 1)
    points = (2 * flows.to_mapping(flow) + 1) / size
    grid = (2 * flows.pixel_grid(h, w) + 1) / flow.new_tensor([w, h]).view(1, 2, 1, 1)
    return (points - grid) / 2
