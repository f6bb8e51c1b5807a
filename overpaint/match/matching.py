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

from overpaint.images.read import load_picture
from overpaint.match import flow as fields
from overpaint.match.conditioning import (
    Conditions,
    Features,
    coarse_of,
    describe,
    fine_of,
)
from overpaint.match.config import Matcher
from overpaint.match.denoiser import Denoiser, sample
from overpaint.match.optical_flow import refined
from overpaint.match.resampling import (
    Refined,
    Size,
    deviation,
    enlarged,
    grown,
    reduced,
    size_of,
)

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
        std: How far the hypotheses lie from the flow, in pixels of `image_a`, shape (H, W); the larger, the less sure.
            The root of the mean square, of the coarse stage's hypotheses, refined at 256 pixels of the longer side.
            Where nothing is refined, the standard deviation of both stages' hypotheses. 0 of a single hypothesis. Where
            a picture is of one color, at least that of a place that may lie anywhere in `image_a`.
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
            a side, and what each hypothesis comes to by it is compared.
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
    source, target = load_picture(image_a, "image_a"), load_picture(image_b, "image_b")
    size_a, size_b = size_of(source), size_of(target)
    flat = _is_flat(source) or _is_flat(target)
    found = matcher if isinstance(matcher, Matcher) else Matcher.load(matcher)
    device = next(found.coarse.parameters()).device
    a, b = (
        describe(found.backbone, found.config, _shrink(x, found.config.image).to(device))
        for x in (source, target)
    )
    small = reduced(source, target, _WORK) if refine and not flat else None
    del target  # a large picture's bytes may be needed
    ways = [(a, b), (b, a)] if cycle else [(a, b)]
    step = _Steps(on_progress, (1 + reinit + (found.fine is not None)) * len(ways))
    drawn = [_search(found, s, t, samples, steps, seed, reinit, step) for s, t in ways]
    corners = found.config.align_corners
    near = Refined.of(drawn[0].flow, corners, *small) if small else None
    flow = near.at(size_a, size_b) if near else enlarged(drawn[0].flow, size_a, size_b, corners)
    std = _std(drawn[0], size_a, size_b, corners, near)
    if flat:
        std.clamp_(min=_anywhere(size_a))
    missed = None
    if cycle:
        other = Refined.of(drawn[1].flow, corners, small[1], small[0]) if small else None
        back = (
            other.at(size_b, size_a) if other else enlarged(drawn[1].flow, size_b, size_a, corners)
        )
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
class _Drawn:
    """What the networks say, over their sides.

    Attributes:
        flow: The answer, (1, 2, g, g).
        hypotheses: The coarse stage's, (n, 2, g, g); one if nothing is drawn.
        variance: Of the two numbers of the answer, both stages together, (1, 2, g, g).
    """

    flow: Tensor
    hypotheses: Tensor
    variance: Tensor


def _search(
    matcher: Matcher,
    source: Features,
    target: Features,
    samples: int,
    steps: int,
    seed: int,
    reinit: int,
    step: Callable[[], None],
) -> _Drawn:
    """Draw hypotheses, coarse ones and then fine ones around their mean."""
    generator = torch.Generator().manual_seed(seed)

    def draw(denoiser: Denoiser, conditions: Conditions) -> tuple[Tensor, Tensor, Tensor]:
        flows = sample(denoiser, conditions, samples=samples, steps=steps, generator=generator)
        step()
        apart = flows[:, 0] if matcher.config.diffusion else flows[0]  # without, copies of one
        return apart, flows.mean(0), flows.var(0, unbiased=samples > 1)

    flows, mean, variance = draw(matcher.coarse, coarse_of(matcher.config, source, target))
    for _ in range(reinit):
        conditions = coarse_of(matcher.config, source, target, mean)
        flows, mean, variance = draw(matcher.coarse, conditions)
    if matcher.fine is None:
        return _Drawn(mean.cpu(), flows.cpu(), variance.cpu())
    _, fine, more = draw(matcher.fine, fine_of(matcher.config, source, target, mean))
    # The fine stage starts from the coarse mean and knows nothing of the coarse hypotheses' doubt.
    total = more + grown(variance, size_of(fine))
    return _Drawn(fine.cpu(), flows.cpu(), total.cpu())


def _std(drawn: _Drawn, source: Size, target: Size, corners: bool, near: Refined | None) -> Tensor:
    """Return `Match.std`, on the target's grid, in the source's pixels."""
    if near is None or len(drawn.hypotheses) == 1:
        return deviation(drawn.variance, source, target, corners)
    pictures = reduced(near.source, near.target, _DOUBT)
    first, second = size_of(pictures[0]), size_of(pictures[1])
    answer, squares = near.at(first, second), []
    for hypothesis in drawn.hypotheses:
        given = enlarged(hypothesis[None], first, second, corners)
        end = refined(*pictures, given)
        if (
            end is given
        ):  # too thin at this size: only what was refined can be compared with the answer
            return deviation(drawn.variance, source, target, corners)
        squares.append((answer - end) ** 2)
    scale = answer.new_tensor([first[1], first[0]]).view(1, 2, 1, 1)
    return deviation(torch.stack(squares).mean(0) / scale**2, source, target, False)


def _shrink(image: Tensor, side: int) -> Tensor:
    """Resize to a square, averaging over what falls together."""
    return F.interpolate(
        image, (side, side), mode="bilinear", antialias=True, align_corners=False
    ).clamp_(0, 1)


def _seen(image: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
    """Warp a few rows at a time, and say where the flow stays inside: (3, H, W) and (H, W)."""
    h, w = flow.shape[2:]
    warped, inside = torch.empty(3, h, w), torch.empty(h, w, dtype=torch.bool)
    size = size_of(image)
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
