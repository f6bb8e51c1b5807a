"""Checks of the arguments that several edits share."""

import math
from typing import Any

from torch import Tensor

from overpaint.errors import check_one_text
from overpaint.image_edit.geometry import Box, Move
from overpaint.images.read import load_picture
from overpaint.model.checks import check_drawable

__all__ = ["check_model", "check_move", "check_offset", "load_reference", "load_working"]


def check_model(model: Any, *prompts: Any) -> None:
    """Raise unless the model draws from a prompt alone and the prompts are texts.

    Raises:
        UnsupportedModel: The UNet also takes a mask or a picture, or there is none.
        TypeError: A prompt is not one text.
    """
    for prompt in prompts:
        check_one_text(prompt, "`prompt`", "give one caption of the picture")
    unet = model.structure.unet
    check_drawable((model.unet if unet is None else unet).config, model.name)


def check_move(offset: Any, scale: Any, name: str = "offset") -> Move:
    """Return a move about (0, 0).

    Raises:
        ValueError: The offset is not two finite numbers, or the scale is out of range.
    """
    numbers = list(offset) if isinstance(offset, tuple | list) else []
    if len(numbers) != 2 or not all(_is_number(v) for v in numbers):
        raise ValueError(
            f"`{name}` must be two numbers (x, y), got {offset!r}: give them in pixels."
        )
    if not _is_number(scale) or not 0.1 <= scale <= 10:
        raise ValueError(
            f"`scale` must be a number from 0.1 to 10, got {scale!r}: 1 keeps the size."
        )
    return Move((float(numbers[0]), float(numbers[1])), float(scale))


def check_offset(offset: Any, box: Box, size: tuple[int, int], name: str = "offset") -> None:
    """Raise if the box of the moved object, clipped to the picture, is empty.

    Raises:
        ValueError: The object leaves the picture.
    """
    if box[0] >= box[2] or box[1] >= box[3]:
        raise ValueError(
            f"`{name}` {tuple(offset)!r} moves the object out of the picture, which is {size[1]}x{size[0]} pixels: "
            "give one that leaves a part of it inside."
        )


def load_working(image: Any) -> tuple[Tensor, tuple[int, int]]:
    """Return the picture, RGB in [0, 1], (1, 3, H, W), and its height and width."""
    picture = load_picture(image, "image")
    return picture, (picture.shape[2], picture.shape[3])


def load_reference(reference: Any) -> Tensor:
    """Return the reference picture, RGB in [0, 1], (1, 3, H, W).

    Raises:
        ValueError: There are several.
    """
    count = len(reference) if isinstance(reference, tuple | list) else 1
    if count > 1 or (isinstance(reference, Tensor) and reference.ndim == 4 and len(reference) > 1):
        raise ValueError(
            f"`reference` must be one picture, got {max(count, len(reference))}: edit once for each."
        )
    return load_picture(
        reference[0] if isinstance(reference, tuple | list) and count else reference, "reference"
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
