"""Saved results, read with one error for whatever is wrong with them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

__all__ = ["read"]

Found = TypeVar("Found")


def read(path: Path, make: Callable[[Any], Found], *, again: str) -> Found | None:
    """Return what `make` makes of a JSON file; `None` where there is no such file.

    Args:
        path: The file.
        make: Given what the file holds.
        again: How to get a whole one, as the end of the error.

    Raises:
        ValueError: The file is damaged.
    """
    if not path.is_file():
        return None
    try:
        return make(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{str(path)!r} is damaged ({type(error).__name__}: {error}). {again}"
        ) from error
