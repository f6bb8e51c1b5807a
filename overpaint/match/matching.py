r"""Dense matching of two pictures: a flow with its uncertainty.

Source: Nam et al., 2024 (DiffMatch), https://arxiv.org/abs/2305.19094, sections 4.4 to 4.6.
Deviations: the uncertainty, which the paper shows in a figure only; repeating the coarse stage around the mean
(`reinit`), which is from the paper's first version; the refinement by optical flow (`refine`). The hypotheses are
refined too before they are compared; where the pictures are unambiguous, they converge to one point.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from overpaint import files
from overpaint.errors import check_seed
from overpaint.images.charts import LIGHT, Chart, Theme
from overpaint.images.read import load_picture
from overpaint.match import flow as flows
from overpaint.match import verdict as verdicts
from overpaint.match import views
from overpaint.match.conditioning import (
    Conditions,
    Features,
    coarse_conditions,
    extract_features,
    fine_conditions,
)
from overpaint.match.denoiser import Denoiser, sample
from overpaint.match.matcher import Matcher
from overpaint.match.optical_flow import refine as refine_flow
from overpaint.match.resampling import (
    RefinedFlow,
    Size,
    interpolate,
    reduce,
    size_of,
    std_in_pixels,
    to_pixels,
)
from overpaint.model.sampling import Progress

__all__ = ["Match", "dense"]

_REFINED_SIDE = 1024  # pixels: longer side of the pictures that the flow is refined on
_COMPARED_SIDE = 256  # pixels: longer side of the pictures that each hypothesis is refined on
_ROWS = 256  # rows of a picture that are warped at a time, so that large pictures fit into memory


@dataclass(frozen=True, eq=False)
class Match:
    """A dense match: for each pixel of `image_b` the corresponding point of `image_a`.

    Attributes:
        flow: On `image_b`'s grid, pointing into `image_a`, in pixels, (x, y), float32, shape (2, H, W): pixel p of b
            corresponds to the point p + flow(p) of a, each in its picture's pixels.
        std: Uncertainty in pixels of `image_a`, shape (H, W): root mean square distance of the coarse stage's
            hypotheses from the flow, each refined at 256 pixels of the longer side. Without refinement, the standard
            deviation of both stages' hypotheses. 0 for a single hypothesis. If a picture is of one color, at least the
            standard deviation of a uniform distribution over `image_a`.
        warped: `image_a` warped onto `image_b`'s grid, RGB in [0, 1], shape (3, H, W); black outside of `image_a`.
        inside: Where the flow points to a point within `image_a`, bool, shape (H, W).
        consistency: Forward-backward error: distance in pixels from each pixel to its image under both flows, (H, W);
            `None` unless `cycle` was set.
        protocol: Settings: sizes (height, width), samples, steps, seed and so on.
    """

    flow: Tensor
    std: Tensor
    warped: Tensor
    inside: Tensor
    consistency: Tensor | None = None
    protocol: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        height, width = self.std.shape
        spread = float(self.std.median())
        return f"<Match of {width}x{height} pixels: {self.verdict}, median uncertainty {spread:.2g} pixels>"

    @property
    def sure(self) -> float | None:
        """Share of the pixels of `image_b` whose `std` is at most 1 % of `image_a`'s longer side.

        If `std` is 0 everywhere, as for a single hypothesis, `consistency` takes its place; `None` without both.
        """
        has_spread = bool((self.std > 0).any())
        uncertainty = self.std if has_spread else self.consistency
        if uncertainty is None:
            return None
        return verdicts.sure_share(uncertainty, max(self.protocol.get("source", self.std.shape)))

    @property
    def verdict(self) -> str:
        """The verdict: "matched" if `sure` is at least 0.6, "partly matched" from 0.25 on, else "not matched".

        It is "unknown" if `sure` is `None`. `overpaint.match.verdict` states how the bounds were chosen.
        """
        return verdicts.verdict(self.sure)

    def wheel(self, *, theme: Theme = LIGHT) -> Chart:
        """Return the flow as colors, above a color wheel that explains them."""
        return views.wheel(self.flow.numpy(), self.inside.numpy(), theme=theme)

    def arrows(self, target: Any, *, theme: Theme = LIGHT) -> Chart:
        """Return the flow as arrows over the target, colored by the uncertainty.

        Args:
            target: The `image_b` of the match, anything that `dense` takes.
            theme: Colors.

        Raises:
            ValueError: The target cannot be read, or has another size than the flow.
        """
        pixels = self._pixels(target)
        arrays = (self.flow.numpy(), self.inside.numpy(), self.std.numpy())
        return views.arrows(*arrays, pixels, theme=theme)

    def confidence(self, target: Any, *, theme: Theme = LIGHT) -> Chart:
        """Return the uncertainty as colors: bright where it is small, dark where it is large; below it, the verdict.

        Args:
            target: The `image_b` of the match, anything that `dense` takes.
            theme: Colors.

        Raises:
            ValueError: The target cannot be read, or has another size than the flow.
        """
        summary = verdicts.describe(self.sure)
        return views.confidence(self.std.numpy(), self._pixels(target), summary, theme=theme)

    def save(self, folder: str | Path, target: Any, *, theme: Theme = LIGHT) -> dict[str, Path]:
        """Write `flow.flo`, `flow.npy`, `std.npy`, `warped.png` and the three views.

        Each file is written atomically.

        Args:
            folder: Created if it does not exist.
            target: The `image_b` of the match, anything that `dense` takes.
            theme: Colors of the views.

        Returns:
            The files by their names without suffix; those of the flow by `flo` and `npy`.

        Raises:
            ValueError: The target cannot be read, or has another size than the flow.
        """
        charts = {
            "wheel": self.wheel(theme=theme),
            "arrows": self.arrows(target, theme=theme),
            "confidence": self.confidence(target, theme=theme),
        }
        folder = files.user_path(folder, "folder")
        folder.mkdir(parents=True, exist_ok=True)
        paths = {"flo": folder / "flow.flo", "npy": folder / "flow.npy", "std": folder / "std.npy"}
        flows.write_flo(paths["flo"], self.flow)
        for name, values in (("npy", self.flow), ("std", self.std)):
            with files.atomic(paths[name]) as draft, draft.open("wb") as file:
                np.save(file, values.numpy())
        paths["warped"] = folder / "warped.png"
        with files.atomic(paths["warped"]) as draft:
            pixels = (self.warped.clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
            Image.fromarray(pixels.numpy()).save(draft, format="PNG")
        return paths | {name: chart.save(folder / f"{name}.png") for name, chart in charts.items()}

    def _pixels(self, target: Any) -> views.Floats:
        """Return the target, (H, W, 3)."""
        pixels = load_picture(target, "target")[0].permute(1, 2, 0).numpy()
        height, width = self.std.shape
        if pixels.shape[:2] != (height, width):
            raise ValueError(
                f"`target` is {pixels.shape[1]}x{pixels.shape[0]} pixels, the flow {width}x{height}: "
                "give the `image_b` that was matched."
            )
        return pixels


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
    on_progress: Progress | None = None,
) -> Match:
    """Return for each pixel of `image_b` the corresponding point of `image_a`.

    Args:
        image_a: The source: a path, a PIL image, an array (H, W, C) or a tensor (C, H, W); grey, RGB or RGBA, floats
            in [0, 1], bytes or 16-bit integers, up to 60 megapixels.
        image_b: The target; it may have another size.
        matcher: A matcher on any device, the folder of one, or the name of the shipped one.
        samples: Hypotheses, whose mean is the flow; from 2 on their spread is the uncertainty.
        steps: Denoising steps, at most the number of noise levels that the matcher was trained with.
        seed: Seed of the noise that the hypotheses start from.
        reinit: Number of times that the coarse stage is repeated around the mean of its hypotheses.
        refine: Refine the flow by optical flow on pictures of up to 1,024 pixels a side, and compare the hypotheses
            after refining them too.
        cycle: Match in both directions and return their consistency. Takes twice as long.
        on_progress: Called with (done, total, label) after each stage.

    Returns:
        The flow, its uncertainty, and the warped `image_a`. A picture of one color gives a flow too, with a large
        uncertainty.

    Raises:
        TypeError: A picture is of an unsupported type.
        ValueError: A picture cannot be read, is too small or too large, or an argument is out of range.
    """
    if reinit < 0:
        raise ValueError(f"`reinit` must be at least 0, got {reinit}.")
    seed = check_seed(seed)
    source, target = load_picture(image_a, "image_a"), load_picture(image_b, "image_b")
    size_a, size_b = size_of(source), size_of(target)
    is_uniform = _is_uniform(source) or _is_uniform(target)
    loaded = matcher if isinstance(matcher, Matcher) else Matcher.load(matcher)
    a, b = _features(loaded, source), _features(loaded, target)
    pictures = reduce(source, target, _REFINED_SIDE) if refine and not is_uniform else None
    del target  # frees the memory of a large picture
    directions = [(a, b), (b, a)] if cycle else [(a, b)]
    total = (1 + reinit + (loaded.fine is not None)) * len(directions)
    search = _Search(loaded, samples, steps, seed, reinit, _Stages(on_progress, total))
    forth, *back = [search.run(*direction) for direction in directions]
    align_corners = loaded.config.align_corners
    refined = RefinedFlow.compute(forth.flow, align_corners, *pictures) if pictures else None
    flow = _full_size(forth.flow, refined, size_a, size_b, align_corners)
    std = _std(forth, size_a, size_b, align_corners, refined)
    if is_uniform:
        std.clamp_(min=_uniform_std(size_a))
    consistency = None
    if back:
        other = (
            RefinedFlow.compute(back[0].flow, align_corners, *pictures[::-1]) if pictures else None
        )
        backward = _full_size(back[0].flow, other, size_b, size_a, align_corners)
        consistency = flows.consistency(flow, backward)[0, 0]
    warped, inside = _warp(source, flow)
    protocol = {
        "matcher": "given" if isinstance(matcher, Matcher) else str(matcher),
        "source": size_a, "target": size_b,
        "samples": samples, "steps": steps, "seed": seed, "reinit": reinit, "refine": refine,
    }  # fmt: skip
    return Match(flow[0], std, warped, inside, consistency, protocol)


@dataclass
class _Stages:
    """Counts stages and reports them."""

    on_progress: Progress | None
    total: int
    done: int = 0

    def __call__(self) -> None:
        self.done += 1
        if self.on_progress is not None:
            self.on_progress(self.done, self.total, "matching")


@dataclass(frozen=True, eq=False)
class _Hypotheses:
    """Relative flows of the networks.

    Attributes:
        flow: The mean of the last stage, (1, 2, g, g).
        coarse: The coarse stage's hypotheses, (n, 2, g, g); one if the matcher has no diffusion.
        variance: Variance of the flow, the sum of both stages', (1, 2, g, g).
    """

    flow: Tensor
    coarse: Tensor
    variance: Tensor


@dataclass(frozen=True, eq=False)
class _Search:
    """Samples hypotheses: coarse ones, then fine ones around their mean."""

    matcher: Matcher
    samples: int
    steps: int
    seed: int
    reinit: int
    on_stage: Callable[[], None]

    def run(self, source: Features, target: Features) -> _Hypotheses:
        """Return the hypotheses for the flow on the target's grid."""
        config, coarse = self.matcher.config, self.matcher.coarse
        generator = torch.Generator().manual_seed(self.seed)
        conditions = coarse_conditions(config, source, target)
        hypotheses, mean, variance = self._draw(coarse, conditions, generator)
        for _ in range(self.reinit):
            conditions = coarse_conditions(config, source, target, mean)
            hypotheses, mean, variance = self._draw(coarse, conditions, generator)
        if self.matcher.fine is None:
            return _Hypotheses(mean.cpu(), hypotheses.cpu(), variance.cpu())
        conditions = fine_conditions(config, source, target, mean)
        _, fine, fine_variance = self._draw(self.matcher.fine, conditions, generator)
        # The fine stage starts from the coarse mean, so its spread does not include that of the coarse hypotheses.
        total = fine_variance + interpolate(variance, size_of(fine))
        return _Hypotheses(fine.cpu(), hypotheses.cpu(), total.cpu())

    def _draw(
        self, denoiser: Denoiser, conditions: Conditions, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return one stage's hypotheses, (n, 2, g, g), their mean and variance, (1, 2, g, g)."""
        drawn = sample(
            denoiser, conditions, samples=self.samples, steps=self.steps, generator=generator
        )
        self.on_stage()
        # Without diffusion all samples are equal.
        hypotheses = drawn[:, 0] if self.matcher.config.diffusion else drawn[0]
        return hypotheses, drawn.mean(0), drawn.var(0, unbiased=self.samples > 1)


def _full_size(
    relative: Tensor, refined: RefinedFlow | None, source: Size, target: Size, align_corners: bool
) -> Tensor:
    """Return the refined flow, or else the relative one, on the target's grid in the source's pixels."""
    if refined is not None:
        return refined.resize(source, target)
    return to_pixels(relative, source, target, align_corners)


def _std(
    drawn: _Hypotheses, source: Size, target: Size, align_corners: bool, refined: RefinedFlow | None
) -> Tensor:
    """Return `Match.std`, on the target's grid, in the source's pixels."""
    if refined is None or len(drawn.coarse) == 1:
        return std_in_pixels(drawn.variance, source, target, align_corners)
    pictures = reduce(refined.source, refined.target, _COMPARED_SIDE)
    size_a, size_b = size_of(pictures[0]), size_of(pictures[1])
    flow, squares = refined.resize(size_a, size_b), []
    for hypothesis in drawn.coarse:
        start = to_pixels(hypothesis[None], size_a, size_b, align_corners)
        end = refine_flow(*pictures, start)
        if (
            end is start
        ):  # too small to refine; an unrefined hypothesis does not compare with a refined flow
            return std_in_pixels(drawn.variance, source, target, align_corners)
        squares.append((flow - end) ** 2)
    scale = flow.new_tensor([size_a[1], size_a[0]]).view(1, 2, 1, 1)
    return std_in_pixels(torch.stack(squares).mean(0) / scale**2, source, target, False)


def _features(matcher: Matcher, image: Tensor) -> Features:
    """Return the features of a picture, resized to the matcher's square with a low-pass filter."""
    side = matcher.config.image
    square = F.interpolate(
        image, (side, side), mode="bilinear", antialias=True, align_corners=False
    )
    device = next(matcher.coarse.parameters()).device
    return extract_features(matcher.backbone, matcher.config, square.clamp_(0, 1).to(device))


def _warp(image: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
    """Return the warped image, (3, H, W), and where the flow stays inside, (H, W); a few rows at a time."""
    h, w = flow.shape[2:]
    warped, inside = torch.empty(3, h, w), torch.empty(h, w, dtype=torch.bool)
    size = size_of(image)
    for top in range(0, h, _ROWS):
        part = flow[:, :, top : top + _ROWS].clone()
        part[:, 1] += top
        warped[:, top : top + _ROWS] = flows.warp(image, part)[0]
        inside[top : top + _ROWS] = flows.inside(part, size)[0, 0]
    return warped, inside


def _is_uniform(image: Tensor) -> bool:
    """Return whether a picture is of one color."""
    return bool((image.amax((2, 3)) - image.amin((2, 3))).amax() < 1 / 255)


def _uniform_std(size: Size) -> float:
    """Return the standard deviation of a uniform distribution over a picture, in pixels."""
    return ((size[0] ** 2 + size[1] ** 2) / 12) ** 0.5
