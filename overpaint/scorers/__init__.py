"""Scorers: models that turn pictures into scores."""

from overpaint.scorers.clip import Clip
from overpaint.scorers.judge import Judge, load

__all__ = ["Clip", "Judge", "load"]
