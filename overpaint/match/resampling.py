"""Flows between pictures of any size: over the side of a grid, in pixels, refined, and between reduced pictures."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from overpaint.match import flow as fields
from overpaint.match.optical_flow import refined

__all__ = ["Refined", "deviation", "enlarged", "grown", "reduced", "size_of"]

Size = tuple[int, int]  # height, width


@dataclass(frozen=True, eq=False)
class Refined:
    """A refined flow, (1, 2, h, w), in the pixels of the pictures that it was refined by."""

    source: Tensor
    target: Tensor
    flow: Tensor

    @classmethod
    def of(cls, flow: Tensor, corners: bool, source: Tensor, target: Tensor) -> "Refined | None":
        """Refine a flow over its side by two pictures; None if they are too small for that."""
        given = enlarged(flow, size_of(source), size_of(target), corners)
        found = refined(source, target, given)
        return None if found is given else cls(source, target, found)

    def at(self, source: Size, target: Size) -> Tensor:
        """Return the flow between pictures of other sizes, (1, 2, H, W)."""
        own = size_of(self.source)
        if (own, size_of(self.target)) == (source, target):
            return self.flow
        return enlarged(_shares(self.flow, own), source, target, False)


def size_of(image: Tensor) -> Size:
    """Return height and width of pictures (..., H, W)."""
    return image.shape[-2], image.shape[-1]


def reduced(source: Tensor, target: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Return the pictures, the longer side of each at most so many pixels."""
    result = []
    for image in (source, target):
        h, w = size_of(image)
        factor = most / max(h, w)
        if factor < 1:
            size = (max(1, round(h * factor)), max(1, round(w * factor)))
            image = F.interpolate(
                image, size, mode="bilinear", antialias=True, align_corners=False
            ).clamp_(0, 1)
        result.append(image)
    return result[0], result[1]


def enlarged(flow: Tensor, source: Size, target: Size, corners: bool) -> Tensor:
    """Bring a flow over its side to the target's grid and the source's pixels, (1, 2, H, W)."""
    shares = grown(flow, target, corners)
    for channel, axis in ((0, 1), (1, 0)):
        # Where the same share of the other picture lies: nowhere else if both are of one size.
        own = torch.arange(target[axis], dtype=torch.float64)
        shift = ((own + 0.5) * (source[axis] / target[axis]) - 0.5 - own).float()
        shares[:, channel].mul_(source[axis]).add_(shift.view(-1, 1) if axis == 0 else shift)
    return shares


def deviation(squares: Tensor, source: Size, target: Size, corners: bool) -> Tensor:
    """Bring the mean squares of a flow over its side to the target's grid: their root in pixels, (H, W)."""
    scale = squares.new_tensor([source[1], source[0]]).view(1, 2, 1, 1)
    total = (squares * scale**2).sum(1, keepdim=True)
    return grown(total, target, corners)[0, 0].sqrt_()


def grown(values: Tensor, size: Size, corners: bool = False) -> Tensor:
    """Interpolate values (B, C, h, w) to another size."""
    return F.interpolate(values, size, mode="bilinear", align_corners=corners)


def _shares(flow: Tensor, source: Size) -> Tensor:
    """Undo what `enlarged` does, on the grid that the flow is on."""
    h, w = size_of(flow)
    places = (2 * fields.to_mapping(flow) + 1) / flow.new_tensor([source[1], source[0]]).view(
        1, 2, 1, 1
    )
    own = (2 * fields.pixel_grid(h, w) + 1) / flow.new_tensor([w, h]).view(1, 2, 1, 1)
    return (places - own) / 2
