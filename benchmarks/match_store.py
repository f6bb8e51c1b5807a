"""The errors that `quality_match` measured, kept from one run to the next and no longer than what made them stays."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Origin", "Store", "card_of", "code", "fingerprint"]

Row = dict[str, float]


class Origin(NamedTuple):
    """Where a pair comes from: its photograph, and the family of its warp, empty where that is not one."""

    photo: str
    family: str


class Store:
    """Errors by set, method and pair, on disk.

    Args:
        folder: Of the errors of these very pairs; made where it is missing.
        mark: Returns a short name of what makes a method's errors: errors under another one are not read.
    """

    def __init__(self, folder: Path, mark: Callable[[str], str]) -> None:
        self.folder, self.mark = folder, mark
        self.rows: dict[tuple[str, str], dict[int, Row]] = {}
        self.origins: dict[str, dict[int, Origin]] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def load(self, name: str, method: str) -> dict[int, Row]:
        """Return the known errors of a method on a set."""
        key = (name, method)
        if key not in self.rows:
            self.rows[key] = {}
            if (path := self._path(*key)).exists():
                for index, (photo, family, row) in json.loads(path.read_text()).items():
                    self.rows[key][int(index)] = row
                    self.origins.setdefault(name, {})[int(index)] = Origin(photo, family)
        return self.rows[key]

    def add(self, name: str, index: int, origin: Origin, found: Mapping[str, Row]) -> None:
        """Keep a pair's errors by method, in memory and on disk."""
        origins = self.origins.setdefault(name, {})
        origins[index] = origin
        for method, row in found.items():
            self.load(name, method)[index] = row
            told = {i: (*origins[i], r) for i, r in self.rows[name, method].items()}
            path = self._path(name, method)
            beside = path.with_suffix(".part")
            beside.write_text(json.dumps(told))
            os.replace(beside, path)

    def _path(self, name: str, method: str) -> Path:
        plain = "".join(c if c.isalnum() else "-" for c in f"{name}--{method}")
        return self.folder / f"{plain}-{self.mark(method)}.json"


def code(*paths: Path) -> str:
    """Return a short name for what the files hold."""
    return hashlib.sha256(b"".join(p.read_bytes() for p in paths)).hexdigest()[:12]


def fingerprint(folder: Path) -> str:
    """Return a short name for the matcher in a folder."""
    return code(*sorted(folder.glob("*.safetensors")), folder / "config.json")


def card_of(folder: Path) -> dict[str, Any]:
    """Return the matcher's fingerprint, and the seed and steps of its training; None where it has no card."""
    path = folder / "card.json"
    card = json.loads(path.read_text()) if path.is_file() else {}
    steps = {stage: told.get("steps") for stage, told in card.get("stages", {}).items()}
    return {
        "fingerprint": fingerprint(folder),
        "seed": card.get("seed"),
        "steps": steps or None,
        "trained_on": card.get("hardware"),
    }
