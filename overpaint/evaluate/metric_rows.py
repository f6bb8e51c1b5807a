"""Metrics of the pictures of two or three runs, as rows of role, metric, before, after and change."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from overpaint import metrics
from overpaint.evaluate.measures import Measure
from overpaint.metrics import Interval
from overpaint.probes import Case
from overpaint.scorers.protocols import FeatureScorer

__all__ = [
    "EMPTY", "METRICS", "PAIR_METRICS", "SET_METRICS", "PictureRun", "distance_of_pairs", "rows_of_role",
    "single",
]  # fmt: skip

METRICS = (
    *metrics.CLIP_SCALES, "clip_accuracy", "judge_accuracy", "kid", "kid_p", "fid", "psnr", "ssim", "perceptual",
    "empty_drift",
)  # fmt: skip
SHARES = ("clip_accuracy", "judge_accuracy")  # means of values that are 0 or 1
SET_METRICS, PAIR_METRICS = ("kid", "kid_p", "fid"), ("psnr", "ssim", "perceptual")
EMPTY = Interval(float("nan"), float("nan"), float("nan"), 0)
_MAXIMUM_PSNR = 100.0  # dB, for equal pictures


@dataclass
class PictureRun:
    """Measurements of the pictures of one run, in the order of the cases."""

    features: Tensor  # (N, D)
    correct: list[bool | None] = field(default_factory=list)  # None without a label for the case
    images: list[Tensor] = field(default_factory=list)  # batches, if pictures are compared
    distances: dict[str, list[float]] = field(default_factory=dict)  # to the run before, by metric


def rows_of_role(
    role: str,
    cases: Sequence[Case],
    chosen: Collection[str],
    scorer: FeatureScorer,
    runs: tuple[PictureRun, PictureRun],
    other_seeds: PictureRun | None,
) -> list[Measure]:
    """Return the rows of one role, in the order of `METRICS`.

    Args:
        role: The role.
        cases: All cases that were drawn.
        chosen: Which of `METRICS`.
        scorer: Returns the features of texts.
        runs: The run before and the run after the edit.
        other_seeds: The unedited model's run from other seeds; needed by `SET_METRICS`.
    """
    index = [i for i, case in enumerate(cases) if case.role == role]
    prompts = [cases[i].prompt for i in index]
    rows: list[Measure] = []
    for metric in (m for m in METRICS if m in chosen and m != "empty_drift"):
        if metric in PAIR_METRICS:
            values = [runs[1].distances[metric][i] for i in index]
            after = metrics.bootstrap(values, groups=prompts)
            rows.append(Measure(role, metric, EMPTY, after, EMPTY))
        elif metric in SET_METRICS and other_seeds is not None:
            features = tuple(run.features[index] for run in runs)
            rows.append(_set_row(role, metric, features, other_seeds.features[index], prompts))
        else:
            rows += _score_row(cases, index, role, metric, scorer, runs)
    return rows


def distance_of_pairs(
    metric: str, scorer: FeatureScorer, before: Tensor, after: Tensor
) -> list[float]:
    """Return the distance, one of `PAIR_METRICS`, between each of `before` and `after`, both (B, 3, H, W)."""
    if metric == "perceptual":
        return metrics.perceptual(scorer.layers(before), scorer.layers(after)).tolist()
    if metric == "ssim":
        return metrics.ssim(before, after).tolist()
    return metrics.psnr(before, after).clamp(max=_MAXIMUM_PSNR).tolist()


def single(value: float, n: int) -> Interval:
    """Return a value without bounds."""
    return Interval(value, float("nan"), float("nan"), n)


def _set_row(
    role: str, metric: str, runs: Sequence[Tensor], reference: Tensor, prompts: list[str]
) -> Measure:
    """Return the distances of the features before and after from those of other seeds."""
    # a kernel distance needs two prompts, FID two pictures
    if len(prompts if metric == "fid" else set(prompts)) < 2:
        return Measure(role, metric, EMPTY, EMPTY, EMPTY)
    groups = (prompts, prompts)
    intervals: list[Interval] = []
    for features in runs:
        if metric == "kid_p":
            test = metrics.kid_test(_scaled(features), _scaled(reference), groups=groups)
            intervals.append(single(test.p, len(prompts)))
            continue
        distance = (
            metrics.fid(features, reference)
            if metric == "fid"
            else metrics.kid(_scaled(features), _scaled(reference), groups=groups)
        )
        intervals.append(Interval(distance.value, distance.low, distance.high, len(prompts)))
    return Measure(role, metric, intervals[0], intervals[1], EMPTY)


def _scaled(features: Tensor) -> Tensor:
    """Return unit features scaled by sqrt(D), so that KID's kernel (x·y / D + 1)^3 becomes (cos + 1)^3."""
    return features * features.shape[1] ** 0.5


def _score_row(
    cases: Sequence[Case],
    index: Sequence[int],
    role: str,
    metric: str,
    scorer: FeatureScorer,
    runs: tuple[PictureRun, PictureRun],
) -> list[Measure]:
    """Return the row of a score over the cases that have the label or text it needs; no row if none has."""
    if metric == "judge_accuracy":
        index = [i for i in index if runs[0].correct[i] is not None]
    if metric == "clip_accuracy":
        index = [i for i in index if cases[i].new]
    if not index:
        return []
    before, after = (_values(cases, index, metric, scorer, run) for run in runs)
    groups = [cases[i].prompt for i in index]
    is_share = metric in SHARES
    mean = metrics.share if is_share else metrics.bootstrap
    change = metrics.paired_share if is_share else metrics.paired
    return [
        Measure(
            role,
            metric,
            mean(before, groups=groups),
            mean(after, groups=groups),
            change(before, after, groups=groups),
        )
    ]


def _values(
    cases: Sequence[Case],
    index: Sequence[int],
    metric: str,
    scorer: FeatureScorer,
    run: PictureRun,
) -> list[float]:
    if metric == "judge_accuracy":
        return [float(bool(run.correct[i])) for i in index]
    features = run.features[list(index)]
    if metric == "clip_accuracy":
        old, new = (
            _text_features(scorer, [getattr(cases[i], side) for i in index])
            for side in ("old", "new")
        )
        return metrics.clip_accuracy(features, old, new).float().tolist()
    texts = _text_features(scorer, [cases[i].prompt for i in index])
    return metrics.clip_score(features, texts, scale=metric).tolist()


def _text_features(scorer: FeatureScorer, texts: Sequence[str]) -> Tensor:
    """Return the features of `texts`, each encoded alone: in a batch its padding would depend on the others."""
    known = {text: scorer.text_features([text])[0] for text in dict.fromkeys(texts)}
    return torch.stack([known[text] for text in texts])
