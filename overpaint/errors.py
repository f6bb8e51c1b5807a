"""The error tree, the form of lists in messages, and the checks of arguments that all rooms make.

OverpaintError
├── UnsupportedModel (also a ValueError)   the model's layout is not supported
├── UnknownSite (also a ValueError)        the model has no such site
└── MissingExtra (also an ImportError)     an optional dependency is not installed
"""

import operator
from collections.abc import Iterable
from typing import Any

__all__ = [
    "LARGEST_SEED",
    "MissingExtra",
    "OverpaintError",
    "UnknownSite",
    "UnsupportedModel",
    "check_seed",
    "later_seed",
    "listed",
]

LARGEST_SEED = (
    2**63 - 1
)  # the largest integer of 64 bits with a sign, which torch and Parquet files take


class OverpaintError(Exception):
    """Base class of the package's own errors."""


class UnsupportedModel(OverpaintError, ValueError):
    """The layout, files or state of a model are not supported."""


class UnknownSite(OverpaintError, ValueError):
    """The model has no site of this name."""


class MissingExtra(OverpaintError, ImportError):
    """An optional dependency is not installed."""


def listed(names: Iterable[object], *, limit: int = 10) -> str:
    """Return the first `limit` names for a message, and the number of the others; `"none"` without names."""
    texts = [str(name) for name in names]
    more = len(texts) - limit
    return (", ".join(texts[:limit]) or "none") + (f" and {more} more" if more > 0 else "")


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
