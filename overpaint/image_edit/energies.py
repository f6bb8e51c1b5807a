r"""Energies of an edit, from features of the UNet's up blocks.

Features of all levels are on one grid of twice the size of the latents. With the cosine c of two features, their
similarity is :math:`s = (c + 1) / 2`, and :math:`H(s) = 1 / (\alpha + \beta s)` with :math:`\alpha = 1, \beta = 4`
falls from 1 to 0.2 as s grows. `current` are features of the latents that change; `stored` those of the inversion,
without gradients.

Source: Mou et al., 2024 (DragonDiffusion), https://arxiv.org/abs/2307.02421, equations 3 to 9, and its public code.
Deviations: cosines are mapped to [0, 1] everywhere, since the release's raw cosine in moves has a pole at -0.25; empty
regions add no term.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "Energy",
    "Pairs",
    "Weights",
    "aligned",
    "appearance",
    "drag",
    "global_similarity",
    "inverse",
    "landmarks",
    "local_similarity",
    "move",
    "on_grid",
    "paste",
]


@dataclass(frozen=True)
class Weights:
    """Weights of the terms; the defaults are those of moving in the release."""

    edit: float = 4.0
    content: float = 6.0
    contrast: float = 0.2
    inpaint: float = 0.8


@dataclass(frozen=True, eq=False)
class Pairs:
    """Cells of the grid that are to be alike: flat numbers, int64 (P,), or (K, 9) for K points with 3x3 cells each."""

    target: Tensor
    source: Tensor


@dataclass(frozen=True, eq=False)
class Energy:
    """Energies of one step.

    Attributes:
        edit: Scalar whose gradient changes the target.
        content: Scalar whose gradient keeps the rest.
        terms: Each term's value.
    """

    edit: Tensor
    content: Tensor
    terms: dict[str, float] = field(default_factory=dict)


Features = Sequence[Tensor]
"""One (C, h, w) for each level, on the same grid."""


def on_grid(features: Sequence[Tensor], grid: tuple[int, int]) -> list[Tensor]:
    """Return feature maps (R, C, h, w) of each level as float32 on the grid, nearest cells repeated."""
    return [
        F.interpolate(f.float() if f.dtype != torch.float64 else f, grid, mode="nearest")
        for f in features
    ]


def local_similarity(current: Tensor, stored: Tensor, pairs: Pairs) -> Tensor:
    """Return the mean similarity of paired cells of maps (C, h, w); for (K, 9) pairs one value for each point, (K,)."""
    one, other = current.flatten(1)[:, pairs.target], stored.detach().flatten(1)[:, pairs.source]
    return 0.5 * F.cosine_similarity(one, other, dim=0).mean(-1) + 0.5


def global_similarity(current: Tensor, stored: Tensor, region: Tensor, other: Tensor) -> Tensor:
    """Return the similarity of the mean features of `region` in `current` and of `other` in `stored`."""
    one, two = current[:, region].mean(1), stored.detach()[:, other].mean(1)
    return 0.5 * F.cosine_similarity(one, two, dim=0) + 0.5


def inverse(similarity: Tensor) -> Tensor:
    """Return :math:`1 / (1 + 4 s)`."""
    return 1 / (1 + 4 * similarity)


def aligned(current: Features, stored: Features, target: Tensor, weights: Weights) -> Energy:
    """Return the energies for stored features that show the edited picture: both parts compare cells in place.

    Args:
        current: Features of the latents.
        stored: Features of the inverted pictures, merged.
        target: Cells of the target, bool (h, w); all others are kept.
        weights: Weights of the terms.
    """
    inside, outside = _in_place(target), _in_place(~target)
    edit = _sum(
        weights.edit * inverse(local_similarity(c, s, inside))
        for c, s in _levels(current, stored, inside)
    )
    keep = _sum(
        weights.content * inverse(local_similarity(c, s, outside))
        for c, s in _levels(current, stored, outside)
    )
    return _energy(current, {"edit": edit}, {"content": keep})


def move(
    current: Features,
    stored: Features,
    pairs: Pairs,
    hole: Tensor,
    keep: Tensor,
    reference: Tensor,
    weights: Weights,
) -> Energy:
    """Return the energies of moving and resizing an object.

    Args:
        current: Features of the latents.
        stored: Features of the picture.
        pairs: Cells of the target with those of the object.
        hole: Cells that the object leaves, bool (h, w).
        keep: Cells outside of object and target.
        reference: Cells that show what the hole is to look like.
        weights: Weights of the terms.
    """
    edit = _sum(
        0.5 * weights.edit * inverse(local_similarity(c, s, pairs))
        for c, s in _levels(current, stored, pairs)
    )
    outside, left = _in_place(keep), _in_place(hole)
    parts = {
        "content": _sum(
            0.5 * weights.content * inverse(local_similarity(c, s, outside))
            for c, s in _levels(current, stored, outside)
        ),
        "contrast": _sum(
            0.5 * weights.contrast * local_similarity(c, s, left)
            for c, s in _levels(current, stored, left)
        ),
    }
    if reference.any():
        parts["inpaint"] = _sum(
            weights.inpaint * inverse(global_similarity(c, s, hole, reference))
            for c, s in _levels(current, stored, left)
        )
    return _energy(current, {"edit": edit}, parts)


def drag(
    current: Features, stored: Features, pairs: Pairs, keep: Tensor, weights: Weights
) -> Energy:
    """Return the energies of dragging points, `pairs` (K, 9); those of the source's own cells repel.

    Args:
        current: Features of the latents.
        stored: Features of the picture.
        pairs: 3x3 cells around the end of each drag, with those around its start.
        keep: Cells that must not change, bool (h, w).
        weights: Weights of the terms; `inpaint` is that of the repulsion.
    """
    count = len(current)
    levels = list(zip(current, stored, strict=True))
    edit = _sum(
        weights.edit * inverse(local_similarity(c, s, pairs)).mean() / count for c, s in levels
    )
    left = [
        _left_behind(target, source)
        for target, source in zip(pairs.target, pairs.source, strict=True)
    ]
    repelled = [Pairs(cells, cells) for cells in left if len(cells)]
    repulsion = _sum(
        weights.inpaint * local_similarity(c, s, p) / (count * len(left))
        for c, s in levels
        for p in repelled
    )
    outside = _in_place(keep)
    content = _sum(
        weights.content * inverse(local_similarity(c, s, outside)) / count
        for c, s in _levels(current, stored, outside)
    )
    return _energy(current, {"edit": edit, "repulsion": repulsion}, {"content": content})


def landmarks(current: Features, stored: Features, pairs: Pairs, weights: Weights) -> Energy:
    """Return the energy of moving landmarks, `pairs` (K, 9); nothing is kept by an energy."""
    levels = list(zip(current, stored, strict=True))
    edit = _sum(
        weights.edit * inverse(local_similarity(c, s, pairs)).mean() / len(levels)
        for c, s in levels
    )
    return _energy(current, {"edit": edit}, {})


def appearance(
    current: Features,
    stored: Features,
    shown: Features,
    target: Tensor,
    reference: Tensor,
    weights: Weights,
) -> Energy:
    """Return the energies of giving the target the mean features of the reference's object.

    Args:
        current: Features of the latents.
        stored: Features of the picture.
        shown: Features of the reference picture.
        target: Cells of the object, bool (h, w).
        reference: Cells of the object in the reference picture.
        weights: Weights of the terms.
    """
    edit = _sum(
        weights.edit * inverse(global_similarity(c, s, target, reference))
        for c, s in zip(current, shown, strict=True)
    )
    return _energy(current, {"edit": edit}, {"content": _kept(current, stored, ~target, weights)})


def paste(
    current: Features,
    stored: Features,
    shown: Features,
    pairs: Pairs,
    target: Tensor,
    weights: Weights,
) -> Energy:
    """Return the energies of pasting an object of another picture.

    Args:
        current: Features of the latents.
        stored: Features of the picture that is pasted onto.
        shown: Features of the picture with the object.
        pairs: Cells of the target with those of the object.
        target: Cells of the target, bool (h, w).
        weights: Weights of the terms.
    """
    edit = _sum(
        weights.edit * inverse(local_similarity(c, s, pairs))
        for c, s in _levels(current, shown, pairs)
    )
    return _energy(current, {"edit": edit}, {"content": _kept(current, stored, ~target, weights)})


def _kept(current: Features, stored: Features, keep: Tensor, weights: Weights) -> Tensor | None:
    pairs = _in_place(keep)
    return _sum(
        weights.content * inverse(local_similarity(c, s, pairs))
        for c, s in _levels(current, stored, pairs)
    )


def _in_place(region: Tensor) -> Pairs:
    """Return each cell of a region, bool (h, w), paired with itself."""
    numbers = region.flatten().nonzero().flatten()
    return Pairs(numbers, numbers)


def _left_behind(target: Tensor, source: Tensor) -> Tensor:
    """Return the cells of `source` that are not in `target`."""
    return source[~torch.isin(source, target)]


def _levels(current: Features, stored: Features, pairs: Pairs) -> list[tuple[Tensor, Tensor]]:
    """Return the maps of each level; none if there are no pairs, so that an empty region adds no term."""
    return list(zip(current, stored, strict=True)) if len(pairs.target) else []


def _sum(values: Iterable[Tensor]) -> Tensor | None:
    total = None
    for value in values:
        total = value if total is None else total + value
    return total


def _energy(
    current: Features, edit: dict[str, Tensor | None], content: dict[str, Tensor | None]
) -> Energy:
    """Return the sums of the terms; a part without terms is 0, with a gradient of 0."""
    terms = {name: float(v.detach()) for name, v in (edit | content).items() if v is not None}
    zero = current[0].sum() * 0
    sums = [
        sum((v for v in part.values() if v is not None), start=zero) for part in (edit, content)
    ]
    return Energy(sums[0], sums[1], terms)
