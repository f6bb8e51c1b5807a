r"""Match two pictures: where each place of one lies in the other, and how sure that is.

Source: Nam et al., 2024 (DiffMatch), https://arxiv.org/abs/2305.19094, sections 4.4 to 4.6.
Deviations: the uncertainty, which the paper shows in a figure only; starting again from the mean (`reinit`), of the
paper's first version; the refinement (`refine`), which the hypotheses go through too before they are compared: where
the pictures leave no doubt, it brings all of them to one place.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from overpaint.match import flow as fields
from overpaint.match.conditions import Conditions, Features, coarse_of, describe, fine_of
from overpaint.match.denoise import Denoiser, sample
from overpaint.match.matcher import Matcher
from overpaint.match.reading import picture
from overpaint.match.refine import refined

__all__ = ["Match", "dense"]

_WORK = 1024  # pixels of the longer side that a flow is refined at
_DOUBT = 256  # pixels of the longer side that each hypothesis is refined at, to see where it ends
_ROWS = 256  # of a picture at a time, so that large ones fit into memory


@dataclass(frozen=True, eq=False)
class Match:
    """Where each pixel of `image_b` lies in `image_a`.

    Attributes:
        flow: On `image_b`'s grid, pointing into `image_a`, in pixels, (x, y), float32, shape (2, H, W): pixel p of b
            shows what a shows at p + flow(p), each in its own picture's pixels.
        std: How far the hypotheses lie from the flow, each refined as it is: the root of the mean square, in pixels
            of `image_a`, shape (H, W); the larger, the less sure. 0 of a single hypothesis.
        warped: `image_a` as seen from `image_b`, RGB in [0, 1], shape (3, H, W); black where it ends.
        inside: Where the flow stays within `image_a`, bool, shape (H, W).
        consistency: By how many pixels there-and-back misses, shape (H, W); None unless asked for.
        protocol: What made it: sizes (height, width), samples, steps, seed and so on.
    """

    flow: Tensor
    std: Tensor
    warped: Tensor
    inside: Tensor
    consistency: Tensor | None = None
    protocol: dict[str, Any] = field(default_factory=dict)


def dense(
    image_a: Any,
    image_b: Any,
    *,
    matcher: str | Path | Matcher = "matcher",
    samples: int = 8,
    steps: int = 5,
    seed: int = 0,
    reinit: int = 0,
    refine: bool = True,
    cycle: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> Match:
    """Find where each pixel of `image_b` lies in `image_a`.

    Args:
        image_a: The source: a path, a PIL image, an array (H, W, C) or a tensor (C, H, W); grey, RGB or RGBA, floats
            in [0, 1], bytes or 16-bit integers, up to 60 megapixels.
        image_b: The target; its size may be another.
        matcher: A matcher, on whatever device, its folder, or the name of the one that ships.
        samples: Hypotheses whose mean is the flow; from 2 on their spread says how sure it is.
        steps: Of denoising, at most what the matcher was trained for.
        seed: Of the noise that the hypotheses start from.
        reinit: How often the coarse flow is sought again around the mean of its hypotheses.
        refine: Whether optical flow adds what the matcher's cells are too coarse for, on pictures of up to 1,024 pixels
            a side.
        cycle: Whether to match both ways, and tell by how much there-and-back misses. Takes twice as long.
        on_progress: Called after each stage with the stages done and the stages in all.

    Returns:
        The flow, its uncertainty, and `image_a` as seen from `image_b`. A picture of one color gives a flow too; its
        uncertainty is that of a place which may lie anywhere in `image_a`.

    Raises:
        TypeError: A picture is of no known kind.
        ValueError: A picture cannot be read, is too small or large, or an argument is out of range.
    """
    if reinit < 0:
        raise ValueError(f"`reinit` must be at least 0, got {reinit}.")
    source, target = picture(image_a, "image_a"), picture(image_b, "image_b")
    size_a, size_b = ((x.shape[2], x.shape[3]) for x in (source, target))
    flat = _is_flat(source) or _is_flat(target)
    found = matcher if isinstance(matcher, Matcher) else Matcher.load(matcher)
    device = next(found.coarse.parameters()).device
    a, b = (
        describe(found.backbone, found.config, _shrink(x, found.config.image).to(device))
        for x in (source, target)
    )
    small = _reduced(source, target, _WORK) if refine and not flat else None
    del target  # a large picture's bytes may be needed
    ways = [(a, b), (b, a)] if cycle else [(a, b)]
    step = _Steps(on_progress, (1 + reinit + (found.fine is not None)) * len(ways))
    fine = [_search(found, s, t, samples, steps, seed, reinit, step) for s, t in ways]
    corners = found.config.align_corners
    near = _near(fine[0].flow, corners, small)
    flow = near.at(size_a, size_b) if near else _full(fine[0].flow, size_a, size_b, corners)
    std = _std(fine[0], size_a, size_b, corners, near)
    if flat:
        std.clamp_(min=_anywhere(size_a))
    missed = None
    if cycle:
        other = _near(fine[1].flow, corners, (small[1], small[0]) if small else None)
        back = other.at(size_b, size_a) if other else _full(fine[1].flow, size_b, size_a, corners)
        missed = fields.consistency(flow, back)[0, 0]
    warped, inside = _seen(source, flow)
    protocol = {
        "matcher": "given" if isinstance(matcher, Matcher) else str(matcher),
        "source": size_a, "target": size_b,
        "samples": samples, "steps": steps, "seed": seed, "reinit": reinit, "refine": refine,
    }  # fmt: skip
    return Match(flow[0], std, warped, inside, missed, protocol)


@dataclass
class _Steps:
    """Counts stages and tells of them."""

    tell: Callable[[int, int], None] | None
    total: int
    done: int = 0

    def __call__(self) -> None:
        self.done += 1
        if self.tell is not None:
            self.tell(self.done, self.total)


@dataclass(frozen=True, eq=False)
class _Found:
    """What the networks say, over their sides.

    Attributes:
        flow: The answer, (1, 2, g, g).
        hypotheses: The coarse stage's, (n, 2, g, g).
        variance: Of the two numbers of the answer, both stages together, (1, 2, g, g).
    """

    flow: Tensor
    hypotheses: Tensor
    variance: Tensor


@dataclass(frozen=True, eq=False)
class _Near:
    """A refined flow, (1, 2, h, w), and the pictures it was refined by, in whose pixels it is."""

    source: Tensor
    target: Tensor
    flow: Tensor

    def at(self, source: tuple[int, int], target: tuple[int, int]) -> Tensor:
        """Return the flow between pictures of other sizes, (1, 2, H, W)."""
        if (_size(self.source), _size(self.target)) == (source, target):
            return self.flow
        return _full(_shares(self.flow, _size(self.source)), source, target, False)


def _search(
    matcher: Matcher,
    source: Features,
    target: Features,
    samples: int,
    steps: int,
    seed: int,
    reinit: int,
    step: Callable[[], None],
) -> _Found:
    """Draw hypotheses, coarse ones and then fine ones around their mean."""
    generator = torch.Generator().manual_seed(seed)

    def draw(denoiser: Denoiser, conditions: Conditions) -> tuple[Tensor, Tensor, Tensor]:
        flows = sample(denoiser, conditions, samples=samples, steps=steps, generator=generator)
        step()
        return flows[:, 0], flows.mean(0), flows.var(0, unbiased=samples > 1)

    flows, mean, variance = draw(matcher.coarse, coarse_of(matcher.config, source, target))
    for _ in range(reinit):
        conditions = coarse_of(matcher.config, source, target, mean)
        flows, mean, variance = draw(matcher.coarse, conditions)
    if matcher.fine is None:
        return _Found(mean.cpu(), flows.cpu(), variance.cpu())
    _, fine, more = draw(matcher.fine, fine_of(matcher.config, source, target, mean))
    # The fine stage starts from the coarse mean and knows nothing of the coarse hypotheses' doubt.
    total = more + _grow(variance, (fine.shape[2], fine.shape[3]))
    return _Found(fine.cpu(), flows.cpu(), total.cpu())


def _near(flow: Tensor, corners: bool, pictures: tuple[Tensor, Tensor] | None) -> _Near | None:
    """Refine a flow over its side by `pictures` (source, target); None without them, or if they are too small."""
    if pictures is None:
        return None
    given = _full(flow, _size(pictures[0]), _size(pictures[1]), corners)
    near = refined(*pictures, given)
    return None if near is given else _Near(*pictures, near)


def _std(
    found: _Found,
    source: tuple[int, int],
    target: tuple[int, int],
    corners: bool,
    near: _Near | None,
) -> Tensor:
    """Return how far the hypotheses lie from the answer, on the target's grid, in the source's pixels, (H, W)."""
    if near is None or len(found.hypotheses) == 1:
        return _deviation(found.variance, source, target, corners)
    pictures = _reduced(near.source, near.target, _DOUBT)
    first, second = _size(pictures[0]), _size(pictures[1])
    answer = near.at(first, second)
    each = (refined(*pictures, _full(h[None], first, second, corners)) for h in found.hypotheses)
    squares = torch.stack([(answer - x) ** 2 for x in each]).mean(0)
    shares = squares / squares.new_tensor([first[1], first[0]]).view(1, 2, 1, 1) ** 2
    return _deviation(shares, source, target, False)


def _shares(flow: Tensor, source: tuple[int, int]) -> Tensor:
    """Undo what `_full` does, on the grid that the flow is on."""
    h, w = flow.shape[2:]
    places = (2 * fields.to_mapping(flow) + 1) / flow.new_tensor([source[1], source[0]]).view(
        1, 2, 1, 1
    )
    own = (2 * fields.pixel_grid(h, w) + 1) / flow.new_tensor([w, h]).view(1, 2, 1, 1)
    return (places - own) / 2


def _full(flow: Tensor, source: tuple[int, int], target: tuple[int, int], corners: bool) -> Tensor:
    """Bring a flow over its side to the target's grid and the source's pixels, (1, 2, H, W)."""
    shares = _grow(flow, target, corners)
    for channel, axis in ((0, 1), (1, 0)):
        # Where the same share of the other picture lies: nowhere else if both are of one size.
        own = torch.arange(target[axis], dtype=torch.float64)
        shift = ((own + 0.5) * (source[axis] / target[axis]) - 0.5 - own).float()
        shares[:, channel].mul_(source[axis]).add_(shift.view(-1, 1) if axis == 0 else shift)
    return shares


def _deviation(
    variance: Tensor, source: tuple[int, int], target: tuple[int, int], corners: bool
) -> Tensor:
    """Bring the variance of a flow over its side to the target's grid: a deviation in pixels, (H, W)."""
    scale = variance.new_tensor([source[1], source[0]]).view(1, 2, 1, 1)
    total = (variance * scale**2).sum(1, keepdim=True)
    return _grow(total, target, corners)[0, 0].sqrt_()


def _grow(values: Tensor, size: tuple[int, int], corners: bool = False) -> Tensor:
    return F.interpolate(values, size, mode="bilinear", align_corners=corners)


def _size(image: Tensor) -> tuple[int, int]:
    return image.shape[2], image.shape[3]


def _reduced(source: Tensor, target: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Return the pictures, the longer side of each at most so many pixels."""
    result = []
    for image in (source, target):
        h, w = _size(image)
        factor = most / max(h, w)
        if factor < 1:
            size = (max(1, round(h * factor)), max(1, round(w * factor)))
            image = F.interpolate(
                image, size, mode="bilinear", antialias=True, align_corners=False
            ).clamp_(0, 1)
        result.append(image)
    return result[0], result[1]


def _shrink(image: Tensor, side: int) -> Tensor:
    """Resize to a square, averaging over what falls together."""
    return F.interpolate(
        image, (side, side), mode="bilinear", antialias=True, align_corners=False
    ).clamp_(0, 1)


def _seen(image: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
    """Warp a few rows at a time, and say where the flow stays inside: (3, H, W) and (H, W)."""
    h, w = flow.shape[2:]
    warped, inside = torch.empty(3, h, w), torch.empty(h, w, dtype=torch.bool)
    size = (image.shape[2], image.shape[3])
    for top in range(0, h, _ROWS):
        part = flow[:, :, top : top + _ROWS].clone()
        part[:, 1] += top
        warped[:, top : top + _ROWS] = fields.warp(image, part)[0]
        inside[top : top + _ROWS] = fields.inside(part, size)[0, 0]
    return warped, inside


def _is_flat(image: Tensor) -> bool:
    return bool((image.amax((2, 3)) - image.amin((2, 3))).amax() < 1 / 255)


def _anywhere(size: tuple[int, int]) -> float:
    """Return the standard deviation of a place that may lie anywhere in a picture, in pixels."""
    return ((size[0] ** 2 + size[1] ** 2) / 12) ** 0.5
