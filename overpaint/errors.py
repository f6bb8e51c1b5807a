"""The error tree, the warning of cut prompts, the form of lists in messages, and checks of arguments for all rooms.

OverpaintError
├── UnsupportedModel (also a ValueError)   the model's layout is not supported
├── UnknownSite (also a ValueError)        the model has no such site
└── MissingExtra (also an ImportError)     an optional dependency is not installed
"""

import operator
from collections.abc import Collection, Iterable, Mapping
from dataclasses import fields
from typing import Any, cast

__all__ = [
    "LARGEST_SEED",
    "CutPromptWarning",
    "MissingExtra",
    "OverpaintError",
    "UnknownSite",
    "UnsupportedModel",
    "check_one_text",
    "check_seed",
    "check_settings",
    "check_texts",
    "later_seed",
    "listed",
]

# The largest integer of 64 bits with a sign, which torch and Parquet files take.
LARGEST_SEED = 2**63 - 1


class OverpaintError(Exception):
    """Base class of the package's own errors."""


class UnsupportedModel(OverpaintError, ValueError):
    """The layout, files or state of a model are not supported."""


class UnknownSite(OverpaintError, ValueError):
    """The model has no site of this name."""


class MissingExtra(OverpaintError, ImportError):
    """An optional dependency is not installed."""


class CutPromptWarning(UserWarning):
    """A prompt is longer than a text encoder reads, so that its last words have no effect."""


def listed(names: Iterable[object], *, limit: int = 10) -> str:
    """Return the first `limit` names for a message, and the number of the others; `"none"` without names."""
    texts = [str(name) for name in names]
    more = len(texts) - limit
    return (", ".join(texts[:limit]) or "none") + (f" and {more} more" if more > 0 else "")


def check_one_text(value: Any, name: str, remedy: str) -> None:
    """Raise unless `value` is one text.

    Args:
        value: The argument.
        name: What it is, for the message.
        remedy: What to do if there are several texts.

    Raises:
        TypeError: It is a list or anything else.
    """
    if not isinstance(value, str):
        raise TypeError(f"{name} must be one text, got {value!r}: {remedy}.")


def check_settings(settings: Any, largest: Mapping[str, int], remedy: str) -> None:
    """Raise unless sizes are whole numbers in range and switches are `True` or `False`.

    Args:
        settings: A dataclass; its fields of the type `bool` are switches.
        largest: The largest value of each size, or of each entry of a tuple of one to eight; the smallest is 1.
        remedy: What to do about a size out of range.

    Raises:
        ValueError: A size is out of range or no whole number, or a switch is something else.
    """
    for name, most in largest.items():
        value = getattr(settings, name)
        sizes: tuple[Any, ...] = cast(Any, value) if isinstance(value, tuple) else (value,)
        if not 1 <= len(sizes) <= 8 or not all(type(n) is int and 1 <= n <= most for n in sizes):
            raise ValueError(f"`{name}` must be 1 to {most}, got {value!r}: {remedy}.")
    for entry in fields(settings):
        value = getattr(settings, entry.name)
        if entry.type is bool and type(value) is not bool:
            raise ValueError(
                f"`{entry.name}` must be true or false, got {value!r}: give one of them."
            )


def check_texts(values: Any, name: str) -> None:
    """Raise unless `values` is a list, tuple or other collection of texts.

    Raises:
        TypeError: It is one text, or holds something else than texts.
    """
    texts = cast(Collection[Any], values) if isinstance(values, Collection) else ()
    is_list = isinstance(values, Collection) and not isinstance(values, str)
    if not is_list or not all(isinstance(text, str) for text in texts):
        raise TypeError(
            f"`{name}` must be a list of texts, got {values!r}: write ['...'] around a single one."
        )


def check_seed(seed: Any, name: str = "seed", *, bits: int = 63) -> int:
    """Return `seed` as an integer.

    Args:
        seed: An integer of any type.
        name: Name of the argument, for the message.
        bits: Number of bits of the largest seed.

    Raises:
        ValueError: It is not an integer from 0 to 2**bits - 1.
    """
    try:
        number = operator.index(seed)
    except TypeError:
        number = -1
    if not 0 <= number < 2**bits:
        raise ValueError(f"`{name}` must be an integer from 0 to 2**{bits} - 1, got {seed!r}.")
    return number


def later_seed(seed: int, steps: int) -> int:
    """Return the seed that follows after `steps` seeds; 0 follows the largest one."""
    return (int(seed) + steps) % (LARGEST_SEED + 1)
