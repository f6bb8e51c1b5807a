"""Load a saved JSON file, with one error message for any damage."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from overpaint.files import from_json

__all__ = ["load_json"]

Parsed = TypeVar("Parsed")


def load_json(path: Path, parse: Callable[[Any], Parsed], *, remedy: str) -> Parsed:
    """Return `parse` of the content of a JSON file.

    Args:
        path: The file.
        parse: Called with the content; may raise ValueError, KeyError, TypeError or AttributeError.
        remedy: A sentence that says how to get an undamaged file; the end of the error message.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged.
    """
    content = path.read_bytes()
    try:
        return parse(from_json(content))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(
            f"{str(path)!r} is damaged ({type(error).__name__}: {error}). {remedy}"
        ) from error
