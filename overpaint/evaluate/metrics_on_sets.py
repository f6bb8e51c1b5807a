"""Every metric on an evaluation set, before and after, each under its own name; see `metrics.cards`.

Three runs draw the same prompts: the unedited model, the edited one from the same seeds, and the unedited one from
other seeds. Scores compare the first two picture by picture. Distances of sets compare either with the third: what
stands under `before` is then what a change of seeds alone does, and an edit that leaves its neighbours alone comes no
farther.
"""

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from overpaint import metrics
from overpaint.edit import Change
from overpaint.evaluate.set_results import Measure, Measures
from overpaint.metrics import Interval
from overpaint.model import TextToImage
from overpaint.probes import Case, EvaluationSet, questions

__all__ = ["METRICS", "Eyes", "check_eyes", "empty_drift", "measure"]

METRICS = (
    *metrics.CLIP_SCALES, "clip_accuracy", "judge_accuracy", "kid", "kid_p", "fid", "psnr", "ssim", "perceptual",
    "empty_drift",
)  # fmt: skip
DEFAULT = ("clip_cosine", "clip_accuracy", "judge_accuracy", "kid", "kid_p", "psnr", "empty_drift")
_SETS, _PAIRS = ("kid", "kid_p", "fid"), ("psnr", "ssim", "perceptual")
_NONE = Interval(float("nan"), float("nan"), float("nan"), 0)
_AGAIN = 1_000_000  # from one set of seeds to the other
_REPEAT = 10_000  # from one picture of a prompt to the next
_MOST = 100.0  # dB, for equal pictures

Progress = Callable[[int, int, str], None]


class Eyes(Protocol):
    """What looks at the pictures: a `features.Judge`, or a `trace.clip.Clip` of one's own."""

    name: str

    def image_features(self, images: Tensor) -> Tensor:
        """Return unit features of `images` (B, 3, H, W) in [0, 1], shape (B, D)."""
        ...

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """Return unit features of `prompts`, shape (N, D)."""
        ...

    def layers(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return what each layer makes of `images`, each of shape (B, P, D)."""
        ...


def measure(
    model: TextToImage,
    change: Change,
    cases: EvaluationSet,
    *,
    eyes: Eyes,
    only: Collection[str] | None = None,
    repeats: int = 1,
    steps: int = 16,
    guidance_scale: float | None = None,
    seed: int = 0,
    batch_size: int = 32,
    on_progress: Progress | None = None,
) -> Measures:
    """Measure a change on an evaluation set.

    Args:
        model: The unedited model; left as it was found.
        change: The edit.
        cases: What to draw, and what to look for.
        eyes: Looks at the pictures; its name stands in the protocol as `features`.
        only: Which of `METRICS`; by default the usual ones that `eyes` can tell.
        repeats: Pictures of each case.
        steps: Denoising steps of each picture.
        guidance_scale: By default the model's own.
        seed: Of cases without one of their own; counts up from here.
        batch_size: Pictures made at once.
        on_progress: Told how many pictures are made, of how many, and which.

    Raises:
        ValueError: A metric is unknown or `eyes` cannot tell it, or `eyes` reads pictures of another size.
        MissingExtra: A metric needs a package that is not there.
    """
    began = time.perf_counter()
    chosen = _chosen(only, eyes)
    check_eyes(model, eyes)
    if repeats < 1:
        raise ValueError(
            f"`repeats` must be at least 1, got {repeats}: say how many pictures of each case."
        )
    asked = [case for case in cases.cases for _ in range(repeats)]
    seeds = [
        (seed + i if case.seed is None else case.seed) + _REPEAT * r
        for i, case in enumerate(cases.cases)
        for r in range(repeats)
    ]
    work = _Work(model, eyes, asked, chosen, steps, guidance_scale, batch_size, on_progress)
    runs = 3 if set(chosen) & set(_SETS) else 2
    before = work.run("before", seeds, 0, runs)
    with change.applied(model):
        after = work.run("after", seeds, 1, runs, beside=before)
    again = work.run("other seeds", [s + _AGAIN for s in seeds], 2, runs) if runs == 3 else None
    rows = [
        row
        for role in dict.fromkeys(case.role for case in asked)
        for row in _rows(asked, role, chosen, eyes, before, after, again)
    ]
    if "empty_drift" in chosen:
        drift = empty_drift(model, change)
        rows.append(Measure("model", "empty_drift", _NONE, _single(drift, 1), _NONE))
    scale = model.guidance_scale if guidance_scale is None else guidance_scale
    protocol = {
        **model.protocol(steps=steps, guidance_scale=scale), "features": eyes.name, "set": cases.name,
        "form": cases.form, "cases": len(cases.cases), "repeats": repeats, "seed": seed,
        "interval": "95 % percentile bootstrap over prompts, 2000 resamples (kid: 1000)",
        "kid_p": "1000 splits within prompts", "change_digest": change.digest,
        "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip
    return Measures(cases.name, cases.erase, cases.replace, tuple(rows), protocol)


def empty_drift(model: TextToImage, change: Change | None) -> float:
    """Return the relative movement of the empty prompt's features under `change`."""
    if change is None:
        return 0.0
    before = model.encode([""])
    with change.applied(model):
        after = model.encode([""])
    length = float(before.norm())  # SDXL's empty prompt is zeros
    return float((after - before).norm()) / length if length else 0.0


@dataclass
class _Seen:
    """What one run's pictures were seen to be; rows in the order asked."""

    features: Tensor  # (N, D)
    right: list[bool | None]  # by the judge, None where it knows no such label
    images: list[Tensor]  # batches, kept where pictures are compared
    pairs: dict[str, list[float]]  # distances from the run before


@dataclass(frozen=True)
class _Work:
    """Draws one run after another and looks at it."""

    model: TextToImage
    eyes: Eyes
    asked: Sequence[Case]
    chosen: Collection[str]
    steps: int
    guidance_scale: float | None
    batch_size: int
    on_progress: Progress | None

    def run(
        self,
        name: str,
        seeds: Sequence[int],
        number: int,
        runs: int,
        *,
        beside: _Seen | None = None,
    ) -> _Seen:
        """Draw every case; with `beside`, also measure how far each picture is from that run's."""
        paired = [metric for metric in _PAIRS if metric in self.chosen]
        seen = _Seen(torch.empty(0), [], [], {metric: [] for metric in paired})
        features: list[Tensor] = []
        total = len(self.asked)
        for batch, start in enumerate(range(0, total, self.batch_size)):
            part = self.asked[start : start + self.batch_size]
            images = self.model.generate(
                [case.prompt for case in part], seed=list(seeds[start : start + len(part)]), steps=self.steps,
                guidance_scale=self.guidance_scale, batch_size=self.batch_size,
            ).images.float()  # fmt: skip
            features.append(self.eyes.image_features(images))
            seen.right += self._judged(images, part)
            if paired and number == 0:
                seen.images.append(images)
            if beside is not None:
                for metric in paired:
                    seen.pairs[metric] += self._apart(metric, beside.images[batch], images)
            if self.on_progress is not None:
                self.on_progress(number * total + start + len(part), runs * total, name)
        seen.features = torch.cat(features)
        return seen

    def _judged(self, images: Tensor, part: Sequence[Case]) -> list[bool | None]:
        """Return whether each picture is recognised as the concept that its prompt names."""
        wanted = [_label(case.concept, self.eyes) for case in part]
        found: list[bool | None] = [None] * len(part)
        if "judge_accuracy" not in self.chosen:
            return found
        for kind in dict.fromkeys(label[0] for label in wanted if label):
            judge: Any = self.eyes
            best = judge.classify(images, kind).argmax(1).tolist()
            for i, label in enumerate(wanted):
                if label and label[0] == kind:
                    found[i] = judge.labels[kind][best[i]] == label[1]
        return found

    def _apart(self, metric: str, before: Tensor, after: Tensor) -> list[float]:
        if metric == "perceptual":
            return metrics.perceptual(self.eyes.layers(before), self.eyes.layers(after)).tolist()
        if metric == "ssim":
            return metrics.ssim(before, after).tolist()
        return metrics.psnr(before, after).clamp(max=_MOST).tolist()


def _rows(
    asked: Sequence[Case],
    role: str,
    chosen: Collection[str],
    eyes: Eyes,
    before: _Seen,
    after: _Seen,
    again: _Seen | None,
) -> list[Measure]:
    """Return the rows of one role, in the order of `METRICS`; a metric that none of its cases can tell has none."""
    index = [i for i, case in enumerate(asked) if case.role == role]
    prompts = [asked[i].prompt for i in index]
    rows: list[Measure] = []
    for metric in (m for m in METRICS if m in chosen):
        if metric in _PAIRS:
            values = [after.pairs[metric][i] for i in index]
            rows.append(
                Measure(role, metric, _NONE, metrics.bootstrap(values, groups=prompts), _NONE)
            )
        elif metric in _SETS and again is not None:
            sets = [run.features[index] for run in (before, after, again)]
            rows.append(_distance(role, metric, *sets, prompts=prompts))
        elif metric != "empty_drift":
            rows += _scored(asked, index, role, metric, eyes, before, after)
    return rows


def _distance(
    role: str, metric: str, before: Tensor, after: Tensor, again: Tensor, *, prompts: list[str]
) -> Measure:
    """Return how far the pictures before and after are from those of other seeds."""
    # a kernel distance compares prompts; FID needs no more than pictures
    if len(prompts if metric == "fid" else set(prompts)) < 2:
        return Measure(role, metric, _NONE, _NONE, _NONE)
    found: list[Interval] = []
    for features in (before, after):
        groups = (prompts, prompts)
        if metric == "kid_p":
            p = metrics.kid_test(_long(features), _long(again), groups=groups).p
            found.append(_single(p, len(prompts)))
            continue
        many = (
            metrics.fid(features, again)
            if metric == "fid"
            else metrics.kid(_long(features), _long(again), groups=groups)
        )
        found.append(Interval(many.value, many.low, many.high, len(prompts)))
    return Measure(role, metric, found[0], found[1], _NONE)


def _long(features: Tensor) -> Tensor:
    """Return unit features at the length that KID's kernel expects: (x·y / D + 1)^3 becomes (cos + 1)^3."""
    return features * features.shape[1] ** 0.5


def _single(value: float, n: int) -> Interval:
    """Return a number that has no interval."""
    return Interval(value, float("nan"), float("nan"), n)


def _scored(
    asked: Sequence[Case],
    index: Sequence[int],
    role: str,
    metric: str,
    eyes: Eyes,
    before: _Seen,
    after: _Seen,
) -> list[Measure]:
    """Return a score's row, over the cases that have what it needs."""
    if metric == "judge_accuracy":
        index = [i for i in index if before.right[i] is not None]
    if metric == "clip_accuracy":
        index = [i for i in index if asked[i].new]
    if not index:
        return []
    values = [_values(asked, index, metric, eyes, run) for run in (before, after)]
    groups = [asked[i].prompt for i in index]
    return [
        Measure(
            role,
            metric,
            metrics.bootstrap(values[0], groups=groups),
            metrics.bootstrap(values[1], groups=groups),
            metrics.paired(values[0], values[1], groups=groups),
        )
    ]


def _values(
    asked: Sequence[Case], index: Sequence[int], metric: str, eyes: Eyes, run: _Seen
) -> list[float]:
    if metric == "judge_accuracy":
        return [float(bool(run.right[i])) for i in index]
    seen = run.features[list(index)]
    if metric == "clip_accuracy":
        texts = (_read(eyes, [getattr(asked[i], side) for i in index]) for side in ("old", "new"))
        return metrics.clip_accuracy(seen, *texts).float().tolist()
    said = _read(eyes, [asked[i].prompt for i in index])
    return metrics.clip_score(seen, said, scale=metric).tolist()


def _read(eyes: Eyes, texts: Sequence[str]) -> Tensor:
    """Return the features of `texts`, each read alone: in a batch its padding would depend on the others."""
    known = {text: eyes.text_features([text])[0] for text in dict.fromkeys(texts)}
    return torch.stack([known[text] for text in texts])


def _label(concept: str, eyes: Eyes) -> tuple[str, str] | None:
    labels = getattr(eyes, "labels", None)
    if not labels or not concept:
        return None
    try:
        return questions.parse_concept(concept, labels)
    except ValueError:
        return None


def _chosen(only: Collection[str] | None, eyes: Eyes) -> tuple[str, ...]:
    judge = bool(getattr(eyes, "labels", None))
    if only is None:
        return tuple(m for m in DEFAULT if judge or m != "judge_accuracy")
    for name in only:
        if name not in METRICS:
            raise ValueError(f"unknown metric {name!r}: choose one of {', '.join(METRICS)}.")
    if "judge_accuracy" in only and not judge:
        raise ValueError(
            f"{eyes.name} is a CLIP without labels, so it cannot tell `judge_accuracy`: leave the metric out, or look "
            "with a judge such as 'icons-judge'."
        )
    return tuple(m for m in METRICS if m in only)


def check_eyes(model: TextToImage, eyes: Eyes) -> None:
    """Refuse eyes that read pictures of another size than `model` draws; a CLIP reads any.

    Raises:
        ValueError: They do.
    """
    wanted = getattr(eyes, "size", None)
    if wanted is not None and model.size != (wanted, wanted):
        raise ValueError(
            f"{eyes.name} reads pictures of {wanted}x{wanted} pixels, {model.name} draws "
            f"{model.size[1]}x{model.size[0]}: name a CLIP instead, with `--clip` or `eyes=`."
        )
