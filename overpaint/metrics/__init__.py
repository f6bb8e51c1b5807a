"""Numbers about pictures, on plain arrays: intervals, scores, distances, and what each one means."""

from overpaint.metrics.distances import Distance, TwoSample, fid, kid, kid_test
from overpaint.metrics.intervals import Interval, bootstrap, paired, spearman

__all__ = [
    "Distance",
    "Interval",
    "TwoSample",
    "bootstrap",
    "fid",
    "kid",
    "kid_test",
    "paired",
    "spearman",
]
