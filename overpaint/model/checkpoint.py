"""Open a pipeline folder, a text encoder's folder or a pipeline of the hub, and check that its files are complete.

If weights are missing or belong to another model, diffusers and transformers use random weights and at most warn. Here
that is an error.
"""

import math
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from overpaint import files
from overpaint.errors import UnsupportedModel
from overpaint.model.checks import PARTS, SUPPORTED, check_structure
from overpaint.model.pipeline_folder import PipelineFolder, unreadable
from overpaint.model.quiet import quiet

__all__ = ["open_folder", "open_hub"]

# The arguments that omit the parts of a pipeline that are not used.
_OMITTED_ONE = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
_OMITTED_TWO = {"image_encoder": None, "feature_extractor": None}
_ENCODER = "CLIPTextModel"


def open_folder(
    folder: Path, *, dtype: torch.dtype | None, device: torch.device
) -> tuple[PipelineFolder, dict[str, Any]]:
    """Return the pipeline in `folder`, whose weights are not read yet, and the settings in its `overpaint.json`.

    Raises:
        UnsupportedModel: The folder holds no Stable Diffusion pipeline or text encoder in safetensors, or files of it
            are damaged or missing.
    """
    if _is_encoder(folder):
        return _open_encoder(folder, dtype=dtype, device=device), {}
    kind = _kind(_folder_index(folder), source=str(folder))
    settings = _settings(folder / "overpaint.json")
    weights = {part: _weight_files(folder / part) for part in PARTS[kind]}
    pipe = _structure(folder, kind)
    check_structure(pipe)
    for part in weights:
        _check_keys(getattr(pipe, part), weights[part], part)
    return PipelineFolder(pipe, folder, weights, device=device, dtype=dtype), settings


def open_hub(
    name: str, *, dtype: torch.dtype | None, device: torch.device
) -> tuple[PipelineFolder, dict[str, Any]]:
    """Return pipeline and settings of the hub id `name`, as `open_folder`; files in the local cache are used.

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
        with quiet():
            folder = DiffusionPipeline.download(name, use_safetensors=True, **_omitted(kind))
    except UnsupportedModel:
        raise
    except (OSError, ValueError) as error:
        raise ValueError(unknown) from error
    return open_folder(Path(folder), dtype=dtype, device=device)


def _omitted(kind: str) -> dict[str, Any]:
    return dict(_OMITTED_TWO if "text_encoder_2" in PARTS[kind] else _OMITTED_ONE)


def _structure(folder: Path, kind: str) -> Any:
    """Return the pipeline with its tokenizers and scheduler; the parts with weights are on the meta device."""
    import diffusers

    index = files.from_json((folder / "model_index.json").read_bytes())
    try:
        with quiet():
            parts = {part: _meta_module(folder / part, index.get(part)) for part in PARTS[kind]}
            return getattr(diffusers, kind).from_pretrained(
                str(folder), local_files_only=True, **parts, **_omitted(kind)
            )
    except UnsupportedModel:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise unreadable(str(folder), error) from error


def _meta_module(folder: Path, entry: Any) -> Any:
    """Return the module that `folder` describes, without weights; `entry` is its library and class in the index."""
    library, name = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
    trusted = library in ("diffusers", "transformers")
    kind = getattr(import_module(library), str(name), None) if trusted else None
    if kind is None:
        raise UnsupportedModel(
            f"model_index.json names {entry!r} for {folder.name!r}, which is no class of diffusers or transformers: "
            "get the folder again, or load the pipeline yourself and pass it."
        )
    with torch.device("meta"):
        if library == "diffusers":
            return kind.from_config(kind.load_config(str(folder), local_files_only=True))
        return kind(kind.config_class.from_pretrained(str(folder), local_files_only=True))


def _is_encoder(folder: Path) -> bool:
    return not (folder / "model_index.json").is_file() and _architecture(folder) == _ENCODER


def _architecture(folder: Path) -> str | None:
    """Return the class that is named in the `config.json` of a folder."""
    try:
        config = files.from_json((folder / "config.json").read_bytes())
        names = config.get("architectures") or [config.get("_class_name")]
        return None if names[0] is None else str(names[0])
    except (OSError, ValueError, AttributeError, LookupError, TypeError):
        return None


def _open_encoder(
    folder: Path, *, dtype: torch.dtype | None, device: torch.device
) -> PipelineFolder:
    """Return a text encoder alone, with the tokenizer in the folder next to it."""
    from transformers import CLIPTokenizer

    folder = folder.resolve()
    if (folder.parent / "text_encoder_2").is_dir():
        raise UnsupportedModel(
            f"{str(folder)!r} is one of the two text encoders of SDXL, which are edited together: load the folder "
            f"{str(folder.parent)!r}; its UNet is not read for an edit of text."
        )
    tokenizer = folder.parent / "tokenizer"
    if not tokenizer.is_dir():
        raise UnsupportedModel(
            f"{str(folder)!r} is a text encoder without its tokenizer: put the folder 'tokenizer' of the same model "
            "beside it, or load the whole pipeline folder."
        )
    weights = _weight_files(folder)
    try:
        with quiet():
            pipe = SimpleNamespace(
                text_encoder=_meta_module(folder, ["transformers", _ENCODER]),
                tokenizer=CLIPTokenizer.from_pretrained(str(tokenizer), local_files_only=True),
                config={},
            )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise unreadable(str(folder), error) from error
    _check_keys(pipe.text_encoder, weights, "text_encoder")
    return PipelineFolder(pipe, folder, {"text_encoder": weights}, device=device, dtype=dtype)


def _folder_index(folder: Path) -> Path:
    index = folder / "model_index.json"
    if index.is_file():
        return index
    architecture = _architecture(folder)
    if architecture is not None:
        raise UnsupportedModel(
            f"{str(folder)!r} holds a {architecture} and no model_index.json: only {SUPPORTED} are supported, and the "
            "folder of a CLIPTextModel. Name the folder of a whole pipeline."
        )
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
        data = files.from_json(path.read_bytes())
        settings: dict[str, Any] = {}
        if "guidance_scale" in data:
            settings["guidance_scale"] = float(data["guidance_scale"])
        if "held_out" in data:
            settings["held_out"] = frozenset((str(a), str(b)) for a, b in data["held_out"])
        if "clip_skip" in data:
            settings["clip_skip"] = int(data["clip_skip"])
    except (ValueError, TypeError, KeyError, OverflowError) as error:
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
        kind = files.from_json(index.read_bytes()).get("_class_name")
    except (ValueError, AttributeError) as error:
        raise UnsupportedModel(
            f"{str(index)!r} is not valid JSON: {error}. Get the folder again."
        ) from error
    if not isinstance(kind, str) or kind not in PARTS:
        raise UnsupportedModel(
            f"{source!r} holds a {kind}: only {SUPPORTED} are supported. Name another model."
        )
    return kind


def _weight_files(folder: Path) -> list[Path]:
    weights = sorted(folder.glob("*.safetensors"))
    plain = [file for file in weights if ".fp16." not in file.name]
    if weights:
        return plain or weights
    if any(folder.glob("*.bin")):
        raise UnsupportedModel(
            f"{str(folder)!r} holds pickled weights (.bin), which can run any code when they are read: "
            "convert them to safetensors with `save_pretrained(folder)` on an isolated machine."
        )
    raise UnsupportedModel(
        f"{str(folder)!r} holds no weights: expected a .safetensors file. Get the folder again."
    )


def _check_keys(module: Any, weights: list[Path], part: str) -> None:
    """Raise if the files of a part are truncated or lack weights, which would then be random."""
    from safetensors import SafetensorError, safe_open

    stored: set[str] = set()
    for file in weights:
        try:
            with safe_open(file, framework="pt") as opened:
                stored.update(key.removeprefix("text_model.") for key in opened.keys())  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise unreadable(str(file), error) from error
    required = {name.removeprefix("text_model.") for name, _ in module.named_parameters()}
    if part == "vae":  # diffusers renames old attention weights of the VAE when it reads them
        required = {name for name in required if ".attentions." not in name}
    missing = sorted(required - stored)
    if missing:
        raise UnsupportedModel(
            f"the weights in {str(weights[0].parent)!r} are not this model's: {len(missing)} are missing, first "
            f"{missing[0]!r}. Get the folder again."
        )
