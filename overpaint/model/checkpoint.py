"""Load a pipeline from a diffusers folder or the hub, and check that it is supported and complete.

If weights are missing or belong to another model, diffusers and transformers use random weights and at most warn. Here
that is an error.
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from overpaint.errors import UnsupportedModel

__all__ = ["check_pipeline", "load_folder", "load_hub"]

# The parts of each pipeline, and the arguments that omit its other parts.
_PARTS = {
    "StableDiffusionPipeline": ("text_encoder", "unet", "vae"),
    "StableDiffusionXLPipeline": ("text_encoder", "text_encoder_2", "unet", "vae"),
}
_OMITTED: dict[str, dict[str, Any]] = {
    "StableDiffusionPipeline": {
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    },
    "StableDiffusionXLPipeline": {"image_encoder": None, "feature_extractor": None},
}


def load_folder(folder: Path, *, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """Return the pipeline in `folder` and the settings in its `overpaint.json`.

    Raises:
        UnsupportedModel: The folder holds no Stable Diffusion pipeline in safetensors, or a file is damaged.
    """
    kind = _kind(_folder_index(folder), source=str(folder))
    files = [file for part in _PARTS[kind] for file in _weight_files(folder, part)]
    variant = "fp16" if all(".fp16." in file.name for file in files) else None
    pipe = _read(str(folder), kind, dtype=dtype, variant=variant, local_files_only=True)
    for part in _PARTS[kind]:
        _check_keys(getattr(pipe, part), folder, part)
    return pipe, _settings(folder / "overpaint.json")


def load_hub(name: str, *, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """Return pipeline and settings of the hub id `name`, as `load_folder`; files in the local cache are used.

    Raises:
        ValueError: The hub cannot be reached, or has no model of that name.
        UnsupportedModel: It is not a Stable Diffusion pipeline in safetensors, or a file is damaged.
    """
    from diffusers import DiffusionPipeline
    from huggingface_hub import hf_hub_download

    unknown = (
        f"unknown model {name!r}: there is no such folder, and the hub returned no Stable Diffusion pipeline in "
        "safetensors of that name. Check the spelling and the connection, or name a folder."
    )
    try:
        kind = _kind(Path(hf_hub_download(name, "model_index.json")), source=name)
        with _quiet():
            folder = DiffusionPipeline.download(name, use_safetensors=True, **_OMITTED[kind])
    except UnsupportedModel:
        raise
    except (OSError, ValueError) as error:
        raise ValueError(unknown) from error
    return load_folder(Path(folder), dtype=dtype)


def check_pipeline(pipe: Any) -> None:
    """Raise unless `pipe` has the parts of Stable Diffusion 1, 2 or XL and finite weights.

    Raises:
        UnsupportedModel: A part is missing or does not fit the others, or a weight is NaN or infinite.
    """
    required = ("text_encoder", "tokenizer", "unet", "vae", "scheduler")
    missing = [part for part in required if getattr(pipe, part, None) is None]
    if missing or not hasattr(pipe.unet, "down_blocks"):
        raise UnsupportedModel(
            f"{type(pipe).__name__} is not a Stable Diffusion pipeline: it has no {', '.join(missing) or 'UNet'}. "
            "Load a `StableDiffusionPipeline` of version 1 or 2, or a `StableDiffusionXLPipeline`."
        )
    parts = _PARTS["StableDiffusionPipeline"]
    if getattr(pipe, "text_encoder_2", None) is not None:
        _check_two_encoders(pipe)
        parts = _PARTS["StableDiffusionXLPipeline"]
    elif getattr(pipe.unet.config, "addition_embed_type", None) is not None:
        raise UnsupportedModel(
            f"the UNet of this {type(pipe).__name__} also takes {pipe.unet.config.addition_embed_type!r}, which one "
            "text encoder cannot provide: load the whole `StableDiffusionXLPipeline` with both encoders."
        )
    for part in parts:
        for name, tensor in getattr(pipe, part).named_parameters():
            if not torch.isfinite(tensor).all():
                raise UnsupportedModel(
                    f"the weights {part}.{name} hold NaN or infinite values: the file is damaged or its training "
                    "diverged. Load another copy."
                )


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


def _folder_index(folder: Path) -> Path:
    index = folder / "model_index.json"
    if index.is_file():
        return index
    pickles = sorted(p.name for p in folder.glob("*") if p.suffix in (".ckpt", ".bin", ".pt"))
    instead = f" but the pickle {pickles[0]}" if pickles else ""
    raise UnsupportedModel(
        f"{str(folder)!r} is not a diffusers pipeline: it holds no model_index.json{instead}. Name a folder that "
        "`save_pretrained` wrote."
    )


def _settings(path: Path) -> dict[str, Any]:
    """Return the settings in `overpaint.json` as arguments of `TextToImage`; empty if there is no such file.

    Raises:
        UnsupportedModel: The file is damaged.
    """
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text())
        settings: dict[str, Any] = {}
        if "guidance_scale" in data:
            settings["guidance_scale"] = float(data["guidance_scale"])
        if "held_out" in data:
            settings["held_out"] = frozenset((str(a), str(b)) for a, b in data["held_out"])
    except (ValueError, TypeError) as error:
        raise UnsupportedModel(
            f"the settings in {str(path)!r} are damaged ({error}): get the folder again, or delete the file."
        ) from error
    if not math.isfinite(settings.get("guidance_scale", 1.0)):
        raise UnsupportedModel(
            f"the guidance scale in {str(path)!r} is not a finite number: get the folder again, or delete the file."
        )
    return settings


def _kind(index: Path, *, source: str) -> str:
    """Return the class of the pipeline that `index` describes."""
    try:
        kind = json.loads(index.read_text()).get("_class_name")
    except (ValueError, AttributeError) as error:
        raise UnsupportedModel(
            f"{str(index)!r} is not valid JSON: {error}. Get the folder again."
        ) from error
    if kind not in _PARTS:
        raise UnsupportedModel(
            f"{source!r} holds a {kind}: only StableDiffusionPipeline (Stable Diffusion 1 and 2) and "
            "StableDiffusionXLPipeline are supported. Name another model."
        )
    return kind


def _weight_files(folder: Path, part: str) -> list[Path]:
    files = sorted((folder / part).glob("*.safetensors"))
    plain = [file for file in files if ".fp16." not in file.name]
    if files:
        return plain or files
    if any((folder / part).glob("*.bin")):
        raise UnsupportedModel(
            f"{str(folder / part)!r} holds pickled weights (.bin), which can run any code when they are read: "
            "convert them to safetensors with `save_pretrained(folder)` on an isolated machine."
        )
    raise UnsupportedModel(
        f"{str(folder / part)!r} holds no weights: expected a .safetensors file. Get the folder again."
    )


def _check_keys(module: Any, folder: Path, part: str) -> None:
    """Raise if the files of a part lack weights, which would then be random."""
    from safetensors import safe_open

    stored: set[str] = set()
    for file in _weight_files(folder, part):
        with safe_open(file, framework="pt") as opened:
            stored.update(key.removeprefix("text_model.") for key in opened.keys())  # noqa: SIM118
    required = {name.removeprefix("text_model.") for name, _ in module.named_parameters()}
    if part == "vae":  # diffusers renames old attention weights of the VAE when it reads them
        required = {name for name in required if ".attentions." not in name}
    missing = sorted(required - stored)
    if missing:
        raise UnsupportedModel(
            f"the weights in {str(folder / part)!r} are not this model's: {len(missing)} are missing, first "
            f"{missing[0]!r}. Get the folder again."
        )


def _read(
    source: str, kind: str, *, dtype: torch.dtype, variant: str | None, local_files_only: bool
) -> Any:
    import diffusers
    from safetensors import SafetensorError

    try:
        with _quiet():
            return getattr(diffusers, kind).from_pretrained(
                source,
                dtype=dtype,
                variant=variant,
                local_files_only=local_files_only,
                use_safetensors=True,
                **_OMITTED[kind],
            )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UnsupportedModel(
            f"{source!r} could not be read as a Stable Diffusion pipeline: {reason} Get the folder again."
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Disable the progress bars and warnings of diffusers and transformers in the block."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    logs = (diffusers_logging, transformers_logging)
    before = [(log.is_progress_bar_enabled(), log.get_verbosity()) for log in logs]
    try:
        for log in logs:
            log.disable_progress_bar()
            log.set_verbosity_error()
        yield
    finally:
        for log, (bars, verbosity) in zip(logs, before, strict=True):
            log.set_verbosity(verbosity)
            if bars:
                log.enable_progress_bar()
