"""Where each place of one picture lies in another: dense correspondence by diffusion, with an uncertainty."""

from overpaint.match.denoise import Config
from overpaint.match.dense import Match, dense
from overpaint.match.matcher import Matcher

__all__ = ["Config", "Match", "Matcher", "dense"]
