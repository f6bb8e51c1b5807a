"""The tasks as plans of the sampler: which pictures are inverted, where latents, keys and values come from, energies.

`merged` is the plan of the preset `overpaint` for every task that has a copy: the second picture shows the target as it
is to be, so that everything is taken from there in place. The others are the plans of the release.

Source: Mou et al., 2024 (DragonDiffusion), https://arxiv.org/abs/2307.02421; Mou et al., 2024 (DiffEditor),
https://arxiv.org/abs/2402.02583; their public code.
Deviations: `merged` is not in the papers; cells are paired by coordinates, so that objects are clipped at the border.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from overpaint.image_edit import energies
from overpaint.image_edit.bank import token_grid
from overpaint.image_edit.energies import Energy, Pairs, Weights
from overpaint.image_edit.geometry import Move, cells, moved_cells
from overpaint.image_edit.sampler import Plan

__all__ = ["Pair", "drag", "landmarks", "merged", "move", "paste", "appearance"]

_TOUCHED = (
    0.01  # least share of a cell that the target covers for the cell to be taken from the copy
)
_ONE_PICTURE, _TWO_PICTURES = (0.1, 1.0), (0.0, 0.7)  # windows of the bank in the release


@dataclass(frozen=True, eq=False)
class Pair:
    """Clean latents of one or two pictures with their captions.

    Attributes:
        latents: Shape (R, C, h, w).
        prompts: One for each picture.
        size: Height and width of the crop in pixels of the picture, in which masks and points are.
    """

    latents: Tensor
    prompts: tuple[str, ...]
    size: tuple[int, int]

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of the latents."""
        return self.latents.shape[-2], self.latents.shape[-1]

    @property
    def fine(self) -> tuple[int, int]:
        """Height and width of the grid of the features."""
        return 2 * self.grid[0], 2 * self.grid[1]

    def cells(self, mask: Tensor, grid: tuple[int, int], *, least: float = 0.5) -> Tensor:
        """Return the cells of a grid that a mask covers, on the latents' device; see `geometry.cells`."""
        return cells(mask, grid, least=least).to(self.latents.device)

    def in_cells(self, move: Move, grid: tuple[int, int]) -> Move:
        """Return a move in pixels in cells of a grid."""
        factor = (grid[1] / self.size[1], grid[0] / self.size[0])
        offset = (move.offset[0] * factor[0], move.offset[1] * factor[1])
        pivot = tuple((p + 0.5) * f - 0.5 for p, f in zip(move.pivot, factor, strict=True))
        return Move(offset, move.scale, (pivot[0], pivot[1]))


def merged(pair: Pair, target: Tensor, region: Tensor, weights: Weights) -> Plan:
    """Return the plan in which the second picture shows the target in place.

    Args:
        pair: The picture, its hole filled, and the copy.
        target: Pixels taken from the copy, bool (H, W).
        region: Pixels that may change, bool (H, W).
        weights: Weights of the energies.
    """
    grid, inside = pair.grid, pair.cells(target, pair.fine, least=_TOUCHED)

    def merge(values: Tensor, size: tuple[int, int]) -> Tensor:
        return torch.where(pair.cells(target, size, least=_TOUCHED), values[1:2], values[:1])

    def projection(_own: Tensor, stored: Tensor) -> Tensor:
        size = token_grid(stored.shape[1], grid)
        chosen = pair.cells(target, size, least=_TOUCHED).flatten()
        return torch.where(chosen[:, None], stored[1], stored[0]).expand(len(_own), -1, -1)

    def energy(current: Sequence[Tensor], stored: Sequence[Tensor]) -> Energy:
        return energies.aligned(current, [merge(s, pair.fine)[0] for s in stored], inside, weights)

    return Plan(
        pair.latents, pair.prompts, lambda noisy: merge(noisy, grid), projection, energy,
        pair.cells(target, grid), pair.cells(region, grid), _ONE_PICTURE, 40.0,
    )  # fmt: skip


def move(
    pair: Pair,
    source: Tensor,
    shift: Move,
    weights: Weights,
    *,
    reference: Tensor | None = None,
    moves_latents: bool = True,
) -> Plan:
    """Return the release's plan of moving and resizing.

    Args:
        pair: The picture.
        source: Pixels of the object, bool (H, W).
        shift: In pixels.
        weights: Weights of the energies.
        reference: Pixels that show what the hole is to look like; by default all outside of object and target.
        moves_latents: Move the object's initial latents, too.
    """
    grid, fine = pair.grid, pair.fine
    pairs, inside = _pairs(pair, source, shift, fine)
    object_ = pair.cells(source, fine)
    keep = ~(object_ | inside)
    shown = keep if reference is None else pair.cells(reference, fine)
    coarse_pairs, target = _pairs(pair, source, shift, grid)

    def energy(current: Sequence[Tensor], stored: Sequence[Tensor]) -> Energy:
        maps = [s[0] for s in stored]
        return energies.move(current, maps, pairs, object_ & ~inside, keep, shown, weights)

    return Plan(
        pair.latents, pair.prompts,
        lambda noisy: _with_cells(noisy[:1], noisy[0], coarse_pairs) if moves_latents else noisy[:1],
        _replaced, energy, target, pair.cells(source, grid) | target, _ONE_PICTURE, 40.0,
    )  # fmt: skip


def paste(
    pair: Pair, source: Tensor, shift: Move, weights: Weights, *, moves_latents: bool = True
) -> Plan:
    """Return the release's plan of pasting: `source` marks the object in the second picture."""
    grid, fine = pair.grid, pair.fine
    pairs, inside = _pairs(pair, source, shift, fine)
    coarse_pairs, target = _pairs(pair, source, shift, grid)

    def energy(current: Sequence[Tensor], stored: Sequence[Tensor]) -> Energy:
        base, shown = [s[0] for s in stored], [s[1] for s in stored]
        return energies.paste(current, base, shown, pairs, inside, weights)

    return Plan(
        pair.latents, pair.prompts,
        lambda noisy: _with_cells(noisy[:1], noisy[1], coarse_pairs) if moves_latents else noisy[:1],
        lambda own, stored: _split(own, stored, ~target, pair.cells(source, grid)), energy, target, target,
        _TWO_PICTURES, 60.0,
    )  # fmt: skip


def appearance(pair: Pair, target: Tensor, reference: Tensor, weights: Weights) -> Plan:
    """Return the release's plan of taking the look of the object `reference` in the second picture.

    If there is a third picture, denoising starts from its latents in the target.
    """
    grid, fine = pair.grid, pair.fine
    inside, shown_cells, coarse = (
        pair.cells(target, fine),
        pair.cells(reference, fine),
        pair.cells(target, grid),
    )

    def energy(current: Sequence[Tensor], stored: Sequence[Tensor]) -> Energy:
        base, shown = [s[0] for s in stored], [s[1] for s in stored]
        return energies.appearance(current, base, shown, inside, shown_cells, weights)

    return Plan(
        pair.latents, pair.prompts,
        lambda noisy: torch.where(coarse, noisy[2:], noisy[:1]) if len(noisy) == 3 else noisy[:1],
        lambda own, stored: _split(own, stored[:2], ~coarse, pair.cells(reference, grid)), energy, coarse, coarse,
        _TWO_PICTURES, 80.0,
    )  # fmt: skip


def drag(
    pair: Pair,
    starts: Tensor,
    ends: Tensor,
    region: Tensor,
    weights: Weights,
    *,
    moves_latents: bool = True,
) -> Plan:
    """Return the release's plan of dragging points (K, 2), (x, y) in pixels, within `region`, bool (H, W)."""
    fine, keep = pair.fine, ~pair.cells(region, pair.fine)
    pairs = _patches(pair, starts, ends, fine)
    coarse_pairs = _patches(pair, starts, ends, pair.grid)
    coarse = pair.cells(region, pair.grid)

    def energy(current: Sequence[Tensor], stored: Sequence[Tensor]) -> Energy:
        return energies.drag(current, [s[0] for s in stored], pairs, keep, weights)

    def start(noisy: Tensor) -> Tensor:
        for target, source in zip(coarse_pairs.target, coarse_pairs.source, strict=True):
            noisy = _with_cells(noisy[:1], noisy[0], Pairs(target, source))
        return noisy[:1]

    return Plan(
        pair.latents, pair.prompts, start if moves_latents else lambda noisy: noisy[:1], _appended, energy, coarse,
        coarse, _ONE_PICTURE, 80.0,
    )  # fmt: skip


def landmarks(pair: Pair, starts: Tensor, ends: Tensor, weights: Weights) -> Plan:
    """Return the release's plan of moving landmarks (K, 2), (x, y) in pixels; the whole picture may change."""
    everywhere = torch.ones(pair.grid, dtype=torch.bool, device=pair.latents.device)
    pairs = _patches(pair, starts, ends, pair.fine)

    def energy(current: Sequence[Tensor], stored: Sequence[Tensor]) -> Energy:
        return energies.landmarks(current, [s[0] for s in stored], pairs, weights)

    return Plan(
        pair.latents, pair.prompts, lambda noisy: noisy[:1], _appended, energy, everywhere, everywhere, _ONE_PICTURE,
        120.0,
    )  # fmt: skip


def _pairs(pair: Pair, source: Tensor, shift: Move, grid: tuple[int, int]) -> tuple[Pairs, Tensor]:
    """Return the cells of the target with those of the object, and the target, bool (h, w)."""
    target, origin = moved_cells(cells(source, grid), pair.in_cells(shift, grid))
    inside = torch.zeros(grid, dtype=torch.bool)
    inside.view(-1)[target] = True
    device = pair.latents.device
    return Pairs(target.to(device), origin.to(device)), inside.to(device)


def _patches(pair: Pair, starts: Tensor, ends: Tensor, grid: tuple[int, int]) -> Pairs:
    """Return the 3x3 cells around each end, and around each start, moved inside where they would leave the grid."""
    height, width = grid
    around = torch.tensor([[x, y] for y in (-1, 0, 1) for x in (-1, 0, 1)])
    flat = []
    for points in (ends, starts):
        factor = points.new_tensor([width / pair.size[1], height / pair.size[0]])
        centre = ((points + 0.5) * factor - 0.5).round().long()
        limit = torch.tensor([width - 2, height - 2])
        placed = centre.clamp(min=1).minimum(limit)[:, None] + around
        flat.append(placed[..., 1] * width + placed[..., 0])
    return Pairs(*(numbers.to(pair.latents.device) for numbers in flat))


def _with_cells(latents: Tensor, shown: Tensor, pairs: Pairs) -> Tensor:
    """Return a copy of latents (1, C, h, w) whose target cells are the source cells of `shown`, (C, h, w)."""
    result = latents.flatten(2).clone()
    result[0][:, pairs.target] = shown.flatten(1)[:, pairs.source]
    return result.view_as(latents)


def _replaced(own: Tensor, stored: Tensor) -> Tensor:
    return stored[:1].expand(len(own), -1, -1)


def _appended(own: Tensor, stored: Tensor) -> Tensor:
    return torch.cat([own, _replaced(own, stored)], 1)


def _split(own: Tensor, stored: Tensor, unchanged: Tensor, shown: Tensor) -> Tensor:
    """Return tokens of the first picture in the cells `unchanged`, then those of the second in the cells `shown`.

    Where no token of a kind is selected, all of them are used.
    """
    grid = token_grid(stored.shape[1], (unchanged.shape[0], unchanged.shape[1]))
    parts = []
    for row, mask in zip(stored, (unchanged, shown), strict=True):
        chosen = cells(mask, grid).flatten()
        parts.append(row[chosen] if chosen.any() else row)
    return torch.cat(parts)[None].expand(len(own), -1, -1)
