"""The ways to write a word that `quality_scene_text` compares: the model, parts of it, and rendering without a model.

Rendering fills the hole by OpenCV's inpainting (Telea, 2004) and draws the word in a known color. With the true font it
is the limit of what can be written without seeing the true picture; the default font is DejaVu Sans.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import matplotlib
import numpy as np
import torch
from scene_text_crops import Crop, boxes, images, places
from scene_text_sets import instruction

from overpaint.scene_text import Guidance, Lettering
from overpaint.scene_text.line import Line
from overpaint.train.lettering_colors import palette
from overpaint.train.lettering_fonts import Face, make_face
from overpaint.train.lettering_glyphs import Style, Word, draw_word, paint

__all__ = [
    "CHARACTERS_OFF", "INSTRUCTION_OFF", "NO_WORD", "OURS", "RENDERED", "RENDERED_DEFAULT", "TRUTH", "Settings",
    "color_value", "default_face", "inpainted", "render_word", "write",
]  # fmt: skip

OURS = "the model"
CHARACTERS_OFF = "character encoder off"  # the instruction names the word
INSTRUCTION_OFF = "instruction encoder off"
NO_WORD = "instruction without the word"
RENDERED = "rendering, true font"
RENDERED_DEFAULT = "rendering, default font"
TRUTH = "true picture"
_ROWS = 16  # lines in a batch


@dataclass(frozen=True)
class Settings:
    """How the model writes."""

    steps: int = 20
    spelling: float = 1.0  # scale of guidance by the characters
    style: float = 1.0  # scale of guidance by the instruction


def write(
    model: Lettering,
    method: str,
    drawn: Sequence[Crop],
    settings: Settings,
    faces: Mapping[str, Face],
    *,
    variant: str = "",
    seed: int = 0,
) -> np.ndarray:
    """Return the lines that a method writes, RGB uint8 (N, H, W, 3).

    Args:
        model: The model; not used by methods without one.
        method: One of this module's constants; any other name writes as `OURS`.
        drawn: Pictures of the cases.
        settings: Steps and guidance.
        faces: Faces by name, for rendering.
        variant: As of `scene_text_sets.instruction`.
        seed: Seed of the noise.
    """
    if method == TRUTH:
        return np.stack([one.truth for one in drawn])
    if method in (RENDERED, RENDERED_DEFAULT):
        default = default_face()
        line = model.config.line
        chosen = [default if method == RENDERED_DEFAULT else faces[o.case.font] for o in drawn]
        return np.stack([render_word(o, face, line) for o, face in zip(drawn, chosen, strict=True)])
    parts = []
    for start in range(0, len(drawn), _ROWS):
        rows = drawn[start : start + _ROWS]
        words = ["" if method == CHARACTERS_OFF else one.case.text for one in rows]
        wanted = "no word" if method == NO_WORD else variant
        texts = [instruction(one.case, variant=wanted) for one in rows]
        if method == INSTRUCTION_OFF:
            texts = ["" for _ in rows]
        mask = torch.from_numpy(np.stack([one.mask for one in rows]))
        written = model.write(
            images([one.input for one in rows]), mask, words, texts, places(model, rows, words, texts),
            steps=settings.steps, guidance=Guidance(settings.spelling, settings.style), seed=seed * 1_000_003 + start,
        )  # fmt: skip
        parts.append((written.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy())
    # 8 bits hold the pixels outside of the region exactly, since they came from 8 bits.
    return np.concatenate(parts)


def render_word(one: Crop, face: Face, line: Line) -> np.ndarray:
    """Return the line with the word drawn in its color over the inpainted region, RGB uint8 (H, W, 3).

    Args:
        one: The picture of a case.
        face: The face.
        line: Sizes of the line.
    """
    ground = inpainted(one)
    (left, _, right, _) = boxes([one])[0]
    word = Word.lay_out(face, one.case.text, capital=one.baseline - one.capital)
    room = max(4.0, right - left - 4.0)
    stretch = min(1.0, room / word.width)
    x = (left + right) / 2 - word.width * stretch / 2
    placed = draw_word(word, line, x=x, baseline=one.baseline, stretch=stretch, bend=np.eye(3))
    fill = color_value(one.color)
    return np.where(one.mask[..., None], paint(ground, [placed], Style(fill)), one.input)


def color_value(name: str) -> np.ndarray:
    """Return a named color, RGB 0 to 255, float32."""
    colors = palette()
    return colors.values[colors.names.index(name)]


def inpainted(one: Crop) -> np.ndarray:
    """Return the line with its region filled from around it, RGB uint8 (H, W, 3)."""
    hole = one.mask.astype(np.uint8)
    return cv2.inpaint(np.ascontiguousarray(one.input), hole, 3, cv2.INPAINT_TELEA)


def default_face() -> Face:
    """Return DejaVu Sans, which matplotlib ships."""
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    return make_face("DejaVuSans", "DejaVuSans", path.read_bytes())
