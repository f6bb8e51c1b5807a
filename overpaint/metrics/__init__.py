"""Numbers about pictures, on plain arrays: intervals, scores, distances, and what each one means."""

from overpaint.metrics.cards import MetricCard, card, cards
from overpaint.metrics.clip import CLIP_SCALES, clip_accuracy, clip_score
from overpaint.metrics.distances import Distance, TwoSample, fid, kid, kid_test
from overpaint.metrics.images import perceptual, psnr, ssim
from overpaint.metrics.intervals import Interval, bootstrap, paired, spearman

__all__ = [
    "CLIP_SCALES",
    "Distance",
    "Interval",
    "MetricCard",
    "TwoSample",
    "bootstrap",
    "card",
    "cards",
    "clip_accuracy",
    "clip_score",
    "fid",
    "kid",
    "kid_test",
    "paired",
    "perceptual",
    "psnr",
    "spearman",
    "ssim",
]
