"""Pictures to warp: crops of photographs with flat and repetitive patches, and the effects of a camera.

All random draws come from a generator. A crop is twice as wide as the pictures that are cut from it, so that a warped
view shows real content beyond the frame of the other one; mirrored borders would train false matches.

Source: Nam et al., 2024 (DiffMatch), https://arxiv.org/abs/2305.19094, trains on warped photographs.
Deviations: adds patches, and random light, blur and noise.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["add_patches", "camera", "crop", "uniform"]


def uniform(generator: torch.Generator, low: float, high: float, *shape: int) -> Tensor:
    """Return uniform random numbers between `low` and `high`, float64, shape `shape`."""
    draws = torch.rand(shape, generator=generator, dtype=torch.float64)
    return low + (high - low) * draws


def crop(photo: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """Return a random crop of a photograph, float (1, 3, side, side) in [0, 1], possibly mirrored or transposed.

    The crop has 65 to 100 % of either side; its aspect ratio changes, as that of a picture does before matching.

    Args:
        photo: RGB uint8 (3, H, W), or float in [0, 1].
        side: In pixels.
        generator: Source of all random draws.
    """
    h, w = photo.shape[1:]
    share = uniform(generator, 0.65, 1.0, 2)
    rows, columns = round(h * float(share[0])), round(w * float(share[1]))
    corner = uniform(generator, 0.0, 1.0, 2)
    top, left = int((h - rows + 1) * corner[0]), int((w - columns + 1) * corner[1])
    piece = photo[None, :, top : top + rows, left : left + columns]
    piece = piece.float() / 255 if piece.dtype == torch.uint8 else piece.float()
    turns = uniform(generator, 0.0, 1.0, 2)
    if turns[0] < 0.5:
        piece = piece.flip(3)
    if turns[1] < 0.25:
        piece = piece.transpose(2, 3)
    antialias = min(rows, columns) > side  # the filter is slow, and needed only to reduce a picture
    return F.interpolate(
        piece, (side, side), mode="bilinear", align_corners=False, antialias=antialias
    ).clamp(0, 1)


def add_patches(
    pictures: Tensor, generator: torch.Generator, *, fill: str, shape: str, share: float = 0.3
) -> Tensor:
    """Return `pictures` (1, 3, S, S) with one to four patches on them.

    Args:
        pictures: Not changed.
        generator: Source of all random draws.
        fill: `"flat"` (one color), `"shaded"` (a faint gradient), `"tiles"` (a small piece of the picture, repeated) or
            `"pattern"` (gratings, checkers and dots).
        shape: `"box"` (upright rectangles) or `"blob"` (stars with three to eight round rays, ellipses among them).
        share: Largest half-width of a patch, as a fraction of the side.

    Raises:
        ValueError: `fill` or `shape` is unknown.
    """
    side = pictures.shape[-1]
    count = 1 + int(uniform(generator, 0, 4))
    for _ in range(count):
        x, y = _centred(side, generator)
        radius = uniform(generator, 0.25 * share, share, 2)
        if shape == "box":
            mask = (x.abs() < radius[0]) & (y.abs() < radius[1])
        elif shape == "blob":
            rays = 3 + int(uniform(generator, 0, 6))
            depth, phase = uniform(generator, 0.0, 0.5), uniform(generator, 0, 2 * math.pi)
            angle = torch.atan2(y, x)
            edge = (1 - depth) + depth * torch.cos(rays * angle + phase)
            mask = (x / radius[0]) ** 2 + (y / radius[1]) ** 2 < edge**2
        else:
            raise ValueError(f"unknown shape {shape!r}: choose 'box' or 'blob'.")
        pictures = torch.where(mask, _fill(fill, pictures, generator), pictures)
    return pictures


def camera(pictures: Tensor, generator: torch.Generator, strength: float = 1.0) -> Tensor:
    """Return `pictures` (1, 3, H, W) with random changes of light and color, blur and noise, as of another camera.

    Args:
        pictures: In [0, 1].
        generator: Source of all random draws.
        strength: 1 for training; 0 changes nothing.
    """
    draw = uniform(generator, -1.0, 1.0, 6) * strength
    gain = (1 + 0.25 * draw[0] + 0.1 * draw[1:4]).float().view(1, 3, 1, 1)
    pictures = (pictures * gain + 0.12 * float(draw[4])).clamp(1e-4, 1)
    pictures = pictures ** math.exp(0.4 * float(draw[5]))
    chance, blur, noise = (float(v) for v in uniform(generator, 0.0, 1.0, 3))
    if chance < 0.35 * strength:
        pictures = _blur(pictures, 0.4 + 1.2 * blur * strength)
    if chance > 1 - 0.5 * strength:
        spread = 0.05 * strength * noise
        pictures = pictures + spread * torch.randn(pictures.shape, generator=generator)
    return pictures.clamp(0, 1)


def _centred(side: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the coordinates x and y of a square picture of side 1, relative to a random centre."""
    coordinates = (torch.arange(side) + 0.5) / side
    centre = uniform(generator, 0.2, 0.8, 2).float()
    return coordinates[None, :] - centre[0], coordinates[:, None] - centre[1]


def _fill(kind: str, pictures: Tensor, generator: torch.Generator) -> Tensor:
    side = pictures.shape[-1]
    color = uniform(generator, 0.0, 1.0, 3).float().view(1, 3, 1, 1)
    x, y = _centred(side, generator)
    if kind == "flat":
        return color
    if kind == "shaded":
        slope = uniform(generator, -0.4, 0.4, 2).float()
        return (color + slope[0] * x + slope[1] * y).clamp(0, 1)
    if kind == "tiles":
        tile = int(uniform(generator, 10, 44))
        top, left = (int(v) for v in uniform(generator, 0, side - tile, 2))
        piece = pictures[..., top : top + tile, left : left + tile]
        repeats = -(-side // tile)
        return piece.repeat(1, 1, repeats, repeats)[..., :side, :side]
    if kind != "pattern":
        raise ValueError(f"unknown fill {kind!r}: choose 'flat', 'shaded', 'tiles' or 'pattern'.")
    other = uniform(generator, 0.0, 1.0, 3).float().view(1, 3, 1, 1)
    angle = float(uniform(generator, 0, math.pi))
    waves = (2 * math.pi * side / uniform(generator, 10, 40, 2)).float()  # periods in pixels
    along, across = (
        torch.sin(waves[0] * (math.cos(angle) * x + math.sin(angle) * y)),
        torch.sin(waves[1] * (math.cos(angle) * y - math.sin(angle) * x)),
    )
    which = int(uniform(generator, 0, 3))
    field = (along, along * across, torch.minimum(along, across) - 0.3)[which]
    return torch.lerp(color, other, torch.sigmoid(12 * field))


def _blur(pictures: Tensor, sigma: float) -> Tensor:
    reach = math.ceil(2.5 * sigma)
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
    kernel = (kernel / kernel.sum()).view(1, 1, 1, -1).expand(3, 1, 1, -1)
    padded = F.pad(pictures, (reach,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel, groups=3), kernel.transpose(2, 3), groups=3)
