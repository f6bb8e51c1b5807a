"""Load a model from the zoo, a folder, the hub, or a live pipeline."""

import re
from pathlib import Path
from typing import Any

import torch

from overpaint import zoo
from overpaint.errors import UnsupportedModel
from overpaint.files import user_path
from overpaint.model import checkpoint
from overpaint.model.checks import check_pipeline
from overpaint.model.text_to_image import TextToImage

__all__ = ["check_device", "load"]

_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
_DTYPES = {
    "float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64,
}  # fmt: skip


def load(
    source: Any,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = torch.float32,
    clip_skip: int | None = None,
) -> TextToImage:
    """Load a model. Only this function and `scorers.load` may download files.

    The files of a folder are checked at once; each part (text encoder, UNet, decoder) is read when it is first used.

    Args:
        source: A name from the zoo (`"icons"`), a diffusers folder, the folder of a text encoder with the tokenizer's
            folder beside it, a hub id (`"owner/name"`), or a live `StableDiffusionPipeline` or
            `StableDiffusionXLPipeline`, which is used as it is: `device` and `dtype` are then ignored.
        device: Device of the weights.
        dtype: Dtype of the weights in memory: `"float16"`, `torch.float16` and so on. If `None` or `"stored"`, the
            dtype of the files.
        clip_skip: Number of last layers of the text encoders that are left out, as in diffusers. Encoding, tracing and
            editing then use the layer that the UNet reads. By default that of the folder's settings, or 0.

    Raises:
        UnsupportedModel: A pickle, a folder without a supported pipeline, a damaged file, or a weight is not finite.
        ValueError: The name, the device or the dtype is unknown, or `clip_skip` leaves no layer.
    """
    if not isinstance(source, str | Path):
        check_pipeline(source)
        name = str(source.config.get("_name_or_path") or "live pipeline")
        return TextToImage(source, name=name, clip_skip=clip_skip or 0)
    place, kind = check_device(device), _dtype(dtype)
    text = str(source)
    user_path(source, "source")  # raises if it is empty
    if text in _pipelines() or Path(text).is_dir():
        path = zoo.folder(text) if text in _pipelines() else Path(text)
        folder, settings = checkpoint.open_folder(path, dtype=kind, device=place)
    elif Path(text).suffix in (*_PICKLES, ".safetensors"):
        raise UnsupportedModel(_single_file_message(text))
    elif isinstance(source, str) and _is_hub_id(text):
        folder, settings = checkpoint.open_hub(text, dtype=kind, device=place)
    else:
        raise ValueError(
            f"unknown model {text!r}: it is neither a folder nor a name that ships with the package "
            f"({', '.join(_pipelines()) or 'none'}). Check the spelling, or give a hub id such as 'owner/name'."
        )
    if clip_skip is not None:
        settings["clip_skip"] = clip_skip
    return TextToImage(folder, name=text, **settings)


def check_device(device: str | torch.device) -> torch.device:
    """Return the torch device named `device`.

    Raises:
        ValueError: There is no such device on this machine.
    """
    try:
        place = torch.device(device)
        if place.type == "meta":
            raise RuntimeError("a model on the meta device has no weights")
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise ValueError(
            f"cannot use device {str(device)!r}: {reason}. Use 'cpu', or a device that torch finds on this machine."
        ) from error
    return place


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or dtype == "stored":
        return None
    kind = _DTYPES.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if kind not in _DTYPES.values():
        raise ValueError(
            f"`dtype` must be one of {', '.join(_DTYPES)}, or 'stored' for that of the files, got {dtype!r}."
        )
    return kind


def _pipelines() -> tuple[str, ...]:
    """Return the names of the text-to-image models in the zoo."""
    return tuple(name for name in zoo.names() if (zoo.folder(name) / "model_index.json").is_file())


def _is_hub_id(text: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", text) is not None


def _single_file_message(text: str) -> str:
    if Path(text).suffix in _PICKLES:
        return (
            f"{text!r} is a pickle, which can run any code when it is read: use the model's folder of safetensors "
            "instead, or convert it on an isolated machine."
        )
    return (
        f"{text!r} is a single file without the model's settings: convert it to a folder once with "
        "`StableDiffusionPipeline.from_single_file(...).save_pretrained(folder)` and load the folder."
    )
