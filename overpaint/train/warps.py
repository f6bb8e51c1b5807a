r"""Pairs of pictures with a known flow between them, made by warping one photograph.

Coordinates are (x, y) from -1 to 1, float64: :math:`u = (2 x + 1) / W - 1`. A family draws a random mapping :math:`m`
from points of the target to points of the source. The target is the scene sampled at :math:`m`, and the flow is
:math:`m(p) - p`: the ground truth is exact, without inverting a mapping.

Training draws homographies, affine maps and thin-plate splines in equal parts, a quarter of them with layers that move
independently. The test pairs use other families: cubic B-spline fields, lens distortions, and homographies followed by
a spline; their patches have other shapes and fills.

Source: Bookstein, 1989 (thin-plate splines), https://doi.org/10.1109/34.24792; Nam et al., 2024 (DiffMatch),
https://arxiv.org/abs/2305.19094, which trains on the first three families; the layers replace its moving objects.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from overpaint.match import flow as flows
from overpaint.train import scenes
from overpaint.train.scenes import uniform

__all__ = ["KINDS", "Pair", "homography", "pair", "pairs", "spline", "thin_plate"]

KINDS = ("training", "plain", "textureless", "repetitive", "large", "layered")

Family = Callable[[Tensor, torch.Generator], Tensor]


class Pair(NamedTuple):
    """Two pictures (B, 3, H, W) in [0, 1], the flow (B, 2, H, W) in pixels and its valid mask, bool (B, 1, H, W)."""

    source: Tensor
    target: Tensor
    flow: Tensor
    valid: Tensor


def pair(photo: Tensor, seed: int, kind: str = "training", *, size: int = 256) -> Pair:
    """Return two views of a photograph and the flow from the second into the first, as a batch of one.

    Args:
        photo: RGB uint8 (3, H, W), or float in [0, 1].
        seed: Seed of all random draws; the same photo, seed and kind give the same pair.
        kind: `"training"`; `"plain"`, `"textureless"` and `"repetitive"`, which use other families; `"large"`, whose
            mean flow is more than a fifth of the side; or `"layered"`, with patches that move independently.
        size: Height and width of both pictures.

    Returns:
        The flow is valid where it points to a point within the source.

    Raises:
        ValueError: `kind` is unknown.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}: choose from {', '.join(KINDS)}.")
    generator = torch.Generator().manual_seed(seed)
    scene = _scene(scenes.crop(photo, 2 * size, generator), kind, generator)
    grid = _grid(size)
    mapping = _mapping(kind, grid, generator)
    flow = ((mapping - grid) * (size / 2)).permute(2, 0, 1)[None]
    edge = size // 2
    source = scene[..., edge:-edge, edge:-edge]
    points = (mapping / 2)[None].to(scene.dtype)  # the scene is twice as wide, with the same centre
    target = F.grid_sample(scene, points, padding_mode="reflection", align_corners=False)
    strength = 1.0 if kind == "training" else 0.5
    first, second = (scenes.camera(p, generator, strength) for p in (source, target))
    return Pair(first, second, flow.float(), flows.inside(flow))


def pairs(
    photos: list[Tensor], seeds: list[int], kind: str = "training", *, size: int = 256
) -> Pair:
    """Return one pair of each photo and seed, in one batch; arguments and errors as in `pair`."""
    results = [pair(p, s, kind, size=size) for p, s in zip(photos, seeds, strict=True)]
    return Pair(*(torch.cat(parts) for parts in zip(*results, strict=True)))


def homography(corners: Tensor, grid: Tensor) -> Tensor:
    """Return `grid` (..., 2) moved by the homography that maps (-1, -1), (1, -1), (1, 1), (-1, 1) to `corners`."""
    square = _SQUARE.to(corners)
    rows, zeros = (
        torch.cat([square, torch.ones(4, 1).to(corners)], 1),
        torch.zeros(4, 3).to(corners),
    )
    first = torch.cat([rows, zeros, -corners[:, :1] * square], 1)
    second = torch.cat([zeros, rows, -corners[:, 1:] * square], 1)
    solved = torch.linalg.solve(
        torch.cat([first, second]), torch.cat([corners[:, 0], corners[:, 1]])
    )
    matrix = torch.cat([solved, solved.new_ones(1)]).view(3, 3)
    moved = grid @ matrix[:, :2].t() + matrix[:, 2]
    return moved[..., :2] / moved[..., 2:]


def thin_plate(points: Tensor, offsets: Tensor, grid: Tensor) -> Tensor:
    """Return `grid` (..., 2) moved by the thin-plate spline that moves `points` (N, 2) by `offsets` (N, 2)."""
    n = len(points)
    rows = torch.cat([points.new_ones(n, 1), points], 1)
    system = points.new_zeros(n + 3, n + 3)
    system[:n, :n], system[:n, n:], system[n:, :n] = _bending(points, points), rows, rows.t()
    weights = torch.linalg.solve(system, torch.cat([offsets, offsets.new_zeros(3, 2)]))
    flat = grid.reshape(-1, 2)
    moved = _bending(flat, points) @ weights[:n] + weights[n] + flat @ weights[n + 1 :]
    return grid + moved.view_as(grid)


def spline(offsets: Tensor, grid: Tensor) -> Tensor:
    """Return the regular `grid` (H, W, 2) moved by a uniform cubic B-spline field.

    Args:
        offsets: Offsets of the control points, shape (N, N, 2), rows downwards, N at least 4. No point moves by more
            than the largest offset; the field is twice continuously differentiable.
        grid: Coordinates from -1 to 1, equal in all rows and in all columns.
    """
    across, down = _basis(grid[0, :, 0], offsets.shape[1]), _basis(grid[:, 0, 1], offsets.shape[0])
    return grid + torch.einsum("hi,wj,ijc->hwc", down, across, offsets)


_SQUARE = torch.tensor([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]], dtype=torch.float64)


def _grid(size: int) -> Tensor:
    grid = flows.pixel_grid(size, size, dtype=torch.float64)[0].permute(1, 2, 0)
    return (2 * grid + 1) / size - 1  # (H, W, 2)


def _scene(canvas: Tensor, kind: str, generator: torch.Generator) -> Tensor:
    if kind == "training":
        for fill in ("flat", "tiles"):
            if uniform(generator, 0, 1) < 0.25:
                canvas = scenes.add_patches(canvas, generator, fill=fill, shape="box")
        return canvas
    if kind == "textureless":
        return scenes.add_patches(canvas, generator, fill="shaded", shape="blob", share=0.35)
    if kind == "repetitive":
        return scenes.add_patches(canvas, generator, fill="pattern", shape="blob", share=0.35)
    return canvas


def _mapping(kind: str, grid: Tensor, generator: torch.Generator) -> Tensor:
    if kind == "training":
        mapping = _one_of((_homography, _affine, _thin_plate), grid, generator)
        return _layers(mapping, grid, generator) if uniform(generator, 0, 1) < 0.25 else mapping
    if kind == "large":
        return _large(grid, generator)
    mapping = _one_of((_spline, _lens, _composed), grid, generator)
    return _patches(mapping, grid, generator) if kind == "layered" else mapping


def _one_of(families: tuple[Family, ...], grid: Tensor, generator: torch.Generator) -> Tensor:
    return families[int(uniform(generator, 0, len(families)))](grid, generator)


def _strength(generator: torch.Generator) -> float:
    """Return the random strength of a training warp: three in ten are small, since small motions are common."""
    small, share = uniform(generator, 0, 1, 2)
    return float(0.5 * share) if small < 0.3 else 1.0


def _homography(grid: Tensor, generator: torch.Generator) -> Tensor:
    offsets = uniform(generator, -0.5, 0.5, 4, 2) * _strength(generator)
    return homography(_SQUARE + offsets, grid)


def _affine(grid: Tensor, generator: torch.Generator) -> Tensor:
    strength = _strength(generator)
    return _similar(
        grid, generator, turn=30 * strength, zoom=0.35 * strength, shift=0.5 * strength, stretch=0.1
    )


def _thin_plate(grid: Tensor, generator: torch.Generator) -> Tensor:
    if uniform(generator, 0, 1) < 0.5:
        grid = _similar(grid, generator, turn=20, zoom=0.25, shift=0.25, stretch=0.1)
    offsets = uniform(generator, -0.3, 0.3, 9, 2) * _strength(generator)
    lattice = torch.cartesian_prod(*[torch.linspace(-1, 1, 3, dtype=torch.float64)] * 2)
    return thin_plate(lattice, offsets, grid)


def _layers(mapping: Tensor, grid: Tensor, generator: torch.Generator) -> Tensor:
    """Move one to three parts of `mapping`, selected by a smooth random field; half of the time sideways only."""
    if uniform(generator, 0, 1) < 0.5:
        mapping = _similar(grid, generator, turn=3, zoom=0.05, shift=0.1)
        mapping = torch.stack([mapping[..., 0], grid[..., 1]], -1)  # as in a stereo pair
        sideways = True
    else:
        sideways = False
    for _ in range(1 + int(uniform(generator, 0, 3))):
        cells = 3 + int(uniform(generator, 0, 3))
        field = torch.randn(1, 1, cells, cells, generator=generator, dtype=torch.float64)
        field = F.interpolate(field, grid.shape[:2], mode="bicubic", align_corners=False)[0, 0]
        moved = _similar(mapping, generator, turn=6, zoom=0.1, shift=0.35)
        if sideways:
            moved = torch.stack([moved[..., 0], mapping[..., 1]], -1)
        mapping = torch.where((field > uniform(generator, 0.1, 0.9))[..., None], moved, mapping)
    return mapping


def _spline(grid: Tensor, generator: torch.Generator) -> Tensor:
    points = 5 + int(uniform(generator, 0, 4))
    reach = float(uniform(generator, 0.15, 0.45)) * min(1.0, 6 / points)
    drift = uniform(generator, -0.2, 0.2, 1, 1, 2)
    return spline(uniform(generator, -reach, reach, points, points, 2) + drift, grid)


def _lens(grid: Tensor, generator: torch.Generator) -> Tensor:
    """Distort by the first two radial terms of the lens model, then rotate, zoom and shift."""
    centre, bends = uniform(generator, -0.2, 0.2, 2), uniform(generator, -0.18, 0.18, 2)
    radius = (grid - centre).square().sum(-1, keepdim=True)
    bent = centre + (grid - centre) * (1 + bends[0] * radius + 0.3 * bends[1] * radius.square())
    return _similar(bent, generator, turn=25, zoom=0.25, shift=0.3)


def _composed(grid: Tensor, generator: torch.Generator) -> Tensor:
    points = 5 + int(uniform(generator, 0, 4))
    waves = spline(uniform(generator, -0.12, 0.12, points, points, 2), grid)
    return homography(_SQUARE + uniform(generator, -0.45, 0.45, 4, 2), waves)


def _patches(mapping: Tensor, grid: Tensor, generator: torch.Generator) -> Tensor:
    """Add one to four star-shaped patches to `mapping` that show another part of the source."""
    for _ in range(1 + int(uniform(generator, 0, 4))):
        centre, radius = uniform(generator, -0.7, 0.7, 2), uniform(generator, 0.15, 0.5)
        away = grid - centre
        rays, phase = 3 + int(uniform(generator, 0, 6)), uniform(generator, 0, 2 * math.pi)
        edge = 0.75 + 0.25 * torch.cos(rays * torch.atan2(away[..., 1], away[..., 0]) + phase)
        moved = _similar(mapping, generator, turn=15, zoom=0.2, shift=0.4)
        mapping = torch.where((away.norm(dim=-1) < radius * edge)[..., None], moved, mapping)
    return mapping


def _large(grid: Tensor, generator: torch.Generator) -> Tensor:
    """Draw test mappings with a shift until a quarter of the flow is valid and that part is long enough."""
    while True:
        mapping = _one_of((_spline, _lens, _composed), grid, generator)
        angle, length = uniform(generator, 0, 2 * math.pi), uniform(generator, 0.4, 0.7)
        mapping = mapping + length * torch.stack([torch.cos(angle), torch.sin(angle)])
        valid = (mapping.abs() <= 1).all(-1)
        lengths = (mapping - grid).norm(dim=-1)[valid] / 2  # as fractions of the side
        if valid.double().mean() > 0.25 and lengths.mean() > 0.2:
            return mapping


def _similar(
    grid: Tensor,
    generator: torch.Generator,
    *,
    turn: float,
    zoom: float,
    shift: float,
    stretch: float = 0.0,
) -> Tensor:
    """Rotate by up to `turn` degrees, scale by 1 +- `zoom`, each axis by another 1 +- `stretch`, and shift."""
    draw = uniform(generator, -1.0, 1.0, 6)
    angle = draw[0] * math.radians(turn)
    matrix = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]).view(2, 2)
    matrix = matrix * (1 + zoom * draw[1]) * (1 + stretch * draw[2:4])
    return grid @ matrix.t() + shift * draw[4:]


def _bending(grid: Tensor, points: Tensor) -> Tensor:
    """Return r^2 log r for the distances r of all pairs of points, shape (P, N)."""
    squares = (grid[:, None] - points[None]).square().sum(-1)
    return 0.5 * torch.xlogy(squares, squares)


def _basis(grid: Tensor, points: int) -> Tensor:
    """Return the weight of each of `points` control points at coordinates (P,) in [-1, 1], shape (P, points)."""
    inner = (grid + 1) / 2 * (points - 3) + 1  # control points 1 to points - 2 span the frame
    d = (inner[:, None] - torch.arange(points)).abs()
    centre = 2 / 3 - d.square() * (1 - d / 2)
    return torch.where(d < 1, centre, (2 - d).clamp(min=0) ** 3 / 6)
