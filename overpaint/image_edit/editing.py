"""Moving an object of a picture.

Source: Mou et al., 2024 (DiffEditor), https://arxiv.org/abs/2402.02583; Mou et al., 2024 (DragonDiffusion),
https://arxiv.org/abs/2307.02421.
Deviations: the preset `overpaint` inverts a moved copy of the picture with it, fills the hole first, adds back what the
autoencoder loses, and leaves all pixels outside of the edited region as they are.
"""

import math
from typing import Any

import torch

from overpaint.errors import check_one_text, check_seed
from overpaint.image_edit import tasks
from overpaint.image_edit.energies import Weights
from overpaint.image_edit.fill import fill
from overpaint.image_edit.geometry import (
    Box,
    Move,
    bounds,
    centroid,
    choose_frame,
    dilate,
    load_mask,
)
from overpaint.image_edit.job import Job, edit, unit_of, working_size
from overpaint.image_edit.result import Edited
from overpaint.image_edit.settings import Settings
from overpaint.images.read import load_picture
from overpaint.model.checks import check_drawable
from overpaint.model.sampling import Progress

__all__ = ["check_model", "check_move", "move"]


def move(
    model: Any,
    image: Any,
    mask: Any,
    offset: tuple[float, float],
    scale: float = 1.0,
    *,
    prompt: str = "",
    settings: Settings | None = None,
    seed: int = 0,
    weights: Weights | None = None,
    on_progress: Progress | None = None,
) -> Edited:
    """Return the picture with an object moved, and resized about its centre.

    Args:
        model: A `TextToImage`; its UNet must draw from a prompt alone.
        image: Path, PIL image, array or tensor, RGB in [0, 1], of any size from 8 pixels on; see `load_picture`.
        mask: The object, of the size of the picture: bool, floats, bytes, PIL image or path.
        offset: (x, y) in pixels, right and down; the part that leaves the picture is cut off.
        scale: Factor of the object's size, 0.1 to 10.
        prompt: A short caption; it has little effect.
        settings: By default those of the preset `overpaint`.
        seed: Seed of the noise, which only `settings.sde` uses.
        weights: Weights of the energies; by default those of the release for moving.
        on_progress: Called after each step with (steps done, steps in total, label).

    Returns:
        The picture, at its own size, with masks, latents and a log.

    Raises:
        ValueError: The mask is empty or has another size, the object leaves the picture, or a number is out of range.
        TypeError: The picture, mask or prompt has another type.
        UnsupportedModel: The model also takes a mask or a picture, or has no self-attention in its up blocks.

    Source: Mou et al., 2024 (DragonDiffusion), https://arxiv.org/abs/2307.02421, sections 3.3 to 3.5; Mou et al., 2024
    (DiffEditor), https://arxiv.org/abs/2402.02583.
    """
    settings = settings or Settings()
    check_model(model, prompt)
    picture = load_picture(image, "image")
    size = (picture.shape[2], picture.shape[3])
    shift = check_move(offset, scale)
    object_ = load_mask(mask, size)
    shift = Move(shift.offset, shift.scale, centroid(object_))
    source = dilate(object_, settings.grow)
    here = bounds(source)
    there = shift.box(here, size)
    if there[0] >= there[2] or there[1] >= there[3]:
        raise ValueError(
            f"`offset` {tuple(offset)!r} moves the object out of the picture, which is {size[1]}x{size[0]} pixels: "
            "give a smaller one."
        )
    frame = choose_frame(
        size, _union(here, there), object_side=max(_side(here), _side(there)), size=working_size(model, settings),
        unit=unit_of(model), share=settings.crop,
    )  # fmt: skip
    crop, source = frame.crop(picture), frame.crop(source)
    shift = shift.within(frame.left, frame.top)
    target = shift.apply(source[None, None].float())[0][0, 0] > 0.5
    base = fill(crop, source) if settings.fill else crop
    moved, inside = shift.apply(crop)
    weights = weights or Weights()
    copy = torch.where(inside, moved, base)
    changed = source | target

    def plan(pair: tasks.Pair) -> Any:
        if settings.copy:
            return tasks.merged(pair, target, changed, weights)
        return tasks.move(pair, source, shift, weights, moves_latents=settings.paste_latents)

    job = Job("move", base, copy, copy if settings.copy else None, target, changed, plan)
    return edit(
        model, picture, frame, job, settings, prompts=(prompt, prompt), seed=check_seed(seed), masks={"source": source},
        on_progress=on_progress,
    )  # fmt: skip


def check_model(model: Any, *prompts: Any) -> None:
    """Raise unless the model draws from a prompt alone and the prompts are texts.

    Raises:
        UnsupportedModel: The UNet also takes a mask or a picture.
        TypeError: A prompt is not one text.
    """
    for prompt in prompts:
        check_one_text(prompt, "`prompt`", "give one caption of the picture")
    check_drawable(model.unet.config, model.name)


def check_move(offset: Any, scale: Any) -> Move:
    """Return a move about (0, 0).

    Raises:
        ValueError: The offset is not two finite numbers, or the scale is out of range.
    """
    numbers = list(offset) if isinstance(offset, tuple | list) else []
    if len(numbers) != 2 or not all(_is_number(v) for v in numbers):
        raise ValueError(
            f"`offset` must be two numbers (x, y), got {offset!r}: give them in pixels."
        )
    if not _is_number(scale) or not 0.1 <= scale <= 10:
        raise ValueError(
            f"`scale` must be a number from 0.1 to 10, got {scale!r}: 1 keeps the size."
        )
    return Move((float(numbers[0]), float(numbers[1])), float(scale))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _union(one: Box, other: Box) -> Box:
    return (
        min(one[0], other[0]),
        min(one[1], other[1]),
        max(one[2], other[2]),
        max(one[3], other[3]),
    )


def _side(box: Box) -> int:
    return max(box[2] - box[0], box[3] - box[1])
