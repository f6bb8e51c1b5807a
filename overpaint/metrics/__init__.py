"""Metrics of pictures and flows on plain arrays: intervals, scores, distances, and a description of each metric."""

from overpaint.metrics.clip import CLIP_SCALES, clip_accuracy, clip_score
from overpaint.metrics.distances import (
    Distance,
    TwoSample,
    fid,
    kid,
    kid_test,
)
from overpaint.metrics.images import perceptual, psnr, ssim
from overpaint.metrics.intervals import Interval, bootstrap, paired, paired_share, share, spearman
from overpaint.metrics.matching import ause, epe, pck
from overpaint.metrics.metric_cards import MetricCard, card, cards

__all__ = [
    "CLIP_SCALES",
    "Distance",
    "Interval",
    "MetricCard",
    "TwoSample",
    "ause",
    "bootstrap",
    "card",
    "cards",
    "clip_accuracy",
    "clip_score",
    "epe",
    "fid",
    "kid",
    "kid_test",
    "paired",
    "paired_share",
    "pck",
    "perceptual",
    "psnr",
    "share",
    "spearman",
    "ssim",
]
