"""Checks of a pipeline (supported, parts that fit each other, finite weights) and of a request for pictures."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.nn import Module

from overpaint.errors import UnsupportedModel, check_seed
from overpaint.model.offload import stored_tensor

__all__ = [
    "PARTS",
    "SUPPORTED",
    "check_drawable",
    "check_finite",
    "check_pipeline",
    "check_request",
    "check_structure",
    "seeds_for",
]

_ONE, _TWO = ("text_encoder", "unet", "vae"), ("text_encoder", "text_encoder_2", "unet", "vae")
PARTS = {
    "StableDiffusionPipeline": _ONE,
    "StableDiffusionInpaintPipeline": _ONE,
    "StableDiffusionXLPipeline": _TWO,
    "StableDiffusionXLInpaintPipeline": _TWO,
}
"""The parts with weights of each supported pipeline class."""

SUPPORTED = (
    "StableDiffusionPipeline (Stable Diffusion 1 and 2), StableDiffusionXLPipeline, and the inpainting pipelines of "
    "both (text edits only)"
)


def check_pipeline(pipe: Any) -> None:
    """Raise unless `pipe` has the parts of Stable Diffusion 1, 2 or XL and finite weights.

    Raises:
        UnsupportedModel: A part is missing or does not fit the others, or a weight is NaN, infinite or not in memory.
    """
    for part in check_structure(pipe):
        check_finite(getattr(pipe, part), part)


def check_structure(pipe: Any) -> tuple[str, ...]:
    """Return the names of the parts with weights; raise unless `pipe` has those of Stable Diffusion 1, 2 or XL.

    Weights are not read and may be on the meta device.

    Raises:
        UnsupportedModel: A part is missing or does not fit the others.
    """
    required = ("text_encoder", "tokenizer", "unet", "vae", "scheduler")
    missing = [part for part in required if getattr(pipe, part, None) is None]
    if missing or not hasattr(pipe.unet, "down_blocks"):
        raise UnsupportedModel(
            f"{type(pipe).__name__} is not a Stable Diffusion pipeline: it has no {', '.join(missing) or 'UNet'}. "
            "Load a `StableDiffusionPipeline` of version 1 or 2, or a `StableDiffusionXLPipeline`."
        )
    if getattr(pipe, "text_encoder_2", None) is not None:
        _check_two_encoders(pipe)
        return _TWO
    if getattr(pipe.unet.config, "addition_embed_type", None) is not None:
        raise UnsupportedModel(
            f"the UNet of this {type(pipe).__name__} also takes {pipe.unet.config.addition_embed_type!r}, which one "
            "text encoder cannot provide: load the whole `StableDiffusionXLPipeline` with both encoders."
        )
    return _ONE


def check_finite(module: Module, part: str) -> None:
    """Raise unless all weights of `module` are finite; those that accelerate stores on disk are not read.

    Raises:
        UnsupportedModel: A weight is NaN or infinite, or is on the meta device and accelerate does not store it.
    """
    for path, inner in module.named_modules():
        for name, parameter in inner.named_parameters(recurse=False):
            tensor = parameter
            if parameter.device.type == "meta":
                if not hasattr(inner, "_hf_hook"):
                    raise UnsupportedModel(
                        f"the weights {part}.{path}.{name} are on the meta device, without numbers: load the pipeline "
                        "from its folder, or offload it with diffusers' `enable_sequential_cpu_offload`."
                    )
                tensor = stored_tensor(inner, name)
            if tensor is not None and not torch.isfinite(tensor).all():
                full = ".".join(word for word in (part, path, name) if word)
                raise UnsupportedModel(
                    f"the weights {full} hold NaN or infinite values: the file is damaged or its training "
                    "diverged. Load another copy."
                )


def check_drawable(settings: Any, name: str) -> None:
    """Raise unless a UNet with these `settings` predicts from latents and a prompt alone.

    Raises:
        UnsupportedModel: It also takes a mask or a picture, as inpainting models do.
    """
    extra = settings.in_channels - settings.out_channels
    if extra > 0:
        takes = "a mask and a masked picture" if extra == 5 else "another picture"
        raise UnsupportedModel(
            f"the UNet of {name!r} takes {settings.in_channels} channels, {extra} of them for {takes}, so it cannot "
            "draw from a prompt alone: edit and export it here, and draw with its own diffusers pipeline, such as "
            "`StableDiffusionInpaintPipeline`."
        )


def seeds_for(seed: int | Sequence[int], prompts: int) -> list[int]:
    """Return the seed of each prompt.

    Raises:
        ValueError: A seed is out of range.
    """
    rows = list(seed) if isinstance(seed, Iterable) else [seed] * prompts
    return [check_seed(row) for row in rows]


def check_request(
    texts: Sequence[str], seeds: Sequence[int], scale: float, *, steps: int, batch_size: int
) -> None:
    """Raise unless pictures can be drawn with these settings.

    Raises:
        ValueError: There are no prompts, the number of seeds is wrong, or a setting is out of range.
        TypeError: A prompt is not a string.
    """
    if not texts:
        raise ValueError("`prompts` is empty: give at least one prompt.")
    if not all(isinstance(text, str) for text in texts):
        raise TypeError(f"`prompts` must be strings, got {texts!r}.")
    if len(seeds) != len(texts):
        raise ValueError(
            f"{len(seeds)} seeds for {len(texts)} prompts: give one seed for all, or one for each prompt."
        )
    if not math.isfinite(scale):
        raise ValueError(f"`guidance_scale` must be a finite number, got {scale}.")
    if steps < 1:
        raise ValueError(f"`steps` must be at least 1, got {steps}.")
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")


def _check_two_encoders(pipe: Any) -> None:
    """Raise unless the two text encoders are those of SDXL."""
    first, second, unet = pipe.text_encoder.config, pipe.text_encoder_2.config, pipe.unet.config
    if getattr(pipe, "tokenizer_2", None) is None or unet.addition_embed_type != "text_time":
        raise UnsupportedModel(
            f"{type(pipe).__name__} has two text encoders but is not SDXL, whose UNet also takes pooled text features "
            "and sizes: only Stable Diffusion 1, 2 and XL are supported."
        )
    width = first.hidden_size + second.hidden_size
    if not hasattr(pipe.text_encoder_2, "text_projection") or unet.cross_attention_dim != width:
        raise UnsupportedModel(
            f"the text encoders do not fit the UNet, which takes features of width {unet.cross_attention_dim}, and "
            f"they return {first.hidden_size} + {second.hidden_size}: load the parts of one SDXL model, the "
            "second encoder as a `CLIPTextModelWithProjection`."
        )
