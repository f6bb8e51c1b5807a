"""The edits: move, paste, drag, appearance and landmarks.

Source: Mou et al., 2024 (DragonDiffusion), https://arxiv.org/abs/2307.02421; Mou et al., 2024 (DiffEditor),
https://arxiv.org/abs/2402.02583.
Deviations: the preset `overpaint` inverts a copy of the picture that shows the edit in pixels, fills holes first, adds
back what the autoencoder loses, and leaves all pixels outside of the edited region as they are. With `published` the
object of another picture is placed and scaled in pixels before its inversion, since pictures have different sizes.
"""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from overpaint.errors import check_seed
from overpaint.image_edit import tasks
from overpaint.image_edit.arguments import (
    check_model,
    check_move,
    check_offset,
    load_reference,
    load_working,
)
from overpaint.image_edit.energies import Weights
from overpaint.image_edit.fill import fill
from overpaint.image_edit.geometry import (
    Box,
    Frame,
    Move,
    bounds,
    centroid,
    choose_frame,
    dilate,
    load_mask,
    placed,
)
from overpaint.image_edit.job import Job, edit, unit_of, working_size
from overpaint.image_edit.points import around, read_landmarks, read_points, warp
from overpaint.image_edit.result import Edited
from overpaint.image_edit.sampler import Plan
from overpaint.image_edit.settings import Settings
from overpaint.image_edit.tasks import Pair
from overpaint.model.sampling import Progress

__all__ = ["appearance", "drag", "landmarks", "move", "paste"]

_LEAST_MOVED = 0.1  # pixels: less is no displacement
_FILLED = (
    0.75  # share of a drag's region that counts as the object, since the region has a wide border
)


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
        image: Path, PIL image, array or tensor, RGB in [0, 1], of any size from 8 pixels on.
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
    settings, weights = settings or Settings(), weights or Weights()
    check_model(model, prompt)
    shift = check_move(offset, scale)
    picture, size = load_working(image)
    object_ = load_mask(mask, size)
    shift = replace(shift, pivot=centroid(object_))
    source = dilate(object_, settings.grow)
    here, there = bounds(source), shift.box(bounds(object_), size)
    check_offset(offset, there, size)
    there, rim = _with_rim(there, shift, settings, size)
    frame = _frame(model, settings, size, _union(here, there), max(_side(here), _side(there)))
    crop, source, object_ = (frame.crop(values) for values in (picture, source, object_))
    shift = shift.within(frame.left, frame.top)
    target = dilate(shift.apply(object_[None, None].float())[0][0, 0] > 0.5, rim)
    base = fill(crop, source) if settings.fill else crop
    moved, inside = shift.apply(crop)
    copy = torch.where(inside, moved, base)
    changed = source | target

    def plan(pair: Pair) -> Plan:
        if settings.copy:
            return tasks.merged(pair, target, changed, weights)
        return tasks.move(pair, source, shift, weights, moves_latents=settings.paste_latents)

    job = Job("move", base, copy, (copy,) * settings.copy, target, changed, plan)
    return edit(
        model, picture, frame, job, settings, prompts=(prompt, prompt), seed=check_seed(seed), masks={"source": source},
        on_progress=on_progress,
    )  # fmt: skip


def paste(
    model: Any,
    image: Any,
    reference: Any,
    mask: Any,
    position: tuple[float, float],
    scale: float = 1.0,
    *,
    prompts: tuple[str, str] = ("", ""),
    settings: Settings | None = None,
    seed: int = 0,
    weights: Weights | None = None,
    on_progress: Progress | None = None,
) -> Edited:
    """Return the picture with an object of another picture pasted into it.

    Args:
        model: A `TextToImage`; its UNet must draw from a prompt alone.
        image: The picture, as in `move`.
        reference: The picture with the object, of any size.
        mask: The object in `reference`, of its size.
        position: (x, y) in pixels of `image`: where the object's centre goes.
        scale: Factor of the object's size, 0.1 to 10.
        prompts: Short captions of both pictures.
        settings: By default those of the preset `overpaint`.
        seed: Seed of the noise, which only `settings.sde` uses.
        weights: Weights of the energies; by default those of the release for pasting.
        on_progress: Called after each step with (steps done, steps in total, label).

    Returns:
        The picture, at its own size.

    Raises:
        ValueError: As in `move`, or more than one reference is given.
        TypeError: As in `move`.
        UnsupportedModel: As in `move`.

    Source: Mou et al., 2024 (DragonDiffusion), https://arxiv.org/abs/2307.02421, section 3.4.3.
    """
    settings, weights = settings or Settings(), weights or Weights()
    check_model(model, *prompts)
    shift = check_move(position, scale, "position")
    picture, size = load_working(image)
    other = load_reference(reference)
    object_ = load_mask(mask, (other.shape[2], other.shape[3]))
    x, y = centroid(object_)
    shift = Move((shift.offset[0] - x, shift.offset[1] - y), shift.scale, (x, y))
    there = shift.box(bounds(object_), size)
    check_offset(position, there, size, "position")
    there, rim = _with_rim(there, shift, settings, size)
    frame = _frame(model, settings, size, there, _side(there))
    crop = frame.crop(picture)
    shown, inside = placed(torch.cat([other, object_[None, None].float()], 1), shift, size)
    shown, inside = frame.crop(shown), frame.crop(inside)
    target = dilate(shown[0, 3] > 0.5, rim) & inside
    copy = torch.where(inside, shown[:, :3], crop)

    def plan(pair: Pair) -> Plan:
        if settings.copy:
            return tasks.merged(pair, target, target, weights)
        return tasks.paste(
            pair, target, Move((0.0, 0.0)), weights, moves_latents=settings.paste_latents
        )

    job = Job("paste", crop, copy, (copy,), target, target, plan)
    return edit(
        model,
        picture,
        frame,
        job,
        settings,
        prompts=prompts,
        seed=check_seed(seed),
        on_progress=on_progress,
    )


def drag(
    model: Any,
    image: Any,
    points: Any,
    *,
    mask: Any = None,
    prompt: str = "",
    settings: Settings | None = None,
    seed: int = 0,
    weights: Weights | None = None,
    on_progress: Progress | None = None,
) -> Edited:
    """Return the picture with points of its content dragged to other places.

    With the preset `overpaint` the pixels are first warped so that each point is at its end; with `published` the
    energies alone move them.

    Args:
        model: A `TextToImage`; its UNet must draw from a prompt alone.
        image: The picture, as in `move`.
        points: Points (x, y) in pixels, alternating start and end.
        mask: Pixels that may change, of the size of the picture; by default a region around all points.
        prompt: A short caption; it has little effect.
        settings: By default those of the preset `overpaint`.
        seed: Seed of the noise, which only `settings.sde` uses.
        weights: Weights of the energies; by default those of the release for dragging.
        on_progress: Called after each step with (steps done, steps in total, label).

    Returns:
        The picture, at its own size.

    Raises:
        ValueError: The number of points is odd, one is outside of the picture, or an argument is as `move` refuses it.
        TypeError: As in `move`.
        UnsupportedModel: As in `move`.

    Source: Mou et al., 2024 (DragonDiffusion), https://arxiv.org/abs/2307.02421, section 3.4.3.
    """
    check_model(model, prompt)
    picture, size = load_working(image)
    starts, ends = read_points(points, size)
    region = around(starts, ends, size) if mask is None else load_mask(mask, size)
    weights = weights or Weights(inpaint=0.2)
    return _dragged(
        model, picture, starts, ends, region, "drag", prompt, settings, seed, weights, on_progress
    )


def landmarks(
    model: Any,
    image: Any,
    source: Any,
    target: Any,
    *,
    prompt: str = "",
    settings: Settings | None = None,
    seed: int = 0,
    weights: Weights | None = None,
    on_progress: Progress | None = None,
) -> Edited:
    """Return a face with its landmarks moved to those of another one.

    No detector is part of this package: give the landmarks of any, such as the 68 points of dlib.

    Args:
        model: A `TextToImage`; its UNet must draw from a prompt alone.
        image: The picture of the face, as in `move`.
        source: Landmarks of the face, (K, 2), (x, y) in pixels.
        target: Where they go, (K, 2): landmarks of another face, aligned to this one.
        prompt: A short caption; it has little effect.
        settings: By default those of the preset `overpaint`.
        seed: Seed of the noise, which only `settings.sde` uses.
        weights: Weights of the energies; by default those of the release for faces.
        on_progress: Called after each step with (steps done, steps in total, label).

    Returns:
        The picture, at its own size.

    Raises:
        ValueError: There are no landmarks, those of several faces, or different numbers of them, or an argument is as
            `move` refuses it.
        TypeError: As in `move`.
        UnsupportedModel: As in `move`.

    Source: Mou et al., 2024 (DragonDiffusion), https://arxiv.org/abs/2307.02421, section 3.4.3.
    """
    check_model(model, prompt)
    picture, size = load_working(image)
    starts, ends = read_landmarks(source, size, "source"), read_landmarks(target, (0, 0), "target")
    if len(starts) != len(ends):
        raise ValueError(
            f"{len(starts)} landmarks in `source` and {len(ends)} in `target`: give the same points of both."
        )
    limit = ends.new_tensor([size[1] - 1, size[0] - 1])
    ends = ends.clamp(min=0).minimum(limit)
    region = around(starts, ends, size)
    weights = weights or Weights(edit=12.0)
    return _dragged(
        model,
        picture,
        starts,
        ends,
        region,
        "landmarks",
        prompt,
        settings,
        seed,
        weights,
        on_progress,
    )


def appearance(
    model: Any,
    image: Any,
    mask: Any,
    reference: Any,
    reference_mask: Any,
    *,
    prompts: tuple[str, str] = ("", ""),
    settings: Settings | None = None,
    seed: int = 0,
    weights: Weights | None = None,
    on_progress: Progress | None = None,
) -> Edited:
    """Return the picture with an object that has the look of an object of another picture, and its own shape.

    With the preset `overpaint` denoising starts from the object with the reference's mean color and contrast.

    Args:
        model: A `TextToImage`; its UNet must draw from a prompt alone.
        image: The picture, as in `move`.
        mask: The object in `image`, of its size.
        reference: The picture with the look, of any size.
        reference_mask: The object in `reference`, of its size.
        prompts: Short captions of both pictures.
        settings: By default those of the preset `overpaint`.
        seed: Seed of the noise, which only `settings.sde` uses.
        weights: Weights of the energies; by default those of the release for appearance.
        on_progress: Called after each step with (steps done, steps in total, label).

    Returns:
        The picture, at its own size.

    Raises:
        ValueError: As in `paste`.
        TypeError: As in `move`.
        UnsupportedModel: As in `move`.

    Source: Mou et al., 2024 (DragonDiffusion), https://arxiv.org/abs/2307.02421, section 3.4.3; Reinhard et al., 2001,
    https://doi.org/10.1109/38.946629, for mean and contrast, here of RGB.
    """
    settings, weights = settings or Settings(), weights or Weights(edit=3.5, content=5.0)
    check_model(model, *prompts)
    picture, size = load_working(image)
    target = load_mask(mask, size)
    other = load_reference(reference)
    shown = load_mask(reference_mask, (other.shape[2], other.shape[3]), "reference_mask")
    box = bounds(target)
    frame = _frame(model, settings, size, box, _side(box))
    around_shown = _frame(model, settings, shown.shape, bounds(shown), _side(bounds(shown)))
    crop, target = frame.crop(picture), frame.crop(target)
    other, shown = around_shown.crop(other), around_shown.crop(shown)
    copy = _recolored(crop, target, other, shown) if settings.copy else None

    def plan(pair: Pair) -> Plan:
        return tasks.appearance(pair, target, shown, weights)

    others = (other,) if copy is None else (other, copy)
    job = Job("appearance", crop, copy, others, target, target, plan)
    return edit(
        model, picture, frame, job, settings, prompts=(*prompts, prompts[0]), seed=check_seed(seed),
        on_progress=on_progress,
    )  # fmt: skip


def _dragged(
    model: Any,
    picture: Tensor,
    starts: Tensor,
    ends: Tensor,
    region: Tensor,
    task: str,
    prompt: str,
    settings: Settings | None,
    seed: int,
    weights: Weights,
    on_progress: Progress | None,
) -> Edited:
    settings = settings or Settings()
    size = (picture.shape[2], picture.shape[3])
    frame = _frame(model, settings, size, bounds(region), _FILLED * _side(bounds(region)))
    corner = starts.new_tensor([frame.left, frame.top])
    starts, ends, crop, region = (
        starts - corner,
        ends - corner,
        frame.crop(picture),
        frame.crop(region),
    )
    warped, field = warp(crop, starts, ends, region)
    target = region & (field.norm(dim=-1) > _LEAST_MOVED)

    def plan(pair: Pair) -> Plan:
        if settings.copy:
            return tasks.merged(pair, target, target, weights)
        if task == "landmarks":
            return tasks.landmarks(pair, starts, ends, weights)
        return tasks.drag(pair, starts, ends, region, weights, moves_latents=settings.paste_latents)

    job = Job(task, crop, warped, (warped,) * settings.copy, target, region, plan)
    return edit(
        model,
        picture,
        frame,
        job,
        settings,
        prompts=(prompt, prompt),
        seed=check_seed(seed),
        on_progress=on_progress,
    )


def _recolored(crop: Tensor, target: Tensor, other: Tensor, shown: Tensor) -> Tensor:
    """Return a crop whose target has the mean and the standard deviation of the other picture's object, by channel."""
    colors, reference = crop[0][:, target], other[0][:, shown]
    deviation = colors.std(1, unbiased=False, keepdim=True).clamp(min=1e-3)
    scaled = (colors - colors.mean(1, keepdim=True)) / deviation
    result = crop.clone()
    result[0][:, target] = scaled * reference.std(1, unbiased=False, keepdim=True) + reference.mean(
        1, keepdim=True
    )
    return result.clamp(0, 1)


def _frame(
    model: Any, settings: Settings, size: tuple[int, ...], region: Box, object_side: float
) -> Frame:
    return choose_frame(
        (size[0], size[1]), region, object_side=object_side, size=working_size(model, settings), unit=unit_of(model),
        share=settings.crop,
    )  # fmt: skip


def _with_rim(box: Box, shift: Move, settings: Settings, size: tuple[int, int]) -> tuple[Box, int]:
    """Return the box of a moved object with its soft rim, which is wider if it is enlarged, and the rim's width."""
    rim = math.ceil(settings.grow * max(1.0, shift.scale))
    left, top, right, bottom = box
    return (
        max(left - rim, 0),
        max(top - rim, 0),
        min(right + rim, size[1]),
        min(bottom + rim, size[0]),
    ), rim


def _union(one: Box, other: Box) -> Box:
    return (
        min(one[0], other[0]),
        min(one[1], other[1]),
        max(one[2], other[2]),
        max(one[3], other[3]),
    )


def _side(box: Box) -> int:
    return max(box[2] - box[0], box[3] - box[1])
