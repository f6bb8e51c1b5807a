"""Predicted drift compared with the loss that the scorer measured."""

from collections.abc import Mapping, Sequence

from overpaint.evaluate.predicted_drift import PredictedDrift
from overpaint.evaluate.results import Comparison
from overpaint.images.charts import Point
from overpaint.metrics import spearman

__all__ = ["points", "rank_correlation"]


def points(comparison: Comparison, drift: PredictedDrift) -> dict[str, tuple[Point, ...]]:
    """Return, for each method, the predicted drift and the measured loss of each other concept, in points."""
    series: dict[str, tuple[Point, ...]] = {}
    for name, by_concept in drift.items():
        others = comparison.scores[name].others if name in comparison.scores else {}
        rows = [
            Point(by_concept[c], -100 * p.change.mean, -100 * p.change.high, -100 * p.change.low, c)
            for c, p in others.items()
            if c in by_concept and p.change.n
        ]
        if rows:
            series[name] = tuple(rows)
    return series


def rank_correlation(series: Mapping[str, Sequence[Point]]) -> float:
    """Return Spearman's correlation of predicted drift and loss over all points; NaN if one of them is constant."""
    rows = [point for points in series.values() for point in points]
    return spearman([p.x for p in rows], [p.y for p in rows])
