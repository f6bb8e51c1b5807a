"""Export an edited model: as a LoRA, as one LDM checkpoint, or as a diffusers folder.

A LoRA adds a product of two factors to a weight, and so does a change: nothing is fitted or lost. The other two formats
hold the whole model in its edited state. Every export is written as a draft and renamed when it is complete; the
weights of the model are restored afterwards.
"""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad

from overpaint import files
from overpaint.edit.change import Change
from overpaint.edit.export import folder_copy, ldm, model_card
from overpaint.edit.least_squares import compress
from overpaint.edit.movement import Movement
from overpaint.edit.weights import find_weights
from overpaint.errors import UnsupportedModel
from overpaint.model import TextToImage
from overpaint.model.quiet import quiet
from overpaint.model.sites import find_unet

__all__ = [
    "draft_at",
    "folder",
    "lora",
    "lora_tensors",
    "new_folder",
    "safetensors_path",
    "save",
    "single_file",
    "with_attention",
]

_TEXT = re.compile(r"text(2?)\.(\d+)\.(self_attn\.\w+|mlp\.fc2)")
_UNET = re.compile(r"unet\.cross_attn\.(\d+)\.(\w+)")


def lora(change: Change, path: str | Path, *, model: TextToImage | None = None) -> Path:
    """Write `change` as a LoRA that `pipe.load_lora_weights(path)` of plain diffusers reads.

    Loaded at scale 1 (and fused) it gives the weights that `change.apply` gives, to rounding in float32. All factors of
    one part of the pipeline are padded with zeros to one rank, since releases of diffusers differ in how they scale a
    file with several ranks.

    Args:
        change: A change of a text encoder's self-attention or MLP, or of the UNet's cross-attention.
        path: Must end in `.safetensors`.
        model: Any model of the layout that the change was made for. It is used to find the UNet's layers; a change of
            text encoders alone does not need it.

    Returns:
        `path`.

    Raises:
        ValueError: A LoRA cannot hold the change, `model` is missing or of another layout, or `path` has another
            ending.
        UnknownSite: `model` lacks a weight of the change.
        OSError: The place cannot be written.
    """
    target = safetensors_path(path)
    return save(with_attention(lora_tensors(change, model), ".self_attn."), target)


def lora_tensors(change: Change, model: TextToImage | None) -> dict[str, Tensor]:
    """Return the factors of a LoRA under the names of diffusers and peft. Raises as `lora`."""
    modules = {_module(m.site, model): m for m in change.movements}
    if model is not None:
        _check_shapes(model, change)
    factors = {module: _factors(movement) for module, movement in modules.items()}
    tensors: dict[str, Tensor] = {}
    for module, (up, down) in factors.items():
        part = module.partition(".")[0]
        rank = max(len(d) for m, (_, d) in factors.items() if m.startswith(f"{part}."))
        tensors[f"{module}.lora_A.weight"] = pad(down, (0, 0, 0, rank - len(down)))
        tensors[f"{module}.lora_B.weight"] = pad(up, (0, rank - up.shape[1]))
    return tensors


def with_attention(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Return `tensors` with zero factors of an output projection for each text encoder that has none of `name`.

    diffusers recognises the LoRA of a text encoder by the names of self-attention, and refuses others.

    Args:
        tensors: From `lora_tensors`.
        name: Part of the names that are recognised: `".self_attn."`, or for kohya's names `".self_attn.out_proj."`.
    """
    zeros: dict[str, Tensor] = {}
    for part in ("text_encoder.", "text_encoder_2."):
        names = [n for n in tensors if n.startswith(part) and n.endswith(".lora_B.weight")]
        if not names or any(name in n for n in names):
            continue
        up = torch.zeros_like(tensors[names[0]])  # (D, R)
        layer = re.split(r"\.(?:self_attn|mlp)\.", names[0])[0]
        module = f"{layer}.self_attn.out_proj"
        zeros |= {f"{module}.lora_A.weight": up.T, f"{module}.lora_B.weight": up}
    return tensors | zeros


def _check_shapes(model: TextToImage, change: Change) -> None:
    """Raise unless `model` has the weights of `change` in the same shapes."""
    weights = find_weights(model, change.sites)
    for movement, weight in zip(change.movements, weights, strict=True):
        shape = (movement.left.shape[0], movement.right.shape[1])
        if tuple(weight.parameter.shape) != shape:
            raise ValueError(
                f"{movement.site} of {model.name!r} has the shape {tuple(weight.parameter.shape)}, the change moves "
                f"{shape}: give a model of the layout that the change was made for."
            )


def single_file(model: TextToImage, change: Change, path: str | Path) -> Path:
    """Write the edited model as one checkpoint with LDM's names, as web UIs and `from_single_file` read it.

    The file holds weights only: no tokenizer, no scheduler, and no record of whether the model predicts noise or
    velocity. If the model was loaded from a folder, each part is written in the dtype of its files there.

    Args:
        model: A model of Stable Diffusion 1's layout; unedited, or with `change` applied last.
        change: A change made for `model`.
        path: Must end in `.safetensors`.

    Returns:
        `path`.

    Raises:
        UnsupportedModel: The model has another layout, or is not in memory.
        ValueError: The change was made for another model, or `path` has another ending.
        OSError: The place cannot be written.
    """
    target = safetensors_path(path)
    _check_memory(model)
    with _edited(model, change):
        return save(ldm.state(model, stored=model.folder is not None), target)


def folder(model: TextToImage, change: Change, path: str | Path) -> Path:
    """Write the edited model as a diffusers folder, which `overpaint.load` and `from_pretrained` read, with its card.

    A model that was loaded from a folder or the hub is written as a copy of that folder: only the edited weights
    differ, in the dtype in which they are stored; see `folder_copy`. A live pipeline is saved as it is, in its own
    dtype, with its safety checker if it has one. In both, local paths are cut to their last name.

    Args:
        model: The model, unedited or with `change` applied last.
        change: A change made for `model`.
        path: A folder that does not exist yet.

    Returns:
        `path`.

    Raises:
        FileExistsError: `path` exists.
        UnsupportedModel: The model is not in memory.
        ValueError: The change was made for another model.
        OSError: The place cannot be written.
    """
    target = new_folder(path)
    _check_memory(model)
    source = model.folder
    if source is not None and source.is_encoder:
        raise UnsupportedModel(
            f"{model.name!r} is a text encoder alone, which is exported with its pipeline: load the folder of the "
            "whole pipeline, to which the change applies too."
        )
    with _edited(model, change), draft_at(target) as draft:
        notes: tuple[str, ...] = ()
        if source is None:
            with quiet():
                model.pipe.save_pretrained(draft, safe_serialization=True)
        else:
            folder_copy.copy_edited(model, change, draft)
            notes = folder_copy.complete_index(draft)
        folder_copy.write_settings(draft, model)
        folder_copy.hide_local_paths(draft)
        model_card.save(draft, change, model=model.name, notes=notes)
    return target


def _module(site: str, model: TextToImage | None) -> str:
    """Return the dotted path of the Linear at `site` in a diffusers pipeline."""
    if text := _TEXT.fullmatch(site):
        part = "text_encoder_2" if text[1] else "text_encoder"
        # With the prefix `text_model`, which transformers 5 dropped: old and new diffusers read it.
        return f"{part}.text_model.encoder.layers.{text[2]}.{text[3]}"
    unet = _UNET.fullmatch(site)
    if unet is None:
        raise ValueError(
            f"a LoRA of diffusers cannot hold {site}, only projections: export a folder or a single file, write a LoRA "
            "for ComfyUI with `export.comfy`, or make the change with `edit.auto` without `tokens=True`."
        )
    if model is None:
        raise ValueError(
            f"a model is needed to find the name of {site} in diffusers: pass `model`."
        )
    layers = [s.path for s in find_unet(model.unet) if s.kind == "cross_attn"]
    if int(unet[1]) >= len(layers):
        raise ValueError(
            f"{model.name!r} has no {site}, its UNet has {len(layers)} cross-attentions: pass the model that the "
            "change was made for."
        )
    name = "to_out.0" if unet[2] == "to_out" else unet[2]
    return f"unet.{layers[int(unet[1])]}.{name}"


def _factors(movement: Movement) -> tuple[Tensor, Tensor]:
    """Return up (D_out, R) and down (R, D_in), float32, of least rank and equal column norms; R is at least 1."""
    left, right = compress(movement.left.double(), movement.right.double())
    if left.shape[1] == 0:  # no movement; diffusers cannot read a LoRA of rank 0
        left, right = left.new_zeros(len(left), 1), right.new_zeros(1, right.shape[1])
    size = left.norm(dim=0).clamp(min=1e-300).sqrt()
    return (left / size).float(), (right * size[:, None]).float()


def _edited(model: TextToImage, change: Change) -> AbstractContextManager[object]:
    """Return a context manager in which `change` is applied; a change that is applied already stays applied."""
    return nullcontext() if change.is_applied(model) else change.applied(model)


def _check_memory(model: TextToImage) -> None:
    parts = model.components()
    for part in ("text_encoder", "text_encoder_2", "unet", "vae"):
        if part not in parts or (model.folder is not None and not model.folder.is_loaded(part)):
            continue
        parameters = parts[part].named_parameters()
        missing = next((n for n, p in parameters if p.device.type == "meta"), None)
        if missing is not None:
            raise UnsupportedModel(
                f"the weight {missing!r} of {model.name!r} is not in memory (offloaded, or on the meta device): load "
                "the model without offloading to export it."
            )


def new_folder(path: str | Path) -> Path:
    """Return `path`, or raise `FileExistsError` if it exists."""
    target = files.user_path(path, "path")
    if target.exists():
        raise FileExistsError(
            f"{str(target)!r} exists already, and an export does not replace it: name a new folder."
        )
    return target


def safetensors_path(path: str | Path) -> Path:
    """Return `path`, or raise `ValueError` unless it ends in `.safetensors`."""
    target = files.user_path(path, "path")
    if target.suffix != ".safetensors":
        raise ValueError(
            f"weights are exported as safetensors, not as {target.name!r}: end the name in '.safetensors'."
        )
    return target


def save(tensors: dict[str, Tensor], target: Path) -> Path:
    """Write tensors to a safetensors file, atomically, and return its path."""
    with draft_at(target) as draft, torch.no_grad():
        save_file({name: t.contiguous() for name, t in tensors.items()}, draft, {"format": "pt"})
    return target


@contextmanager
def draft_at(target: Path) -> Iterator[Path]:
    """Yield the path of a draft that becomes `target` if the block succeeds; see `files.atomic`.

    Raises:
        OSError: The draft cannot be written; the message says where.
    """
    try:
        if not target.parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        with files.atomic(target) as draft:
            yield draft
    except (OSError, SafetensorError) as error:
        code = getattr(error, "errno", None) or errno.EIO
        reason = getattr(error, "strerror", None) or str(error)
        advice = "name a place in a folder that exists and that you can write to"
        raise OSError(code, f"cannot write the export ({reason}): {advice}", str(target)) from error
