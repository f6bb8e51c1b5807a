"""What did the change do? Judged by labels on questions of ours, or measured on an evaluation set of anyone's."""

from overpaint.evaluate.judged import Classifier, compare, score
from overpaint.evaluate.measured import METRICS, Eyes, check_eyes, measure
from overpaint.evaluate.measures import Measure, Measures
from overpaint.scores import Comparison, Paired, Scores

__all__ = [
    "METRICS",
    "Classifier",
    "Comparison",
    "Eyes",
    "Measure",
    "Measures",
    "Paired",
    "Scores",
    "check_eyes",
    "compare",
    "measure",
    "score",
]
