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
from overpaint.image_edit.sampler import Outcome, Plan, run
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
        second: The second picture that is inverted; `None` if only one is.
        target: Pixels that are taken from the copy, bool (H, W).
        changed: Pixels that may change, bool (H, W).
        plan: Returns the plan for the latents.
    """

    task: str
    base: Tensor
    copy: Tensor | None
    second: Tensor | None
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
    prompts: tuple[str, ...] = ("", ""),
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
        prompts: Captions of the picture and of the second one.
        seed: Seed of the noise of `settings.sde`.
        masks: Further masks of the result, bool, of the size of the crop.
        on_progress: Called after each step with (steps done, steps in total, label).
    """
    base = frame.enter(job.base)
    inverted = [base] if job.second is None else [base, frame.enter(job.second)]
    latents = encode(model, torch.cat(inverted))
    pair = Pair(latents, prompts[: len(inverted)], (frame.height, frame.width))
    outcome = run(model, job.plan(pair), settings, seed=seed, on_progress=on_progress)
    drawn = _decode(model, outcome.latents)
    raw = frame.leave(drawn)
    weight = feathered(job.target, settings.feather)
    pasted = job.base if job.copy is None else job.base + weight * (job.copy - job.base)
    result = (
        pasted + frame.leave(drawn - _seen(model, frame, job, weight)) if settings.residual else raw
    )
    if settings.composite:
        # The model's colors drift; what drifts around the edit is subtracted inside, as in seamless cloning.
        drift = membrane(result - frame.crop(picture), job.changed)
        result = result - drift
        share = feathered(job.changed, settings.feather)
        result = torch.where(job.changed, pasted + share * (result - pasted), frame.crop(picture))
    every = {"target": job.target, "changed": job.changed, **(masks or {})}
    return Edited(
        picture=_inserted(picture, frame, result),
        raw=_inserted(picture, frame, raw),
        pasted=_inserted(picture, frame, pasted),
        masks={
            name: _inserted(torch.zeros_like(picture[:, :1]), frame, m)[0] > 0.5
            for name, m in every.items()
        },
        box=(frame.left, frame.top, frame.left + frame.width, frame.top + frame.height),
        latents=outcome.latents[0].cpu(),
        initial_latents=outcome.initial[0].cpu(),
        log=outcome.log,
        protocol=_protocol(model, job, frame, settings, prompts[: len(inverted)], seed, outcome),
    )


def unit_of(model: Any) -> int:
    """Return the number of pixels of which the sides of the inverted picture are multiples."""
    return _latent_pixels(model) * 2 ** (len(model.unet.config.block_out_channels) - 1)


def working_size(model: Any, settings: Settings) -> int:
    """Return the longer side in pixels of the inverted picture."""
    return settings.size or max(*model.size, _LEAST_CELLS * _latent_pixels(model))


def _latent_pixels(model: Any) -> int:
    """Return the pixels along each side of a latent."""
    return 2 ** (len(model.vae.config.block_out_channels) - 1)


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


def _protocol(
    model: Any,
    job: Job,
    frame: Frame,
    settings: Settings,
    prompts: tuple[str, ...],
    seed: int,
    outcome: Outcome,
) -> dict[str, Any]:
    return {
        **model.protocol(steps=settings.steps, guidance_scale=settings.guidance_scale),
        "scheduler": "DDIMScheduler",
        "task": job.task,
        "prompts": list(prompts),
        "seed": seed,
        "working_size": list(frame.size),
        "bank_bytes": outcome.bank_bytes,
        "settings": dataclasses.asdict(settings),
    }
