"""The error tree, and the form of lists in messages.

OverpaintError
├── UnsupportedModel (also a ValueError)   the model's layout is not supported
├── UnknownSite (also a ValueError)        the model has no such site
└── MissingExtra (also an ImportError)     an optional dependency is not installed
"""

from collections.abc import Iterable

__all__ = ["MissingExtra", "OverpaintError", "UnknownSite", "UnsupportedModel", "listed"]


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
