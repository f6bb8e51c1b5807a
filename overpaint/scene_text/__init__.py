"""Rewrite the lettering in a picture, by diffusion from two encoders (DiffSTE)."""

from overpaint.scene_text.config import Config
from overpaint.scene_text.diffusion import Guidance
from overpaint.scene_text.finding import FoundText, find_text
from overpaint.scene_text.lettering import Lettering
from overpaint.scene_text.rewriting import Rewriting, rewrite, rewrite_samples

__all__ = [
    "Config",
    "FoundText",
    "Guidance",
    "Lettering",
    "Rewriting",
    "find_text",
    "rewrite",
    "rewrite_samples",
]
