"""Overpaint: find where an image model keeps what it knows, and paint over it."""

from overpaint.errors import MissingExtra, OverpaintError, UnknownSite, UnsupportedModel
from overpaint.model import TextToImage, load
from overpaint.pictures import Pictures
from overpaint.sites import Site

__version__ = "0.1.0"
__all__ = ["MissingExtra", "OverpaintError", "Pictures", "Site", "TextToImage", "UnknownSite", "UnsupportedModel", "load"]
