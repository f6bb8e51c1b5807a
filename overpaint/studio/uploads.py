"""What users send and take away: change files and pictures. Nothing that they name or hold is trusted.

Names are shown and offered for download, never used as a path. A picture's size is read from its head before a pixel is
decoded. Change files are safetensors, checked by checksum and structure before anything is made of them; whether they
fit the model is checked by applying them to a private copy.
"""

import json
import os
import re
import unicodedata
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin, UnidentifiedImageError

from overpaint.edit import Change
from overpaint.model import TextToImage
from overpaint.studio.model_copy import private
from overpaint.studio.tasks import Question

__all__ = [
    "LARGEST", "Origin", "model_name", "read_change", "read_picture", "safe_name", "shown_name", "write_change",
    "write_picture",
]  # fmt: skip

LARGEST = 256 * 2**20  # bytes of an upload
_PIXELS = 4096 * 4096
_CHUNK = "overpaint"  # name of the text chunk of a PNG that holds how it was drawn


@dataclass(frozen=True)
class Origin:
    """How a picture of the studio came to be: what was asked, and of which model; `""` if it does not say."""

    question: Question
    model: str = ""


def safe_name(text: str, *, otherwise: str = "change") -> str:
    """Return a file name of letters, digits and dashes made from any text: no folder, no dot, 1 to 60 characters."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:60].strip("-") or otherwise


def shown_name(path: str | Path) -> str:
    """Return the last part of a path, without control characters, cut to 80 characters; not escaped."""
    last = re.split(r"[\\/]", str(path))[-1]
    clean = "".join(c for c in last if unicodedata.category(c)[0] != "C").strip() or "file"
    return clean if len(clean) <= 80 else f"{clean[:76]}..."


def model_name(model: str) -> str:
    """Return what a model is called in a file that others may see: of a folder its last part alone."""
    return shown_name(Path(model).resolve()) if Path(model).is_dir() else model


def read_change(path: str | Path, model: TextToImage) -> Change:
    """Return the change of an uploaded file, if it fits `model`.

    Raises:
        ValueError: It is no change file, damaged, too large, or made for another model.
        OSError: It cannot be read.
    """
    path = Path(path)
    name = shown_name(path)
    _check_size(path, name)
    try:
        change = Change.load(path)
        private(model, change)
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{name!r} was not opened: {str(error).replace(str(path), name)}"
        ) from error
    return change


def write_change(change: Change, folder: Path, name: str) -> Path:
    """Write a change under a safe name and return its path; an older file of that name is replaced at once.

    Raises:
        OSError: The folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{safe_name(name)}.safetensors"
    change.save(path)
    return path


def write_picture(image: Image.Image, question: Question, model: str, path: Path) -> Path:
    """Write a PNG that says how it was drawn, beside its place and then renamed; `read_picture` reads that again."""
    told = {
        "model": model_name(model),
        "prompt": question.prompt,
        "concept": question.concept,
        "seeds": question.seeds,
        "steps": question.steps,
    }
    info = PngImagePlugin.PngInfo()
    info.add_itxt(_CHUNK, json.dumps(told, ensure_ascii=False))
    beside = path.with_name(f".{path.name}.part")
    image.save(beside, format="PNG", pnginfo=info)
    os.replace(beside, path)
    return path


def read_picture(path: str | Path) -> Origin:
    """Return how an uploaded picture of the studio was drawn; its pixels are never decoded.

    Raises:
        ValueError: It is no picture, too large, or not one of the studio.
        OSError: It cannot be read.
    """
    path = Path(path)
    name = shown_name(path)
    _check_size(path, name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=("PNG",)) as image:
                width, height = image.size
                told: Any = image.info.get(_CHUNK)  # chunks before the pixels
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(_too_many_pixels(name)) from error
    except (UnidentifiedImageError, ValueError, SyntaxError, OSError) as error:
        raise ValueError(
            f"{name!r} is no picture that can be read: send a PNG that the studio drew."
        ) from error
    if width * height > _PIXELS:
        raise ValueError(_too_many_pixels(name))
    return _origin(name, told)


def _too_many_pixels(name: str) -> str:
    return f"{name!r} has more than {_PIXELS // 10**6} megapixels and was not decoded: send a PNG that the studio drew."


def _origin(name: str, told: Any) -> Origin:
    if told is None:
        raise ValueError(
            f"{name!r} does not say how it was drawn: send a PNG that was downloaded from the studio."
        )
    try:
        facts = json.loads(str(told))
        seeds = tuple(int(seed) for seed in facts["seeds"])
        asked = Question(str(facts["prompt"]), str(facts["concept"]), seeds, int(facts["steps"]))
        return Origin(asked, str(facts.get("model", ""))[:80])
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise ValueError(
            f"{name!r} is damaged: what it says of how it was drawn cannot be read. Draw it again."
        ) from error


def _check_size(path: Path, name: str) -> None:
    size = path.stat().st_size
    if size == 0:
        raise ValueError(f"{name!r} is empty (0 bytes): send it again.")
    if size > LARGEST:
        raise ValueError(
            f"{name!r} has {size / 2**20:.0f} MiB and at most {LARGEST // 2**20} are read: send a smaller one."
        )
