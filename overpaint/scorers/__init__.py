"""Scorers: models that turn pictures into scores."""

from overpaint.scorers.clip import Clip
from overpaint.scorers.judge import Judge, load
from overpaint.scorers.protocols import Classifier, FeatureScorer, Scorer, check_size

__all__ = ["Classifier", "Clip", "FeatureScorer", "Judge", "Scorer", "check_size", "load"]
