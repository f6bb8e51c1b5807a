"""Rewrite the lettering in a picture, by diffusion from two encoders (DiffSTE)."""

from overpaint.scene_text.config import Config
from overpaint.scene_text.diffusion import Guidance
from overpaint.scene_text.lettering import Lettering
from overpaint.scene_text.rewriting import rewrite

__all__ = ["Config", "Guidance", "Lettering", "rewrite"]
