"""Written lines and the words read in them, stored between runs as long as code, weights and cases do not change."""

import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from scene_text_crops import Crop, boxes, images

from overpaint import files

__all__ = ["Reader", "Store", "code", "fingerprint"]


class Reader(Protocol):
    """An OCR engine."""

    name: str

    def read_boxes(
        self, images: Any, boxes: list[tuple[int, int, int, int]], *, margin: int = 3
    ) -> list[str]:
        """Return the text in a box of each picture."""
        ...


class Store:
    """Lines and readings on disk.

    Args:
        folder: Folder of one list of cases and one version of the code; created if it does not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        files.remove_drafts_in(folder)

    def lines(self, key: str, write: Callable[[], np.ndarray]) -> np.ndarray:
        """Return stored lines, or those of `write`, which are then stored; RGB uint8 (N, H, W, 3)."""
        path = self.folder / f"{_plain(key)}.npy"
        if path.is_file():
            return np.load(path)
        lines = write()
        with files.atomic(path) as draft, draft.open("wb") as file:
            np.save(file, lines)
        return lines

    def readings(
        self, key: str, reader: Reader, lines: np.ndarray, drawn: Sequence[Crop]
    ) -> list[str]:
        """Return the words that an engine reads in the regions of lines, stored or read now."""
        path = self.folder / f"{_plain(f'{key}--{reader.name}')}.json"
        if path.is_file():
            return list(files.from_json(path.read_bytes()))
        texts = reader.read_boxes(images(list(lines)), boxes(drawn), margin=1)
        files.write_json(path, texts)
        return texts

    def values(self, key: str, compute: Callable[[], Any]) -> Any:
        """Return stored values for JSON, or those of `compute`, which are then stored."""
        path = self.folder / f"{_plain(key)}.json"
        if path.is_file():
            return files.from_json(path.read_bytes())
        values = compute()
        files.write_json(path, values)
        return values


def code(*paths: Path) -> str:
    """Return a short hash of the contents of files."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:12]


@functools.cache
def fingerprint(folder: Path) -> str:
    """Return a short hash of the weights and configuration in a folder."""
    return code(folder / "model.safetensors", folder / "config.json")


def _plain(text: str) -> str:
    return "".join(c if c.isalnum() or c in ".-" else "-" for c in text)
