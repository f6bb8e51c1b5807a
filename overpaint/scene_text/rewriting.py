"""Rewrite the text in a region of a picture: rectify it, write on the fixed line, warp back, blend inside the region.

Source: Ji et al., 2023 (DiffSTE), https://arxiv.org/abs/2304.05568.
Deviations: DiffSTE edits a square crop and returns it whole; here pixels outside of the region do not change. DiffSTE
writes into a region of any width; here the parts of a wide region that are far from the word are filled, see
`planning`. Several samples are ranked by a text reader.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from overpaint.errors import MissingExtra, check_seed, later_seed
from overpaint.images.read import load_picture
from overpaint.scene_text.diffusion import Guidance
from overpaint.scene_text.filling import fill
from overpaint.scene_text.geometry import Region, blend, rectify, restore
from overpaint.scene_text.lettering import Lettering
from overpaint.scene_text.network import Place
from overpaint.scene_text.planning import Plan, make_plan
from overpaint.scorers.text_reader import TextReader, similarity

__all__ = ["MAX_SAMPLES", "Rewriting", "rewrite", "rewrite_samples"]

MAX_SAMPLES = 64
_FEATHER = 2.0  # pixels inside of the region over which old and new picture mix
_BORDER = 8  # pixels around the part of a picture that is worked on


@dataclass(frozen=True, eq=False)
class Rewriting:
    """Several samples of a rewritten region.

    Attributes:
        image: The original picture, RGB in [0, 1], (3, H, W).
        plan: Where the word stands.
        corner: Row and column of the upper left pixel of `crops` in the picture.
        crops: The part of the picture around the region, one for each sample, (N, 3, h, w).
        seeds: Seed of each sample.
        readings: Text that is read in each sample; empty if they are not ranked.
        reader: Name and version of the text reader; empty if the samples are not ranked.
        chosen: Index of the sample whose reading is nearest to the text; 0 if they are not ranked.
    """

    image: Tensor
    plan: Plan
    corner: tuple[int, int]
    crops: Tensor
    seeds: tuple[int, ...]
    readings: tuple[str, ...]
    reader: str
    chosen: int

    @property
    def picture(self) -> Tensor:
        """The picture with the chosen sample, shape and dtype of `image`."""
        return self.sample(self.chosen)

    def sample(self, index: int) -> Tensor:
        """Return the picture with sample `index`, shape and dtype of `image`; pixels outside of the region are equal.

        Args:
            index: 0 to the number of samples - 1.
        """
        row, column = self.corner
        height, width = self.crops.shape[-2:]
        picture = self.image.clone()
        picture[:, row : row + height, column : column + width] = self.crops[index].to(picture)
        return picture

    def __repr__(self) -> str:
        """Return one short line."""
        ranked = f"read as {self.readings[self.chosen]!r}" if self.readings else "not ranked"
        return f"Rewriting({self.plan.text!r}, {len(self.seeds)} samples, seed {self.seeds[self.chosen]} {ranked})"


def rewrite(
    image: Any,
    region: Any,
    text: str,
    *,
    font: str | None = None,
    color: str | None = None,
    instruction: str | None = None,
    model: Lettering | str = "lettering",
    steps: int = 20,
    guidance: Guidance | None = None,
    seed: int = 0,
    samples: int = 1,
    on_progress: Callable[[int, int, str], None] | None = None,
) -> Tensor:
    """Return the picture with `text` written in the region; all pixels outside of it are unchanged, bit for bit.

    Without font, color and instruction the style of the letters beside the region is taken. The word stands in the
    middle of the region, with letters at most 1.25 times as wide as the font draws them. Of a region that is wider, the
    parts far from the word are filled with background and get no letters.

    Args:
        image: A path, PIL image, array or tensor, as for `load_picture`.
        region: Box (x, y, width, height) in pixels, points (x, y) of a polygon, bool mask (H, W), or a `Region`.
        text: One word or short line of printable ASCII.
        font: Name of a font that the model knows, such as `Courgette` or `Lato-Bold`, or two as `A and B`.
        color: Name of a color that the model knows, such as `red`.
        instruction: Instruction in free words, instead of `font` and `color`.
        model: A model, the name of one in the zoo, or its folder.
        steps: Denoising steps, 1 to 1000.
        guidance: Scales of guidance; by default none.
        seed: Seed of the first sample's noise; the next sample has the next seed.
        samples: Number of samples, 1 to 64. The one whose reading by PP-OCR is nearest to the text is returned, or the
            first one if the extra `ocr` is not installed.
        on_progress: Called after each step with (done, total, label).

    Returns:
        The picture, RGB in [0, 1], (3, H, W), in the dtype of a floating-point tensor `image`, else float32.

    Raises:
        ValueError: Picture, region, text, style or a number cannot be used. Nothing is sampled then.
        TypeError: Picture or text has another type.

    Source: Ji et al., 2023 (DiffSTE), https://arxiv.org/abs/2304.05568.
    """
    return rewrite_samples(
        image, region, text, font=font, color=color, instruction=instruction, model=model, steps=steps,
        guidance=guidance, seed=seed, samples=samples, on_progress=on_progress,
    ).picture  # fmt: skip


def rewrite_samples(
    image: Any,
    region: Any,
    text: str,
    *,
    font: str | None = None,
    color: str | None = None,
    instruction: str | None = None,
    model: Lettering | str = "lettering",
    steps: int = 20,
    guidance: Guidance | None = None,
    seed: int = 0,
    samples: int = 4,
    on_progress: Callable[[int, int, str], None] | None = None,
) -> Rewriting:
    """Return several samples of a rewritten region, and which of them reads best.

    Arguments and errors are those of `rewrite`. A single sample is not read.

    Source: Ji et al., 2023 (DiffSTE), https://arxiv.org/abs/2304.05568.
    """
    picture = _picture(image)
    _check_numbers(steps, seed, samples)
    loaded = model if isinstance(model, Lettering) else Lettering.load(model)
    plan = make_plan(
        (picture.shape[1], picture.shape[2]), region, text, loaded, font=font, color=color, instruction=instruction
    )  # fmt: skip
    line = loaded.config.line
    rows, columns = _part(plan, loaded, (picture.shape[1], picture.shape[2]))
    part = picture[:, rows, columns].detach().cpu().float()
    area, window = (_moved(one, rows, columns) for one in (plan.area, plan.window))
    ground = blend(part, fill(part, area.mask), area.mask, _FEATHER) if plan.is_divided else part
    rectified = rectify(ground, window, line, plan.box)
    selected = _line_mask(window, loaded, plan)
    place = Place(
        *(torch.tensor([float(v)]) for v in (plan.start, plan.end, line.capital, line.baseline))
    )
    seeds = tuple(later_seed(seed, i) for i in range(samples))
    reader = _reader() if samples > 1 else None
    written = []
    for index, one in enumerate(seeds):
        on_step = None
        if on_progress is not None:
            on_step = _counted(on_progress, index * steps, samples * steps)
        written.append(
            loaded.write(
                rectified, selected, [text], [plan.instruction], place, steps=steps, guidance=guidance, seed=one,
                on_step=on_step,
            )
        )  # fmt: skip
    lines = torch.cat(written)
    size = (part.shape[1], part.shape[2])
    crops = [
        blend(ground, restore(one[None], window, line, plan.box, size), window.mask, _FEATHER)
        for one in lines
    ]
    left, right = max(0, int(plan.box[0])), int(plan.box[1]) + 1
    boxes = [(left, 0, right, line.height)] * samples
    readings = () if reader is None else tuple(reader.read_boxes(lines, boxes))
    # a picture that holds finer numbers than float32 keeps its own outside of the region
    exact = picture[:, rows, columns].detach().cpu()
    stacked = torch.stack([torch.where(area.mask, c.to(exact.dtype), exact) for c in crops])
    return Rewriting(
        picture, plan, (rows.start, columns.start), stacked, seeds, readings, reader.name if reader else "",
        _best(readings, text),
    )  # fmt: skip


def _picture(image: Any) -> Tensor:
    """Return the picture, RGB (3, H, W), in the dtype and on the device of a floating-point tensor."""
    loaded = load_picture(image, "image")[0]
    is_kept = (
        isinstance(image, Tensor) and image.is_floating_point() and image.shape == loaded.shape
    )
    return image if is_kept else loaded


def _check_numbers(steps: int, seed: int, samples: int) -> None:
    check_seed(seed)
    for name, value, most in (("steps", steps, 1000), ("samples", samples, MAX_SAMPLES)):
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise ValueError(f"`{name}` must be 1 to {most}, got {value!r}.")


def _counted(
    on_progress: Callable[[int, int, str], None], before: int, total: int
) -> Callable[[int], None]:
    return lambda done: on_progress(before + done, total, "writing")


def _part(plan: Plan, model: Lettering, size: tuple[int, int]) -> tuple[slice, slice]:
    """Return rows and columns of the picture that the line shows, and of the region."""
    line = model.config.line
    (left, right), (height, width) = plan.box, size
    across = np.array([(0 - left) / (right - left), (line.width - left) / (right - left)])
    down = np.array([-line.top, line.height - line.top]) / (line.bottom - line.top)
    first, second, _, fourth = plan.window.corners
    # Corners of the line, without perspective: a little of its border may be repeated instead of seen.
    points = np.array(
        [first + x * (second - first) + y * (fourth - first) for x in across for y in down]
    )
    ys, xs = np.nonzero(plan.area.mask.numpy())
    top, bottom = min(points[:, 1].min(), ys.min()), max(points[:, 1].max(), ys.max() + 1)
    start, end = min(points[:, 0].min(), xs.min()), max(points[:, 0].max(), xs.max() + 1)
    rows = slice(max(0, int(top) - _BORDER), min(height, int(bottom) + 1 + _BORDER))
    return rows, slice(max(0, int(start) - _BORDER), min(width, int(end) + 1 + _BORDER))


def _moved(region: Region, rows: slice, columns: slice) -> Region:
    """Return a region in the pixels of a part of the picture."""
    corner = np.array([columns.start, rows.start], np.float64)
    return Region(region.mask[rows, columns], region.corners - corner)


def _line_mask(window: Region, model: Lettering, plan: Plan) -> Tensor:
    """Return the part of the line that is written, bool (1, H, W)."""
    line = model.config.line
    mask = rectify(window.mask[None].float().expand(3, -1, -1), window, line, plan.box)[:, 0] > 0.5
    rows, columns = torch.arange(line.height) + 0.5, torch.arange(line.width) + 0.5
    inside = ((rows > line.top) & (rows < line.bottom))[:, None] & (
        (columns > plan.box[0]) & (columns < plan.box[1])
    )
    return mask & inside


def _reader() -> TextReader | None:
    """Return the text reader; `None` without the extra `ocr`."""
    try:
        similarity("", "")
        return TextReader()
    except MissingExtra:
        return None


def _best(readings: tuple[str, ...], text: str) -> int:
    """Return the index of the reading that is nearest to the text, then nearest without case, then the first."""
    wanted = text.replace(" ", "")

    def score(index: int) -> tuple[float, float, int]:
        reading = readings[index]
        folded = similarity(reading.lower(), wanted.lower())
        return similarity(reading, wanted), folded, -index

    return max(range(len(readings)), key=score, default=0)
