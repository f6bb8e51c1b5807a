"""Measure a change: by recognised labels, by metrics on an evaluation set, or by a search for prompts that undo it."""

from overpaint.evaluate.measures import Measure, Measures
from overpaint.evaluate.metrics_on_sets import METRICS, measure
from overpaint.evaluate.recognition import compare, score
from overpaint.evaluate.results import Comparison, Paired, Scores

__all__ = [
    "METRICS",
    "Comparison",
    "Measure",
    "Measures",
    "Paired",
    "Scores",
    "compare",
    "measure",
    "score",
]
