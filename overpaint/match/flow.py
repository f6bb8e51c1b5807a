r"""Flow fields: warp, resize, compose and compare them, read and write them.

One convention throughout. A flow :math:`F` is on the grid of the **target** and points into the **source**: pixel
:math:`p` of the target corresponds to the point :math:`p + F(p)` of the source. Shape (B, 2, H, W), float32, pixels;
channel 0 is x, rightwards, channel 1 is y, downwards. Pixel i covers [i - 0.5, i + 0.5], so a grid of n cells over W
pixels has the centre of cell i at (i + 0.5) W / n - 0.5: torch's `align_corners=False`.

Source: Nam et al., 2024 (DiffMatch), https://arxiv.org/abs/2305.19094.
Deviations: the reference code mixes both conventions of the corners, which shifts a field by up to half a cell at the
borders. `resize` has a switch for the reference's one.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from overpaint import files

__all__ = [
    "compose",
    "consistency",
    "homography_flow",
    "inside",
    "pixel_grid",
    "read_flo",
    "resize",
    "to_flow",
    "to_mapping",
    "warp",
    "write_flo",
]

_MAGIC = 202021.25  # the first four bytes of a .flo file, as a float


def pixel_grid(h: int, w: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the coordinates of every pixel, (x, y), shape (1, 2, h, w)."""
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    return torch.stack([x, y])[None].to(dtype)


def to_mapping(flow: Tensor) -> Tensor:
    """Return the points of the source that `flow` points to, in pixels, shape (B, 2, H, W)."""
    return flow + _grid_like(flow)


def to_flow(mapping: Tensor) -> Tensor:
    """Return the flow that points to the points `mapping`; the inverse of `to_mapping`."""
    return mapping - _grid_like(mapping)


def warp(images: Tensor, flow: Tensor) -> Tensor:
    """Return the source warped onto the target's grid: warped(p) = images(p + flow(p)).

    Args:
        images: The source, shape (B, C, Hs, Ws), any floating dtype.
        flow: On the target's grid, shape (B, 2, H, W), or (1, 2, H, W) for the whole batch.

    Returns:
        Shape (B, C, H, W), bilinear, 0 where the flow leaves the source.
    """
    return _sample(images, to_mapping(flow.expand(len(images), -1, -1, -1)), "zeros")


def inside(flow: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """Return where `flow` points to a point within the source.

    Args:
        flow: Shape (B, 2, H, W).
        size: Height and width of the source; by default those of the flow.

    Returns:
        Bool, shape (B, 1, H, W): the point lies between the centres of the source's outermost pixels.
    """
    h, w = size or (flow.shape[2], flow.shape[3])
    x, y = to_mapping(flow).split(1, dim=1)
    return (x >= 0) & (x <= w - 1) & (y >= 0) & (y <= h - 1)


def resize(flow: Tensor, size: tuple[int, int], *, align_corners: bool = False) -> Tensor:
    """Return the flow on a grid of `size` (height, width), in pixels of that grid.

    Both pictures are assumed to be resized by the same factors, so the values scale with the grid. Bilinear, without a
    low-pass filter.
    """
    h, w = size
    scale = flow.new_tensor([w / flow.shape[3], h / flow.shape[2]]).view(1, 2, 1, 1)
    return F.interpolate(flow, size, mode="bilinear", align_corners=align_corners) * scale


def compose(ab: Tensor, bc: Tensor) -> Tensor:
    """Return the flow from c to a through b.

    Args:
        ab: On b's grid, pointing into a, shape (B, 2, Hb, Wb).
        bc: On c's grid, pointing into b, shape (B, 2, Hc, Wc).

    Returns:
        On c's grid, pointing into a, shape (B, 2, Hc, Wc). Where `bc` points outside of b, `ab` is read at
            b's nearest border.
    """
    return bc + _sample(ab, to_mapping(bc), "border")


def consistency(forward: Tensor, backward: Tensor) -> Tensor:
    """Return the forward-backward error in pixels: distance from each pixel to its image under both, (B, 1, H, W).

    Args:
        forward: On the target's grid, pointing into the source, shape (B, 2, H, W).
        backward: On the source's grid, pointing into the target, shape (B, 2, Hs, Ws).
    """
    return compose(backward, forward).norm(dim=1, keepdim=True)


def homography_flow(matrix: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the flow of a homography.

    Args:
        matrix: Maps pixels (x, y, 1) of the source to the target, shape (3, 3) or (B, 3, 3).
        size: Height and width of the target.

    Returns:
        Shape (B, 2, H, W), float64, since tests use it as ground truth. NaN beyond the horizon of the plane.
    """
    inverse = torch.linalg.inv(matrix.double().reshape(-1, 3, 3))
    grid = pixel_grid(*size, dtype=torch.float64).flatten(2)  # (1, 2, H * W)
    points = inverse @ torch.cat([grid, torch.ones_like(grid[:, :1])], dim=1)
    # Points on the visible side of the horizon have a third coordinate of the same sign as its median.
    third = points[:, 2:]
    third = torch.where(
        third * torch.sign(third.median(2, keepdim=True).values) > 0, third, torch.nan
    )
    return to_flow((points[:, :2] / third).view(-1, 2, *size))


def read_flo(path: str | Path) -> Tensor:
    """Return the flow in a Middlebury `.flo` file, shape (1, 2, H, W).

    Raises:
        ValueError: The file has another format, or is truncated.
    """
    data = files.user_path(path, "path").read_bytes()
    if len(data) < 12 or np.frombuffer(data, "<f4", 1)[0] != _MAGIC:
        raise ValueError(
            f"{str(path)!r} is no .flo file: it must start with the number {_MAGIC}. "
            "Write one with `write_flo`, or read a .npy file with numpy."
        )
    w, h = (int(n) for n in np.frombuffer(data, "<i4", 2, 4))
    if min(w, h) < 1 or len(data) != 12 + 8 * w * h:
        raise ValueError(
            f"{str(path)!r} holds {len(data)} bytes, a flow of {w}x{h} takes {12 + 8 * w * h}: "
            "fetch or write the file again."
        )
    values = np.frombuffer(data, "<f4", offset=12).reshape(h, w, 2)
    return torch.from_numpy(values.astype(np.float32)).permute(2, 0, 1)[None].contiguous()


def write_flo(path: str | Path, flow: Tensor) -> None:
    """Write a flow of shape (2, H, W) or (1, 2, H, W) as a Middlebury `.flo` file.

    The file is written atomically.

    Raises:
        ValueError: The flow has another shape.
    """
    if flow.ndim == 4 and len(flow) == 1:
        flow = flow[0]
    if flow.ndim != 3 or len(flow) != 2:
        raise ValueError(
            f"a .flo file holds one flow of shape (2, H, W), got {tuple(flow.shape)}: write them one by one."
        )
    values = flow.detach().cpu().permute(1, 2, 0).contiguous().numpy().astype("<f4")
    header = np.array([_MAGIC], "<f4").tobytes() + np.array(values.shape[1::-1], "<i4").tobytes()
    with files.atomic(path) as draft:
        draft.write_bytes(header + values.tobytes())


def _grid_like(flow: Tensor) -> Tensor:
    return pixel_grid(flow.shape[2], flow.shape[3], dtype=flow.dtype).to(flow.device)


def _sample(images: Tensor, mapping: Tensor, padding: str) -> Tensor:
    """Read `images` (B, C, Hs, Ws) at `mapping` (B, 2, H, W), bilinearly."""
    size = mapping.new_tensor([images.shape[3], images.shape[2]]).view(1, 2, 1, 1)
    points = ((2 * mapping + 1) / size - 1).permute(0, 2, 3, 1)  # (B, H, W, 2), in [-1, 1]
    return F.grid_sample(
        images, points.to(images.dtype), mode="bilinear", padding_mode=padding, align_corners=False
    )
