"""The error tree.

OverpaintError
├── UnsupportedModel (also a ValueError)   the model's layout is not supported
├── UnknownSite (also a ValueError)        the model has no such site
└── MissingExtra (also an ImportError)     an optional dependency is not installed
"""

__all__ = ["MissingExtra", "OverpaintError", "UnknownSite", "UnsupportedModel"]


class OverpaintError(Exception):
    """Base class of the package's own errors."""


class UnsupportedModel(OverpaintError, ValueError):
    """The layout, files or state of a model are not supported."""


class UnknownSite(OverpaintError, ValueError):
    """The model has no site of this name."""


class MissingExtra(OverpaintError, ImportError):
    """An optional dependency is not installed."""
