"""Files that users upload and download: change files and pictures. Their names and contents are not trusted.

Names are shown and offered for download, but never used as a path. The size of a picture is read from its header before
any pixel is decoded. Change files are safetensors; checksum and structure are checked first, and then the change is
applied to a copy of the model to check that it fits.
"""

import json
import re
import unicodedata
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from overpaint import files
from overpaint.edit import Change
from overpaint.model import TextToImage
from overpaint.studio.model_copy import copy_model
from overpaint.studio.tasks import PromptSettings

__all__ = [
    "MAX_BYTES", "PictureOrigin", "bytes_of", "file_name", "load_change", "load_origin", "model_name",
    "save_change", "save_picture", "shown_name", "stored_name",
]  # fmt: skip

MAX_BYTES = 256 * 2**20
_MAX_PIXELS = 4096 * 4096
_CHUNK = "overpaint"  # name of the PNG text chunk that holds the settings


@dataclass(frozen=True)
class PictureOrigin:
    """Settings and model that drew a picture of the studio; the model is empty if the file does not name it."""

    settings: PromptSettings
    model: str = ""


def file_name(text: str, *, default: str = "change") -> str:
    """Return a safe file name without suffix: `text` reduced to letters, digits and dashes, 1 to 60 characters."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:60].strip("-") or default


def shown_name(path: str | Path) -> str:
    """Return the last part of a path without control characters, cut to 80 characters; HTML is not escaped."""
    last = re.split(r"[\\/]", str(path))[-1]
    clean = "".join(c for c in last if unicodedata.category(c)[0] != "C").strip() or "file"
    return clean if len(clean) <= 80 else f"{clean[:76]}..."


def stored_name(name: str) -> str:
    """Return a name for an uploaded file on disk: its `shown_name`, at most 200 bytes long, suffix included."""
    shown = shown_name(name)
    stem, suffix = Path(shown).stem.strip(". "), Path(shown).suffix
    if len(suffix.encode()) > 40:
        stem, suffix = shown, ""
    return f"{stem.encode()[:160].decode(errors='ignore') or 'file'}{suffix}"


def model_name(model: str) -> str:
    """Return the name of a model for files that others may see; for a folder, the last part of its path."""
    return shown_name(Path(model).resolve()) if Path(model).is_dir() else model


def load_change(path: str | Path, model: TextToImage) -> Change:
    """Return the change in an uploaded file, if it fits `model`.

    Raises:
        ValueError: The file is not a change file, is damaged or too large, or was made for another model.
        OSError: The file cannot be read.
    """
    path = Path(path)
    name = shown_name(path)
    _check_bytes(path, name)
    try:
        change = Change.load(path)
        copy_model(model, change)
    except (ValueError, OSError) as error:
        message = str(error).replace(str(path), name)
        if repr(name) not in message:
            message = f"{name!r} was not opened: {message}"
        raise ValueError(message) from error
    return change


def bytes_of(changes: Iterable[Change]) -> int:
    """Return the memory that `changes` take, in bytes; tensors that they share count once."""
    tensors = {
        id(value): value.nbytes
        for change in changes
        for movement in change.movements
        for value in vars(movement).values()
        if isinstance(value, Tensor)
    }
    return sum(tensors.values())


def save_change(change: Change, folder: Path, name: str) -> Path:
    """Write a change under a safe name and return its path; a file of that name is replaced.

    Raises:
        OSError: The folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{file_name(name)}.safetensors"
    change.save(path)
    return path


def save_picture(image: Image.Image, settings: PromptSettings, model: str, path: Path) -> Path:
    """Write a PNG that holds its settings, for `load_origin`, and return its path."""
    origin = {
        "model": model_name(model),
        "prompt": settings.prompt,
        "concept": settings.concept,
        "seeds": settings.seeds,
        "steps": settings.steps,
    }
    info = PngImagePlugin.PngInfo()
    info.add_itxt(_CHUNK, json.dumps(origin, ensure_ascii=False))
    with files.atomic(path) as draft:
        image.save(draft, format="PNG", pnginfo=info)
    return path


def load_origin(path: str | Path) -> PictureOrigin:
    """Return the settings that drew an uploaded picture of the studio; its pixels are not decoded.

    Raises:
        ValueError: The file is not a picture, too large, or not drawn by the studio.
        OSError: The file cannot be read.
    """
    path = Path(path)
    name = shown_name(path)
    _check_bytes(path, name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=("PNG",)) as image:
                width, height = image.size
                chunk: Any = image.info.get(_CHUNK)  # of the chunks before the pixels
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(_too_many_pixels(name)) from error
    except (UnidentifiedImageError, ValueError, SyntaxError, OSError) as error:
        raise ValueError(
            f"{name!r} cannot be read as a picture: choose a PNG that the studio saved."
        ) from error
    if width * height > _MAX_PIXELS:
        raise ValueError(_too_many_pixels(name))
    return _parse_origin(name, chunk)


def _too_many_pixels(name: str) -> str:
    return (
        f"{name!r} has more than {_MAX_PIXELS // 10**6} megapixels and was not decoded: "
        "choose a PNG that the studio saved."
    )


def _parse_origin(name: str, chunk: Any) -> PictureOrigin:
    if chunk is None:
        raise ValueError(
            f"{name!r} does not contain the settings it was drawn with: choose a PNG that the studio saved."
        )
    try:
        values = files.from_json(str(chunk))
        seeds = tuple(int(seed) for seed in values["seeds"])
        settings = PromptSettings(
            str(values["prompt"]), str(values["concept"]), seeds, int(values["steps"])
        )
        return PictureOrigin(settings, str(values.get("model", ""))[:80])
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise ValueError(
            f"{name!r} is damaged: its settings cannot be read. Draw and save the picture again."
        ) from error


def _check_bytes(path: Path, name: str) -> None:
    size = path.stat().st_size
    if size == 0:
        raise ValueError(f"{name!r} is empty (0 bytes): upload it again.")
    if size > MAX_BYTES:
        raise ValueError(
            f"{name!r} has {size / 2**20:.0f} MiB, and at most {MAX_BYTES // 2**20} are allowed: choose a smaller file."
        )
