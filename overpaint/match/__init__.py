"""Where each place of one picture lies in another: dense correspondence by diffusion, with an uncertainty."""

from overpaint.match.config import Matcher
from overpaint.match.denoiser import Config
from overpaint.match.matching import Match, dense

__all__ = ["Config", "Match", "Matcher", "dense"]
