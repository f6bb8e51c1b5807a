"""Load a text-to-image model, find its sites, record and patch their outputs, and generate pictures."""

from overpaint.model.loading import load
from overpaint.model.sites import Site
from overpaint.model.text_encoding import text_features
from overpaint.model.text_to_image import TextToImage

__all__ = ["Site", "TextToImage", "load", "text_features"]
