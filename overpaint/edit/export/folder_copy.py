"""Copy the folder of a pipeline with some of its weights changed.

Every file is copied byte for byte, except weights that differ in memory, `README.md` (the model card), settings that
were changed, and local paths in JSON files. Changed weight files have the same names, dtypes and metadata. Files that
contain the unedited model are not copied: other forms of an edited part's weights (`.bin`, `.msgpack`, a variant with
other numbers), and whole checkpoints next to the parts.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from overpaint import files
from overpaint.edit.change import Change
from overpaint.edit.export.tensor_files import replace_tensors, tensors
from overpaint.edit.movement import Movement
from overpaint.edit.weights import find_weights, is_base
from overpaint.errors import UnsupportedModel
from overpaint.model import TextToImage

__all__ = ["complete_index", "copy_edited", "hide_local_paths", "write_settings"]

_WEIGHTS = (".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".h5", ".onnx", ".onnx_data")  # fmt: skip
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
Values = dict[str, Callable[[], Tensor]]


def copy_edited(model: TextToImage, change: Change, target: Path) -> None:
    """Write the folder of `model` to `target`, with the weights that differ from it in memory.

    Args:
        model: A model loaded from a folder, with `change` applied.
        change: The change.
        target: A folder that does not exist yet.

    Raises:
        UnsupportedModel: A part has weights that its files lack, such as those of adapters.
        ValueError: A moved weight does not fit the dtype in which it is stored.
    """
    folder = model.folder
    assert folder is not None
    source = folder.folder
    moved = _moved_names(model, change)
    changed: dict[Path, Values] = {}
    skipped: set[Path] = set()
    for part in ("text_encoder", "text_encoder_2", "unet", "vae"):
        if not folder.files_of(part) or not folder.is_loaded(part):
            continue
        values = _changed_values(model, part, moved.get(part, {}))
        changed |= values
        if any(values.values()):
            skipped |= _stale(source / part, set(values), moved.get(part, {}), changed)
    for relative in _listed(source):
        if source / relative in skipped or _is_whole_checkpoint(relative):
            continue
        place = target / relative
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / relative, place)
        if values := changed.get(source / relative):
            replace_tensors(place, values)


def complete_index(folder: Path) -> tuple[str, ...]:
    """Set the missing parts in a pipeline's index to none, and return a remark for each.

    The cache of the hub holds no safety checker, because loading a model does not download it.
    """
    path = folder / "model_index.json"
    index = files.from_json(path.read_bytes())
    parts = [name for name, entry in index.items() if isinstance(entry, list) and entry[:1] != [None]]  # fmt: skip
    absent = [name for name in parts if not (folder / name).is_dir()]
    if absent:
        index |= {name: [None, None] for name in absent}
        if "safety_checker" in absent:
            index["requires_safety_checker"] = False
        path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return tuple(f"The part `{name}` of the base model is not in this folder." for name in absent)


def write_settings(folder: Path, model: TextToImage) -> None:
    """Write guidance scale, held-out pairs and clip_skip of `model` as `overpaint.json`, unless the file holds them."""
    path = folder / "overpaint.json"
    stored = files.from_json(path.read_bytes()) if path.is_file() else {}
    settings: dict[str, Any] = {
        "guidance_scale": model.guidance_scale,
        "held_out": sorted(list(pair) for pair in model.held_out),
        "clip_skip": model.clip_skip,
    }
    default = 7.5 if len(model.structure.text_encoders) == 1 else 5.0
    defaults = {"guidance_scale": default, "held_out": [], "clip_skip": 0}
    present = defaults | stored | {"held_out": sorted(stored.get("held_out", []))}
    if any(present[name] != value for name, value in settings.items()):
        written = {n: v for n, v in settings.items() if v != defaults[n] or n in stored}
        path.write_text(files.to_json(stored | written), encoding="utf-8")


def hide_local_paths(folder: Path) -> None:
    """Replace local paths in the JSON files of a pipeline folder by their last name; other bytes do not change."""
    for path in (*folder.glob("*.json"), *folder.glob("*/*.json")):
        text = path.read_text(encoding="utf-8")
        if '"_name_or_path"' not in text:
            continue
        value = files.from_json(text)
        name = value.get("_name_or_path") if isinstance(value, dict) else None
        if isinstance(name, str) and _is_local(name):
            short = Path(name.replace("\\", "/")).name
            path.write_text(text.replace(json.dumps(name), json.dumps(short)), encoding="utf-8")


def _is_local(name: str) -> bool:
    return name.startswith(("/", ".", "~")) or "\\" in name or bool(name) and Path(name).exists()


def _moved_names(model: TextToImage, change: Change) -> dict[str, dict[str, Movement]]:
    """Return for each part the movements by the name of their weight in the part."""
    names: dict[str, dict[str, Movement]] = {}
    movements = change.movements
    for weight, movement in zip(find_weights(model, change.sites), movements, strict=True):
        part = (
            "unet" if weight.encoder is None else ("text_encoder", "text_encoder_2")[weight.encoder]
        )
        parameters = model.components()[part].named_parameters()
        name = next(name for name, parameter in parameters if parameter is weight.parameter)
        names.setdefault(part, {})[_plain(name, part)] = movement
    return names


def _changed_values(
    model: TextToImage, part: str, moved: Mapping[str, Movement]
) -> dict[Path, Values]:
    """Return for each weight file of a part the tensors that differ from the part in memory, with their new values."""
    folder = model.folder
    assert folder is not None
    memory = {_plain(n, part): t for n, t in model.components()[part].state_dict().items()}
    values: dict[Path, Values] = {}
    seen: set[str] = set()
    for path in folder.files_of(part):
        values[path] = {}
        for name, stored in tensors(path):
            key = _plain(name, part)
            seen.add(key)
            if key not in memory:  # a buffer that older releases stored
                continue
            present = memory[key].detach().cpu().reshape(stored.shape)
            if key in moved and is_base(stored, moved[key].base_hash, moved[key].casts):
                values[path][name] = _added(moved[key], stored)
            elif not torch.equal(stored.to(present.dtype), present):
                values[path][name] = _cast(present, stored.dtype)
    missing = sorted(set(memory) - seen)
    if missing:
        raise UnsupportedModel(
            f"the {part} of {model.name!r} has weights that its folder lacks, first {missing[0]!r}: fuse and unload "
            "adapters before exporting."
        )
    return values


def _stale(
    folder: Path, loaded: set[Path], moved: Mapping[str, Movement], changed: dict[Path, Values]
) -> set[Path]:
    """Return the other weight files of an edited part; a variant of the same numbers is edited too, not returned."""
    stale: set[Path] = set()
    for path in folder.iterdir():
        if path in loaded or not _is_weights(path):
            continue
        values = None if path.suffix != ".safetensors" else _variant_values(path, moved)
        if values is None:
            stale.add(path)
        else:
            changed[path] = values
    return stale | {p for p in folder.glob("*.index*.json") if _names_any(p, stale)}


def _names_any(index: Path, weights: set[Path]) -> bool:
    """Return whether the index of a sharded part names one of the files `weights`."""
    names = set(files.from_json(index.read_bytes()).get("weight_map", {}).values())
    return any(path.name in names for path in weights)


def _variant_values(path: Path, moved: Mapping[str, Movement]) -> Values | None:
    """Return the moved tensors of another variant with their new values; `None` if its numbers are of another model."""
    values: Values = {}
    part = path.parent.name
    for name, stored in tensors(path):
        movement = moved.get(_plain(name, part))
        if movement is None:
            continue
        if not is_base(stored, movement.base_hash, movement.casts):
            return None
        values[name] = _added(movement, stored)
    return values


def _added(movement: Movement, stored: Tensor) -> Callable[[], Tensor]:
    """Return a function that adds the movement to the stored numbers, which are rounded once.

    Raises:
        ValueError: The result does not fit the dtype.
    """
    return lambda: _finite(movement.added_to(stored), movement.site)


def _cast(present: Tensor, dtype: torch.dtype) -> Callable[[], Tensor]:
    return lambda: _finite(present.to(dtype), "a weight")


def _finite(value: Tensor, site: str) -> Tensor:
    if not torch.isfinite(value).all():
        raise ValueError(
            f"{site} of the edited model holds numbers that {value.dtype} cannot, the dtype of its folder: save the "
            "folder in float32 first, or make the change again with a greater `ridge`."
        )
    return value


def _plain(name: str, part: str) -> str:
    """Return the name of a weight without the differences between releases of diffusers and transformers."""
    name = name.removeprefix("text_model.")
    if part == "vae" and ".attentions." in name:
        head, _, end = name.rpartition(".")
        stem, _, last = head.rpartition(".")
        return f"{stem}.{_OLD_ATTENTION.get(last, last)}.{end}"
    return name


def _listed(source: Path) -> Iterator[Path]:
    """Yield the files of a folder, relative to it; no hidden folder, and no pipeline folder inside it."""
    visited: set[str] = set()
    for place, folders, names in os.walk(source, followlinks=True):
        visited.add(os.path.realpath(place))
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".")
            and os.path.realpath(Path(place) / name) not in visited
            and not (Path(place) / name / "model_index.json").exists()
        )
        yield from ((Path(place) / name).relative_to(source) for name in sorted(names))


def _is_whole_checkpoint(relative: Path) -> bool:
    return len(relative.parts) == 1 and _is_weights(relative)


def _is_weights(path: Path) -> bool:
    return path.suffix in _WEIGHTS
