"""The error tree.

OverpaintError
├── UnsupportedModel (also a ValueError)   the model's layout is not one that overpaint knows
├── UnknownSite (also a ValueError)        no such place in this model
└── MissingExtra (also an ImportError)     an optional dependency is not installed
"""

__all__ = ["MissingExtra", "OverpaintError", "UnknownSite", "UnsupportedModel"]


class OverpaintError(Exception):
    """Root of the errors that a caller may want to catch."""


class UnsupportedModel(OverpaintError, ValueError):
    """The model's layout, file or state is not one that overpaint can work on."""


class UnknownSite(OverpaintError, ValueError):
    """A site that the model does not have."""


class MissingExtra(OverpaintError, ImportError):
    """An optional dependency that is not installed."""
