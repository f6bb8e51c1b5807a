"""Dense correspondence of two pictures by diffusion, with an uncertainty."""

from overpaint.match.config import Config
from overpaint.match.matcher import Matcher
from overpaint.match.matching import Match, dense

__all__ = ["Config", "Match", "Matcher", "dense"]
