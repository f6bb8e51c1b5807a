"""The plan of a rewriting: which part of a region the word takes, how wide its letters are, and checks before any work.

The word takes the middle of the region, with letters at most `WIDEST` times as wide as the font draws them. A region
that is wider than this word and the room of a letter height beside it is divided: the network sees and writes only the
window around the word, and the rest is filled from the pixels around the region, so that no second word can appear.
A region that is too wide or too narrow for the word is refused.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch

from overpaint.errors import check_one_text, listed
from overpaint.scene_text import alphabet
from overpaint.scene_text.geometry import Region, line_box, read_region
from overpaint.scene_text.instructions import compose, font_name, is_mix
from overpaint.scene_text.lettering import Lettering
from overpaint.scene_text.line import Line

__all__ = ["WIDEST", "Plan", "make_plan"]

WIDEST = 1.25  # width that letters may be spread to, in natural widths; as in training
_MOST, _LEAST = 16.0, 0.25  # width of a region, in natural widths of the word
_SMALLEST = 6.0  # pixels; height of a region
_ADVANCE = 0.8  # width of a letter in heights of a capital, for models without a layout head
_GAP = 2.0  # pixels of the line between the word and the edge of its window
_FACES = ("Bold", "Italic", "BoldItalic")


@dataclass(frozen=True, eq=False)
class Plan:
    """The place of a word in a picture, and its instruction.

    Attributes:
        text: The word.
        instruction: The instruction.
        area: The region.
        window: The part of `area` that the network writes; `area` itself if it is not too wide.
        box: Left and right edge of `window` on the line, in pixels of the line.
        start: Left edge of the first letter on the line, in pixels.
        end: Right edge of the last letter.
        stretch: Width of the letters in the picture, in natural widths.
        relative_width: Width of `area`, in natural widths of the word.
    """

    text: str
    instruction: str
    area: Region
    window: Region
    box: tuple[float, float]
    start: float
    end: float
    stretch: float
    relative_width: float

    @property
    def is_divided(self) -> bool:
        """True if a part of the region beside the word is filled without the network."""
        return self.window is not self.area


def make_plan(
    size: tuple[int, int],
    region: Any,
    text: str,
    model: Lettering,
    *,
    font: str | None = None,
    color: str | None = None,
    instruction: str | None = None,
) -> Plan:
    """Return the plan of a rewriting.

    Args:
        size: Height and width of the picture, in pixels.
        region: As in `rewrite`.
        text: The word.
        model: The model.
        font: As in `rewrite`.
        color: As in `rewrite`.
        instruction: As in `rewrite`.

    Raises:
        ValueError: Text, region, font, color or instruction cannot be used.
        TypeError: The text or a name is something else than a text.
    """
    check_one_text(text, "`text`", "rewrite one region after another")
    alphabet.check(text, model.config.text_length)
    area = region if isinstance(region, Region) else read_region(region, size)
    _check_area(area)
    instruction = _instruction(model, text, font, color, instruction)
    line = model.config.line
    natural = _natural_width(model, text, instruction)
    width = _line_width(area, line)
    relative = width / natural
    _check_width(relative, text)
    room = line.width - 2 * line.margin
    height = line.baseline - line.capital
    widest = min(WIDEST * natural, max(natural, room - 2 * _GAP))
    needed = max(widest + 2 * _GAP, min(widest + 2 * height, room))
    window = area if width <= needed + 1 else _middle(area, needed / width)
    box = line_box(line, window.size, natural + 2 * _GAP)
    scale = (box[1] - box[0]) / _line_width(window, line)
    start, end = _centred(box, widest * scale)
    return Plan(
        text,
        instruction,
        area,
        window,
        box,
        start,
        end,
        (end - start) / (natural * scale),
        relative,
    )


def _check_area(area: Region) -> None:
    if bool(area.mask.all()):
        raise ValueError(
            "`region` covers the whole picture, so that neither background nor style can be taken from beside it: "
            "leave some pixels around it."
        )
    width, height = area.size
    if height < _SMALLEST or width < _SMALLEST:
        raise ValueError(
            f"`region` has {width:.0f}x{height:.0f} pixels, and letters need at least {_SMALLEST:.0f}x{_SMALLEST:.0f}: "
            "enlarge the picture or the region."
        )


def _check_width(relative: float, text: str) -> None:
    if relative > _MOST:
        raise ValueError(
            f"`region` is {relative:.0f} times as wide as {text!r} at its height, and at most {_MOST:.0f} times can be "
            "filled: make the region narrower."
        )
    if relative < _LEAST:
        raise ValueError(
            f"`region` is too narrow: the letters of {text!r} would have {relative:.0%} of their natural width at its "
            f"height, and need {_LEAST:.0%}. Make the region wider, or write less."
        )


def _instruction(
    model: Lettering, text: str, font: str | None, color: str | None, instruction: str | None
) -> str:
    """Return the instruction, composed of font and color unless one is given."""
    for name, value in (("font", font), ("color", color), ("instruction", instruction)):
        if value is not None:
            check_one_text(value, f"`{name}`", "name one")
            if not value.strip():
                raise ValueError(
                    f"`{name}` is empty: leave it out for the style beside the region."
                )
    if instruction is None:
        font = _known_font(font, model)
        if color is not None and font is not None and is_mix(font):
            raise ValueError(
                f"a mix of two fonts has no color, got {color!r}: leave `color` out, or name one font."
            )
        return compose(text, font, _known_color(color, model))
    if font is not None or color is not None:
        raise ValueError("`instruction` replaces `font` and `color`: leave those out.")
    tokens, most = len(model.network.tokenizer.split(instruction)), model.config.instruction_length
    if tokens > most:
        raise ValueError(
            f"`instruction` has {tokens} tokens, and the model reads {most}: shorten it; words that training never "
            "used count letter by letter."
        )
    return instruction


def _known_font(font: str | None, model: Lettering) -> str | None:
    """Return the name of a font, or of both of a mix, as the model knows it.

    Raises:
        ValueError: It knows no such font.
    """
    if font is None:
        return None
    if is_mix(font):
        first, _, second = font.partition(" and ")
        return f"{_known_font(first, model)} and {_known_font(second, model)}"
    name = font_name(font).replace(" ", "")
    known = {entry.lower(): entry for entry in model.config.fonts}
    if name.lower() in known:
        return known[name.lower()]
    family, _, face = name.partition("-")
    faces = {entry.lower(): entry for entry in _FACES}
    if family.lower() in known and face.lower() in faces:
        return f"{known[family.lower()]}-{faces[face.lower()]}"  # a face that the model never saw
    near = _near(name, model.config.fonts) or _near(family, model.config.fonts)
    names = listed(near or model.config.fonts)
    raise ValueError(f"unknown font {font!r}: choose one of the model's fonts, such as {names}.")


def _known_color(color: str | None, model: Lettering) -> str | None:
    """Return the name of a color as the model knows it.

    Raises:
        ValueError: It knows no such color.
    """
    if color is None:
        return None
    name = " ".join(color.lower().split())
    if name in model.config.colors:
        return name
    names = listed(_near(name, model.config.colors) or model.config.colors)
    raise ValueError(
        f"unknown color {color!r}: choose one of the model's colors, such as {names}, or write an `instruction` in "
        "other words."
    )


def _near(name: str, known: Sequence[str]) -> list[str]:
    """Return up to five names that resemble `name`, the nearest first."""
    lower = {entry.lower(): entry for entry in known}
    return [lower[entry] for entry in difflib.get_close_matches(name.lower(), lower, 5, 0.5)]


def _natural_width(model: Lettering, text: str, instruction: str) -> float:
    """Return the natural width of the text on the line, in pixels; estimated without a layout head."""
    network, line = model.network, model.config.line
    heights = _ADVANCE * len(text)
    if network.layout_head is not None:
        with torch.no_grad():
            heights = float(network.natural_width(network.texts([text], [instruction])))
    return max(heights * (line.baseline - line.capital), 4.0)


def _line_width(region: Region, line: Line) -> float:
    """Return the width of a region, in pixels of the line when its height is that of the line's region."""
    width, height = region.size
    return width / height * (line.bottom - line.top)


def _middle(area: Region, share: float) -> Region:
    """Return the middle of a region, `share` of its width."""
    unit = np.array([[0, 0], [1, 0], [1, 1], [0, 1]], np.float32)
    matrix = cv2.getPerspectiveTransform(unit, area.corners.astype(np.float32))
    left, right = (1 - share) / 2, (1 + share) / 2
    part = np.array([[[left, 0], [right, 0], [right, 1], [left, 1]]], np.float64)
    corners = cv2.perspectiveTransform(part, matrix)[0]
    inside = np.zeros(tuple(area.mask.shape), np.uint8)
    points = np.round((corners - 0.5) * 16).astype(np.int32)  # with 4 fractional bits
    cv2.fillPoly(inside, [points], 1, shift=4)
    mask = area.mask & torch.from_numpy(inside.astype(bool))
    return Region(mask, corners) if bool(mask.any()) else area


def _centred(box: tuple[float, float], widest: float) -> tuple[float, float]:
    """Return the edges of a word in the middle of a box, at most `widest` pixels apart."""
    middle = (box[0] + box[1]) / 2
    room = max(box[1] - box[0] - 2 * _GAP, 4.0)
    half = min(room, widest) / 2
    return middle - half, middle + half
