r"""Warp one photograph into a pair of pictures with a known flow between them.

Coordinates are (x, y) from -1 to 1, float64: :math:`u = (2 x + 1) / W - 1`. Each family of warps draws a random mapping
:math:`m` from points of the target to points of the source. The target is the photograph sampled at :math:`m`, and the
flow is :math:`m(p) - p`. This ground truth is exact, because no mapping has to be inverted.

Training pairs use homographies, affine maps and thin-plate splines with equal probability. In a quarter of the pairs,
regions of the picture also move independently. Test pairs use other families: cubic B-spline fields, lens distortions,
and a spline before a homography. Patches in test pictures have other shapes and fills than in training.

Source: Bookstein, 1989 (thin-plate splines), https://doi.org/10.1109/34.24792; Nam et al., 2024 (DiffMatch),
https://arxiv.org/abs/2305.19094.
Deviations: DiffMatch uses the same three families and adds moving objects; here regions of one picture move instead.
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
        kind: `"training"`, or a kind of test pair: `"plain"`, `"textureless"`, `"repetitive"`, `"large"` (mean flow
            above a fifth of the side) or `"layered"` (patches that move independently).
        size: Height and width of both pictures.

    Returns:
        The pair; its flow is valid where it points to a position inside the source.

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
    margin = size // 2
    source = scene[..., margin:-margin, margin:-margin]
    points = (mapping / 2)[None].to(scene.dtype)  # the scene has twice the size and the same centre
    target = F.grid_sample(scene, points, padding_mode="reflection", align_corners=False)
    strength = 1.0 if kind == "training" else 0.5
    first, second = (scenes.camera(p, generator, strength) for p in (source, target))
    return Pair(first, second, flow.float(), flows.inside(flow))


def pairs(
    photos: list[Tensor], seeds: list[int], kind: str = "training", *, size: int = 256
) -> Pair:
    """Return a batch with one pair for each photo and seed; arguments and errors as in `pair`."""
    results = [pair(p, s, kind, size=size) for p, s in zip(photos, seeds, strict=True)]
    return Pair(*(torch.cat(parts) for parts in zip(*results, strict=True)))


def homography(corners: Tensor, grid: Tensor) -> Tensor:
    """Apply to `grid` (..., 2) the homography that maps (-1, -1), (1, -1), (1, 1), (-1, 1) to `corners`."""
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
    """Apply to `grid` (..., 2) the thin-plate spline that moves `points` (N, 2) by `offsets` (N, 2)."""
    n = len(points)
    rows = torch.cat([points.new_ones(n, 1), points], 1)
    system = points.new_zeros(n + 3, n + 3)
    system[:n, :n], system[:n, n:], system[n:, :n] = _kernel(points, points), rows, rows.t()
    weights = torch.linalg.solve(system, torch.cat([offsets, offsets.new_zeros(3, 2)]))
    flat = grid.reshape(-1, 2)
    moved = _kernel(flat, points) @ weights[:n] + weights[n] + flat @ weights[n + 1 :]
    return grid + moved.view_as(grid)


def spline(offsets: Tensor, grid: Tensor) -> Tensor:
    """Move the points of a regular `grid` (H, W, 2) by a uniform cubic B-spline field.

    Args:
        offsets: Offsets of the control points, shape (N, N, 2), top row first, N at least 4. No point moves by more
            than the largest offset; the field is twice continuously differentiable.
        grid: Coordinates from -1 to 1; all rows have the same x, all columns the same y.
    """
    column_weights, row_weights = (
        _basis(grid[0, :, 0], offsets.shape[1]),
        _basis(grid[:, 0, 1], offsets.shape[0]),
    )
    return grid + torch.einsum("hi,wj,ijc->hwc", row_weights, column_weights, offsets)


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
    mapping = _one_of((_spline, _lens, _spline_and_homography), grid, generator)
    return _patches(mapping, grid, generator) if kind == "layered" else mapping


def _one_of(families: tuple[Family, ...], grid: Tensor, generator: torch.Generator) -> Tensor:
    return families[int(uniform(generator, 0, len(families)))](grid, generator)


def _strength(generator: torch.Generator) -> float:
    """Return the random strength of a training warp: 1, or below 0.5 in three of ten cases."""
    small, share = uniform(generator, 0, 1, 2)
    return float(0.5 * share) if small < 0.3 else 1.0


def _homography(grid: Tensor, generator: torch.Generator) -> Tensor:
    offsets = uniform(generator, -0.5, 0.5, 4, 2) * _strength(generator)
    return homography(_SQUARE + offsets, grid)


def _affine(grid: Tensor, generator: torch.Generator) -> Tensor:
    strength = _strength(generator)
    return _random_similarity(
        grid, generator, turn=30 * strength, zoom=0.35 * strength, shift=0.5 * strength, stretch=0.1
    )


def _thin_plate(grid: Tensor, generator: torch.Generator) -> Tensor:
    if uniform(generator, 0, 1) < 0.5:
        grid = _random_similarity(grid, generator, turn=20, zoom=0.25, shift=0.25, stretch=0.1)
    offsets = uniform(generator, -0.3, 0.3, 9, 2) * _strength(generator)
    lattice = torch.cartesian_prod(*[torch.linspace(-1, 1, 3, dtype=torch.float64)] * 2)
    return thin_plate(lattice, offsets, grid)


def _layers(mapping: Tensor, grid: Tensor, generator: torch.Generator) -> Tensor:
    """Move one to three random regions of `mapping`; in half of the cases only sideways, as in a stereo pair."""
    if uniform(generator, 0, 1) < 0.5:
        mapping = _random_similarity(grid, generator, turn=3, zoom=0.05, shift=0.1)
        mapping = torch.stack([mapping[..., 0], grid[..., 1]], -1)
        sideways = True
    else:
        sideways = False
    for _ in range(1 + int(uniform(generator, 0, 3))):
        cells = 3 + int(uniform(generator, 0, 3))
        field = torch.randn(1, 1, cells, cells, generator=generator, dtype=torch.float64)
        field = F.interpolate(field, grid.shape[:2], mode="bicubic", align_corners=False)[0, 0]
        moved = _random_similarity(mapping, generator, turn=6, zoom=0.1, shift=0.35)
        if sideways:
            moved = torch.stack([moved[..., 0], mapping[..., 1]], -1)
        mapping = torch.where((field > uniform(generator, 0.1, 0.9))[..., None], moved, mapping)
    return mapping


def _spline(grid: Tensor, generator: torch.Generator) -> Tensor:
    points = 5 + int(uniform(generator, 0, 4))
    limit = float(uniform(generator, 0.15, 0.45)) * min(1.0, 6 / points)
    shift = uniform(generator, -0.2, 0.2, 1, 1, 2)
    return spline(uniform(generator, -limit, limit, points, points, 2) + shift, grid)


def _lens(grid: Tensor, generator: torch.Generator) -> Tensor:
    """Distort by two terms of the radial lens model, then rotate, zoom and shift."""
    centre, terms = uniform(generator, -0.2, 0.2, 2), uniform(generator, -0.18, 0.18, 2)
    radius = (grid - centre).square().sum(-1, keepdim=True)
    distorted = centre + (grid - centre) * (
        1 + terms[0] * radius + 0.3 * terms[1] * radius.square()
    )
    return _random_similarity(distorted, generator, turn=25, zoom=0.25, shift=0.3)


def _spline_and_homography(grid: Tensor, generator: torch.Generator) -> Tensor:
    points = 5 + int(uniform(generator, 0, 4))
    splined = spline(uniform(generator, -0.12, 0.12, points, points, 2), grid)
    return homography(_SQUARE + uniform(generator, -0.45, 0.45, 4, 2), splined)


def _patches(mapping: Tensor, grid: Tensor, generator: torch.Generator) -> Tensor:
    """Add to `mapping` one to four star-shaped patches, each of which shows another part of the source."""
    for _ in range(1 + int(uniform(generator, 0, 4))):
        centre, radius = uniform(generator, -0.7, 0.7, 2), uniform(generator, 0.15, 0.5)
        offset = grid - centre
        rays, phase = 3 + int(uniform(generator, 0, 6)), uniform(generator, 0, 2 * math.pi)
        edge = 0.75 + 0.25 * torch.cos(rays * torch.atan2(offset[..., 1], offset[..., 0]) + phase)
        moved = _random_similarity(mapping, generator, turn=15, zoom=0.2, shift=0.4)
        mapping = torch.where((offset.norm(dim=-1) < radius * edge)[..., None], moved, mapping)
    return mapping


def _large(grid: Tensor, generator: torch.Generator) -> Tensor:
    """Return a shifted test mapping of which over a quarter is valid, with a mean flow above a fifth of the side there.

    Mappings are drawn until one fulfils both conditions.
    """
    while True:
        mapping = _one_of((_spline, _lens, _spline_and_homography), grid, generator)
        angle, length = uniform(generator, 0, 2 * math.pi), uniform(generator, 0.4, 0.7)
        mapping = mapping + length * torch.stack([torch.cos(angle), torch.sin(angle)])
        valid = (mapping.abs() <= 1).all(-1)
        lengths = (mapping - grid).norm(dim=-1)[valid] / 2  # as fractions of the side
        if valid.double().mean() > 0.25 and lengths.mean() > 0.2:
            return mapping


def _random_similarity(
    grid: Tensor,
    generator: torch.Generator,
    *,
    turn: float,
    zoom: float,
    shift: float,
    stretch: float = 0.0,
) -> Tensor:
    """Rotate, scale and shift `grid` at random.

    Args:
        grid: Points, shape (..., 2).
        generator: Draws all random numbers.
        turn: Largest rotation, in degrees.
        zoom: Largest relative change of the scale.
        shift: Largest shift along each axis.
        stretch: Largest relative change of the scale of a single axis, in addition to `zoom`.
    """
    draw = uniform(generator, -1.0, 1.0, 6)
    angle = draw[0] * math.radians(turn)
    matrix = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]).view(2, 2)
    matrix = matrix * (1 + zoom * draw[1]) * (1 + stretch * draw[2:4])
    return grid @ matrix.t() + shift * draw[4:]


def _kernel(grid: Tensor, points: Tensor) -> Tensor:
    """Return the thin-plate kernel r^2 log r for the distance r of each pair of points, shape (P, N)."""
    squares = (grid[:, None] - points[None]).square().sum(-1)
    return 0.5 * torch.xlogy(squares, squares)


def _basis(grid: Tensor, count: int) -> Tensor:
    """Return the weights of `count` control points at coordinates (P,) in [-1, 1], shape (P, count)."""
    inner = (grid + 1) / 2 * (
        count - 3
    ) + 1  # -1 is at control point 1, and 1 at control point count - 2
    d = (inner[:, None] - torch.arange(count)).abs()
    centre = 2 / 3 - d.square() * (1 - d / 2)
    return torch.where(d < 1, centre, (2 - d).clamp(min=0) ** 3 / 6)
