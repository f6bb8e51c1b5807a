"""One edit within its crop: encode, run, decode, and put the result back into the picture."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from overpaint.image_edit.autoencoder import encode
from overpaint.image_edit.fill import membrane
from overpaint.image_edit.geometry import Frame, feathered
from overpaint.image_edit.result import Edited
from overpaint.image_edit.sampler import Plan, run
from overpaint.image_edit.settings import Settings
from overpaint.image_edit.tasks import Pair
from overpaint.model.sampling import Progress

__all__ = ["Job", "edit", "unit_of", "working_size"]

_LEAST_CELLS = 16  # latents of the longer side; with 8, a cell is an eighth of the picture, too coarse for positions


@dataclass(frozen=True, eq=False)
class Job:
    """An edit in the pixels of a crop.

    Attributes:
        task: Name of the task.
        base: The crop, its hole filled, RGB in [0, 1], (1, 3, H, W).
        copy: The crop that shows the target in place; `None` if there is none.
        others: Further pictures that are inverted, (1, 3, any size).
        target: Pixels that are taken from the copy, bool (H, W).
        changed: Pixels that may change, bool (H, W).
        plan: Returns the plan for the latents.
    """

    task: str
    base: Tensor
    copy: Tensor | None
    others: tuple[Tensor, ...]
    target: Tensor
    changed: Tensor
    plan: Callable[[Pair], Plan]


def edit(
    model: Any,
    picture: Tensor,
    frame: Frame,
    job: Job,
    settings: Settings,
    *,
    prompts: tuple[str, ...],
    seed: int = 0,
    masks: dict[str, Tensor] | None = None,
    on_progress: Progress | None = None,
) -> Edited:
    """Return the edited picture.

    Args:
        model: A `TextToImage`.
        picture: The whole picture, RGB in [0, 1], (1, 3, H, W).
        frame: The crop that is edited.
        job: The edit.
        settings: Parts and their windows.
        prompts: Captions of all inverted pictures.
        seed: Seed of the noise of `settings.sde`.
        masks: Further masks of the result, bool, of the size of the crop.
        on_progress: Called after each step with (steps done, steps in total, label).
    """
    weight = feathered(job.target, settings.feather)
    pasted = job.base if job.copy is None else torch.lerp(job.base, job.copy, weight)
    outcome, raw, result = None, pasted, pasted
    if settings.diffusion:
        latents = encode(model, torch.cat([frame.enter(crop) for crop in (job.base, *job.others)]))
        pair = Pair(latents, prompts[: len(latents)], (frame.height, frame.width))
        outcome = run(model, job.plan(pair), settings, seed=seed, on_progress=on_progress)
        drawn = _decode(model, outcome.latents)
        raw = result = frame.leave(drawn)
        if settings.residual:
            result = pasted + frame.leave(drawn - _seen(model, frame, job, weight))
    if settings.composite:
        result = _composed(result, pasted, frame.crop(picture), job.changed, settings.feather)
    every = {"target": job.target, "changed": job.changed, **(masks or {})}
    blank = torch.zeros_like(picture[:, :1])
    return Edited(
        picture=_inserted(picture, frame, result),
        raw=_inserted(picture, frame, raw),
        pasted=_inserted(picture, frame, pasted),
        masks={name: _inserted(blank, frame, mask)[0] > 0.5 for name, mask in every.items()},
        box=(frame.left, frame.top, frame.left + frame.width, frame.top + frame.height),
        latents=None if outcome is None else outcome.latents[0].cpu(),
        initial_latents=None if outcome is None else outcome.initial[0].cpu(),
        log=() if outcome is None else outcome.log,
        protocol={
            **model.protocol(steps=settings.steps, guidance_scale=settings.guidance_scale),
            "scheduler": "DDIMScheduler",
            "task": job.task,
            "prompts": list(prompts[: 1 + len(job.others)]),
            "seed": seed,
            "working_size": list(frame.size),
            "bank_bytes": 0 if outcome is None else outcome.bank_bytes,
            "settings": dataclasses.asdict(settings),
        },
    )


def _composed(
    result: Tensor, pasted: Tensor, crop: Tensor, changed: Tensor, feather: float
) -> Tensor:
    """Return the result inside of the edited region, without its drift of colors, and the picture's crop elsewhere."""
    drift = membrane(
        result - crop, changed
    )  # the drift around the edit is subtracted inside, as in seamless cloning
    share = feathered(changed, feather)
    return torch.where(changed, pasted + share * (result - drift - pasted), crop)


def unit_of(model: Any) -> int:
    """Return the number of pixels of which the sides of the inverted picture are multiples."""
    return _latent_pixels(model) * 2 ** (len(model.structure.unet.config.block_out_channels) - 1)


def working_size(model: Any, settings: Settings) -> int:
    """Return the longer side in pixels of the inverted picture."""
    return settings.size or max(*model.size, _LEAST_CELLS * _latent_pixels(model))


def _latent_pixels(model: Any) -> int:
    """Return the pixels along each side of a latent."""
    return 2 ** (len(model.components()["vae"].config.block_out_channels) - 1)


def _decode(model: Any, latents: Tensor) -> Tensor:
    return model.decode(latents.to(model.dtype)).float().cpu()


def _seen(model: Any, frame: Frame, job: Job, weight: Tensor) -> Tensor:
    """Return the pasted crop as the autoencoder returns it: that of the copy in the target, of the base elsewhere."""
    shown = [job.base] if job.copy is None else [job.base, job.copy]
    decoded = _decode(model, encode(model, torch.cat([frame.enter(crop) for crop in shown])))
    if job.copy is None:
        return decoded
    share = frame.enter(weight[None, None])
    return decoded[:1] + share * (decoded[1:] - decoded[:1])


def _inserted(picture: Tensor, frame: Frame, crop: Tensor) -> Tensor:
    """Return a copy of the picture with a crop of it replaced, (C, H, W)."""
    result = picture[0].clone()
    rows, columns = frame.slices
    result[:, rows, columns] = crop.reshape(-1, frame.height, frame.width).to(result).clamp(0, 1)
    return result
