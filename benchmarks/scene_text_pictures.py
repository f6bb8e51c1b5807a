"""Whole pictures of `quality_scene_text`, edited by `scene_text.rewrite`: rotated regions, and the time of an edit.

Each picture is a held-out photograph. The region is a box around its centre, upright or turned by 15 degrees. The word
that is read lies on the line that the region is rectified to; the true word is drawn on that line and warped back the
same way.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scene_text_crops import Crop, Materials, boxes
from scene_text_methods import Settings
from scene_text_sets import Case, instruction
from torch import Tensor

from overpaint.scene_text import Guidance, Lettering, rewrite
from overpaint.scene_text.geometry import blend, line_box, read_region, rectify, restore
from overpaint.scene_text.line import Line

__all__ = ["Edited", "edit_seconds", "edited_lines", "outside_is_equal", "region_of", "true_lines"]

ANGLE = 15.0  # degrees
_HEIGHT = 44.0  # pixels of a region


@dataclass(frozen=True)
class Edited:
    """Lines that were read back from edited pictures, and whether all pixels outside of the regions are equal."""

    lines: np.ndarray  # RGB uint8 (N, H, W, 3)
    outside: list[bool]


def region_of(one: Crop, picture: Tensor, angle: float, line: Line) -> np.ndarray:
    """Return the corners of a region for the word of a case, in pixels, float64 (4, 2).

    Args:
        one: The picture of the case, whose region has the word's width.
        picture: RGB (3, H, W).
        angle: Degrees; positive turns the right end down.
        line: Sizes of the line.
    """
    left, _, right, _ = boxes([one])[0]
    height, width = picture.shape[-2:]
    turn = math.radians(angle)
    long = (right - left) / (line.bottom - line.top) * _HEIGHT
    room = (width - 8.0) / (math.cos(turn) + 0.2)
    scale = min(1.0, room / long)
    half = np.array([long, _HEIGHT]) * scale / 2
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * half
    rotation = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
    return corners @ rotation + np.array([width, height]) / 2


def edited_lines(
    model: Lettering, drawn: Sequence[Crop], materials: Materials, angle: float, settings: Settings
) -> Edited:
    """Return what `rewrite` writes into the regions of photographs; a region whose width it refuses stays as it was."""

    def edit(picture: Tensor, region: np.ndarray, one: Crop) -> Tensor:
        try:
            return rewrite(
                picture, region, one.case.text, instruction=instruction(one.case), model=model,
                steps=settings.steps, guidance=Guidance(settings.spelling, settings.style),
                seed=one.case.seed % 1000,
            )  # fmt: skip
        except ValueError as error:
            if "`region` is" not in str(error):
                raise
            return picture

    return _edited(edit, drawn, materials, angle, model.config.line)


def true_lines(drawn: Sequence[Crop], materials: Materials, angle: float) -> Edited:
    """Return the true words, warped into the regions of photographs and back."""
    line = materials.line

    def edit(picture: Tensor, region: np.ndarray, one: Crop) -> Tensor:
        area = read_region(region, (picture.shape[1], picture.shape[2]))
        box = line_box(line, area.size)
        left, _, right, _ = boxes([one])[0]
        width = round(box[1] - box[0])
        start = round((left + right) / 2 - width / 2)
        columns = np.clip(np.arange(line.width) + start - round(box[0]), 0, line.width - 1)
        truth = torch.from_numpy(one.truth[:, columns]).permute(2, 0, 1)[None].float() / 255
        back = restore(truth, area, line, box, (picture.shape[1], picture.shape[2]))
        return blend(picture, back, area.mask, 2.0)

    return _edited(edit, drawn, materials, angle, line)


def outside_is_equal(before: Tensor, after: Tensor, mask: Tensor) -> bool:
    """Return whether all pixels outside of a mask are equal, bit for bit."""
    return bool(torch.equal(before[:, ~mask], after[:, ~mask]))


def edit_seconds(
    model: Lettering, materials: Materials, case: Case, settings: Settings, *, repeats: int
) -> float:
    """Return the median time of one edit of a picture of 640x480 pixels by `rewrite`, after one that is not counted."""
    photo = next(iter(materials.photos.values()))
    picture = torch.tensor(photo).permute(2, 0, 1)[None].float() / 255
    picture = torch.nn.functional.interpolate(picture, (480, 640), mode="bilinear")[0]
    times = []
    for seed in range(repeats + 1):
        start = time.perf_counter()
        rewrite(
            picture, (220, 200, 200, 60), case.text, instruction=instruction(case), model=model,
            steps=settings.steps, guidance=Guidance(settings.spelling, settings.style), seed=seed,
        )  # fmt: skip
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def _edited(
    edit: Callable[[Tensor, np.ndarray, Crop], Tensor],
    drawn: Sequence[Crop],
    materials: Materials,
    angle: float,
    line: Line,
) -> Edited:
    lines, outside = [], []
    for one in drawn:
        photo = materials.photos[one.case.photo]
        picture = torch.tensor(photo).permute(2, 0, 1).float() / 255
        region = region_of(one, picture, angle, line)
        after = edit(picture, region, one)
        area = read_region(region, (picture.shape[1], picture.shape[2]))
        outside.append(outside_is_equal(picture, after, area.mask))
        seen = rectify(after, area, line, line_box(line, area.size))[0]
        lines.append((seen.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())
    return Edited(np.stack(lines), outside)
