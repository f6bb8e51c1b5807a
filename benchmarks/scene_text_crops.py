"""The picture of a case of `quality_scene_text`: the line with the true word, without it, and the region to write in.

The generator of the training data draws it, with one font and one photograph. Where a word is written anew, the region
is the box of its pixels, and the model is given the place of the true word. Where a word is put on an empty region, the
place follows from the region and the natural width of the word by the layout head, as in `scene_text.rewrite`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import cv2
import numpy as np
import torch
from scene_text_sets import SETS, Case
from torch import Tensor

from overpaint.scene_text.lettering import Lettering
from overpaint.scene_text.line import Line
from overpaint.scene_text.network import Place
from overpaint.scene_text.planning import WIDEST
from overpaint.train import photographs
from overpaint.train.lettering_colors import BASIC, contrast, luminance
from overpaint.train.lettering_fonts import Face
from overpaint.train.lettering_scenes import World, draw

__all__ = ["Crop", "Materials", "boxes", "crop", "crops", "images", "other_color", "places"]

GENERATOR_SEED = 18  # of the generator; a case's seed is its index


@dataclass(frozen=True)
class Materials:
    """Fonts by name, photographs by name, and the line."""

    faces: Mapping[str, Face]
    photos: Mapping[str, np.ndarray]  # RGB uint8 (H, W, 3)
    line: Line = field(default_factory=Line)

    @classmethod
    def load(cls, faces: Sequence[Face], names: Sequence[str], folder: Path) -> "Materials":
        """Return materials with photographs of a folder."""
        pictures = {name: photographs.read(name, folder, side=384) for name in names}
        arrays = {n: np.ascontiguousarray(p.permute(1, 2, 0).numpy()) for n, p in pictures.items()}
        return cls({face.name: face for face in faces}, arrays)


@dataclass(frozen=True)
class Crop:
    """The picture of a case.

    Attributes:
        case: The case.
        truth: The line with the true word, RGB uint8 (H, W, 3).
        clean: The line without it, RGB uint8 (H, W, 3).
        input: The line that is edited: `truth`, or `clean` where a word is put on an empty region.
        mask: True in the region, bool (H, W).
        cover: Opacity of the true letters, 0 to 1, float32 (H, W).
        start: Left edge of the true word, in pixels.
        end: Its right edge.
        capital: Row of the upper edge of capital letters.
        baseline: Row of their lower edge.
        color: Name of the color.
    """

    case: Case
    truth: np.ndarray
    clean: np.ndarray
    input: np.ndarray
    mask: np.ndarray
    cover: np.ndarray
    start: float
    end: float
    capital: float
    baseline: float
    color: str


def crop(case: Case, materials: Materials) -> Crop:
    """Return the picture of a case.

    Raises:
        ValueError: The generator draws another color than the list names, because it was changed.
    """
    rule = SETS[case.set]
    one = World(
        (materials.faces[case.font],), (materials.photos[case.photo],), materials.line, rule.unseen_words
    )  # fmt: skip
    sample = draw(one, rule.stage, GENERATOR_SEED, case.seed, text=case.text)
    if case.color and sample.color != case.color:
        raise ValueError(
            f"the generator draws {case.text!r} in {sample.color}, but the list of cases says {case.color}: the code "
            "of the generator was changed after the list was drawn. Draw a new list with scene_text_cases.py."
        )
    start, end = float(sample.edges[0]), float(sample.edges[-1])
    result = Crop(
        case, sample.image, sample.clean, sample.image, np.zeros(sample.mask.shape, bool), sample.cover,
        start, end, sample.capital, sample.baseline, sample.color,
    )  # fmt: skip
    left, right, top, bottom = _tight(result, materials.line)
    if rule.region == "wider":
        extra = np.random.default_rng(case.seed).uniform(3, 14, 2)
        left, right = left - extra[0], right + extra[1]
    elif rule.region == "twice":
        middle, half = (left + right) / 2, right - left
        half = min(half, (materials.line.width - 8) / 2)
        middle = min(max(middle, half + 4), materials.line.width - half - 4)
        left, right = middle - half, middle + half
    mask = np.zeros_like(result.mask)
    mask[top:bottom, max(0, round(left)) : min(materials.line.width, round(right))] = True
    is_empty = rule.region != "tight"
    return replace(result, mask=mask, input=sample.clean if is_empty else sample.image)


def _tight(drawn: Crop, line: Line) -> tuple[float, float, int, int]:
    """Return left and right edge and first and last row of the true word with all of its effects."""
    near = cv2.dilate((drawn.cover > 0.02).astype(np.uint8), np.ones((9, 9), np.uint8)) > 0
    change = np.abs(drawn.truth.astype(int) - drawn.clean).max(2) > 8
    rows, columns = np.nonzero((near & change) | (drawn.cover > 0.02))
    left, right, top, bottom = drawn.start - 2, drawn.end + 2, line.top, line.bottom
    if len(rows):
        left, right = min(left, columns.min()), max(right, columns.max() + 1)
        top, bottom = min(top, int(rows.min())), max(bottom, int(rows.max()) + 1)
    return max(0.0, left), min(float(line.width), right), top, bottom


def crops(cases: Sequence[Case], materials: Materials) -> list[Crop]:
    """Return the pictures of cases."""
    return [crop(case, materials) for case in cases]


def images(pictures: Sequence[np.ndarray]) -> Tensor:
    """Return pictures as RGB in [0, 1], (B, 3, H, W)."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255


def boxes(drawn: Sequence[Crop]) -> list[tuple[int, int, int, int]]:
    """Return the box of each region, which is read: left, top, right, bottom."""
    result = []
    for one in drawn:
        columns = np.flatnonzero(one.mask.any(0))
        rows = np.flatnonzero(one.mask.any(1))
        result.append((int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1))
    return result


def places(
    model: Lettering, drawn: Sequence[Crop], words: Sequence[str], instructions: Sequence[str]
) -> Place:
    """Return where the words are to stand."""
    rows = []
    line = model.config.line
    for one, word, instruction, (left, _, right, _) in zip(
        drawn, words, instructions, boxes(drawn), strict=True
    ):
        start, end, capital, baseline = one.start, one.end, one.capital, one.baseline
        if SETS[one.case.set].region != "tight":
            start, end, capital, baseline = left + 2.0, right - 2.0, line.capital, line.baseline
            natural = _natural(model, word, instruction)
            if natural is not None and end - start > WIDEST * natural:
                middle = (start + end) / 2
                start, end = middle - WIDEST * natural / 2, middle + WIDEST * natural / 2
        rows.append((start, end, capital, baseline))
    return Place(*torch.tensor(rows, dtype=torch.float32).unbind(1))


def _natural(model: Lettering, word: str, instruction: str) -> float | None:
    """Return the natural width of a word in pixels of the line; `None` without a layout head or a word."""
    if model.network.layout_head is None or not word:
        return None
    line = model.config.line
    with torch.no_grad():
        heights = float(model.network.natural_width(model.network.texts([word], [instruction])))
    return min(max(heights * (line.baseline - line.capital), 4.0), line.width - 2.0 * line.margin)


def other_color(drawn: Crop) -> str:
    """Return a basic color that contrasts with the background and is far from the case's color."""
    ground = float(luminance(drawn.clean[drawn.mask]).mean())
    own = np.array(BASIC.get(drawn.color, (128, 128, 128)), float)
    values = {name: np.array(value, float) for name, value in BASIC.items() if name != drawn.color}
    distant = {n: v for n, v in values.items() if np.abs(v - own).mean() > 50} or values
    ratios = {n: float(contrast(luminance(v), np.float32(ground))) for n, v in distant.items()}
    allowed = [n for n, ratio in ratios.items() if ratio >= 1.8] or [max(ratios, key=ratios.get)]  # type: ignore[arg-type]
    return allowed[drawn.case.seed % len(allowed)]
