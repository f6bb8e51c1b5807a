"""Folders of the small trained models that ship with the package.

The module `builders` builds tiny models with random weights.

>>> from overpaint import zoo
>>> zoo.folder("icons").name
'icons'
"""

from pathlib import Path

__all__ = ["folder", "names"]

_WEIGHTS = Path(__file__).parent / "weights"


def names() -> tuple[str, ...]:
    """Return the names of the models that ship with the package, in alphabetical order."""
    return tuple(sorted({path.parent.name for path in _WEIGHTS.glob("*/*.json")}))


def folder(name: str) -> Path:
    """Return the folder of the shipped model `name`, which does not exist if there is no such model."""
    return _WEIGHTS / name
