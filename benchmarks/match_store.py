"""Errors that `quality_match` measured, stored between runs as long as the code and weights do not change."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from overpaint import files

__all__ = ["Origin", "Store", "card_of", "code", "fingerprint"]

Row = dict[str, float]


class Origin(NamedTuple):
    """Origin of a pair: its photograph, and the family of its warp, empty if it is not of one family."""

    photo: str
    family: str


class Store:
    """Errors by set, method and pair, on disk.

    Args:
        folder: Folder for the errors of one version of the pairs; created if it does not exist.
        mark: Returns the fingerprint of the code and weights of a method; errors with another fingerprint are ignored.
    """

    def __init__(self, folder: Path, mark: Callable[[str], str]) -> None:
        self.folder, self.mark = folder, mark
        self.rows: dict[tuple[str, str], dict[int, Row]] = {}
        self.origins: dict[str, dict[int, Origin]] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def load(self, name: str, method: str) -> dict[int, Row]:
        """Return the stored errors of a method on a set."""
        key = (name, method)
        if key not in self.rows:
            self.rows[key] = {}
            if (path := self._path(*key)).exists():
                for index, (photo, family, row) in json.loads(path.read_text()).items():
                    self.rows[key][int(index)] = row
                    self.origins.setdefault(name, {})[int(index)] = Origin(photo, family)
        return self.rows[key]

    def add(self, name: str, index: int, origin: Origin, errors: Mapping[str, Row]) -> None:
        """Store a pair's errors by method, in memory and on disk."""
        origins = self.origins.setdefault(name, {})
        origins[index] = origin
        for method, row in errors.items():
            self.load(name, method)[index] = row
            rows = {i: (*origins[i], r) for i, r in self.rows[name, method].items()}
            files.write_text(self._path(name, method), json.dumps(rows))

    def _path(self, name: str, method: str) -> Path:
        plain = "".join(c if c.isalnum() else "-" for c in f"{name}--{method}")
        return self.folder / f"{plain}-{self.mark(method)}.json"


def code(*paths: Path) -> str:
    """Return a short hash of the contents of files."""
    return hashlib.sha256(b"".join(p.read_bytes() for p in paths)).hexdigest()[:12]


def fingerprint(folder: Path) -> str:
    """Return a short hash of the matcher in a folder."""
    return code(*sorted(folder.glob("*.safetensors")), folder / "config.json")


def card_of(folder: Path) -> dict[str, Any]:
    """Return the matcher's fingerprint, and the seed and steps of its training, `None` without a card."""
    path = folder / "card.json"
    card = json.loads(path.read_text()) if path.is_file() else {}
    steps = {stage: values.get("steps") for stage, values in card.get("stages", {}).items()}
    return {
        "fingerprint": fingerprint(folder),
        "seed": card.get("seed"),
        "steps": steps or None,
        "trained_on": card.get("hardware"),
    }
