"""What did the change do? Judged by labels on questions of ours, or measured on an evaluation set of anyone's."""

from overpaint.evaluate.metrics_on_sets import METRICS, Eyes, check_eyes, measure
from overpaint.evaluate.recognition import Classifier, compare, score
from overpaint.evaluate.results import Comparison, Paired, Scores
from overpaint.evaluate.set_results import Measure, Measures

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
