"""Metrics of a change on an evaluation set, before and after the edit; each is described in `metrics.cards`.

Three runs draw the same prompts: the unedited model, the edited model from the same seeds, and the unedited model from
other seeds. Scores compare the first two per picture. Distances between sets compare each of the first two with the
third: the value before the edit is then the distance that a change of seeds alone causes, and an edit that leaves
unrelated prompts alone has the same value after.
"""

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from overpaint.edit import Change
from overpaint.edit.concept_words import contains
from overpaint.edit.drift import feature_drift
from overpaint.errors import check_seed, check_texts, later_seed
from overpaint.evaluate.measures import Measure, Measures
from overpaint.evaluate.metric_rows import (
    EMPTY,
    METRICS,
    PAIR_METRICS,
    SET_METRICS,
    PictureRun,
    distance_of_pairs,
    rows_of_role,
    single,
)
from overpaint.model import TextToImage
from overpaint.model.sampling import Progress
from overpaint.probes import Case, EvaluationSet
from overpaint.probes.questions import parse_concept
from overpaint.probes.text import cut_words
from overpaint.scorers.protocols import FeatureScorer, check_size, scorer_name

__all__ = ["METRICS", "check_change", "check_uncut", "empty_drift", "measure"]

DEFAULT = ("clip_cosine", "clip_accuracy", "judge_accuracy", "kid", "kid_p", "psnr", "empty_drift")
_OTHER_SEEDS = 1_000_000  # offset of the seeds of the third run
_NEXT_PICTURE = 10_000  # offset of the seed of a prompt's next picture


def measure(
    model: TextToImage,
    change: Change,
    cases: EvaluationSet,
    *,
    scorer: FeatureScorer,
    only: Collection[str] | None = None,
    repeats: int = 1,
    steps: int = 16,
    guidance_scale: float | None = None,
    seed: int = 0,
    batch_size: int = 32,
    on_progress: Progress | None = None,
) -> Measures:
    """Return the metrics of a change on an evaluation set.

    Args:
        model: The unedited model, which is left unchanged.
        change: The edit.
        cases: Prompts, and the concepts and texts that their pictures are scored with.
        scorer: Returns features of pictures and texts; its name is `features` in the protocol.
        only: Which of `METRICS`; by default the common ones that `scorer` supports.
        repeats: Pictures of each case.
        steps: Denoising steps of each picture.
        guidance_scale: Weight of the prompt; the model's own if `None`.
        seed: First seed; cases without a seed of their own count up from it.
        batch_size: Pictures drawn at once.
        on_progress: Called with (pictures done, total, name of the run).

    Raises:
        ValueError: A metric is unknown or not supported by `scorer`, `scorer` reads pictures of another size, or a seed
            is out of range, or the token limit cuts off the concept of a prompt.
        TypeError: `change` is not one change, or `only` is one text.
        MissingExtra: A metric needs a package that is not installed.
    """
    began = time.perf_counter()
    check_change(change)
    check_uncut(model, cases)
    seed = check_seed(seed)
    first = [
        later_seed(seed, i) if case.seed is None else check_seed(case.seed)
        for i, case in enumerate(cases.cases)
    ]
    chosen = _chosen(only, scorer)
    check_size(scorer, model)
    if repeats < 1:
        raise ValueError(
            f"`repeats` must be at least 1, got {repeats}: it is the number of pictures of each case."
        )
    drawn = [case for case in cases.cases for _ in range(repeats)]
    seeds = [later_seed(s, _NEXT_PICTURE * r) for s in first for r in range(repeats)]
    runner = _Runner(model, scorer, drawn, chosen, steps, guidance_scale, batch_size, on_progress)
    count = 3 if set(chosen) & set(SET_METRICS) else 2
    before = runner.run("before", seeds, 0, count)
    with change.applied(model):
        after = runner.run("after", seeds, 1, count, compared_with=before)
    others = [later_seed(s, _OTHER_SEEDS) for s in seeds]
    other = runner.run("other seeds", others, 2, count) if count == 3 else None
    rows = [
        row
        for role in dict.fromkeys(case.role for case in drawn)
        for row in rows_of_role(role, drawn, chosen, scorer, (before, after), other)
    ]
    if "empty_drift" in chosen:
        drift = single(empty_drift(model, change), 1)
        rows.append(Measure("model", "empty_drift", EMPTY, drift, EMPTY))
    scale = model.guidance_scale if guidance_scale is None else guidance_scale
    protocol = {
        **model.protocol(steps=steps, guidance_scale=scale), "features": scorer_name(scorer), "set": cases.name,
        "form": cases.form, "cases": len(cases.cases), "repeats": repeats, "seed": seed,
        "interval": "95 % percentile bootstrap over prompts, 2000 resamples (kid: 1000); accuracies: Clopper-Pearson "
        "where all prompts agree",
        "kid_p": "1000 splits within prompts", "change_digest": change.digest,
        "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip
    return Measures(cases.name, cases.erase, cases.replace, tuple(rows), protocol)


def empty_drift(model: TextToImage, change: Change | None) -> float:
    """Return the drift of the empty prompt's text features under `change`, relative to their norm.

    It is 0 for SDXL, whose features of the empty prompt are zero.
    """
    if change is None:
        return 0.0
    before = model.encode([""])
    with change.applied(model):
        after = model.encode([""])
    return feature_drift(before, after, relative_to=before)


@dataclass(frozen=True)
class _Runner:
    """Draws the pictures of all cases and measures them, one run after another."""

    model: TextToImage
    scorer: FeatureScorer
    cases: Sequence[Case]
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
        compared_with: PictureRun | None = None,
    ) -> PictureRun:
        """Return the measurements of a run, with the distances of its pictures to those of `compared_with`."""
        distances = [metric for metric in PAIR_METRICS if metric in self.chosen]
        run = PictureRun(torch.empty(0), distances={metric: [] for metric in distances})
        features: list[Tensor] = []
        total = len(self.cases)
        for batch, start in enumerate(range(0, total, self.batch_size)):
            part = self.cases[start : start + self.batch_size]
            images = self.model.generate(
                [case.prompt for case in part], seed=list(seeds[start : start + len(part)]), steps=self.steps,
                guidance_scale=self.guidance_scale, batch_size=self.batch_size,
            ).images.float()  # fmt: skip
            features.append(self.scorer.image_features(images))
            run.correct += self._recognised(images, part)
            if distances and number == 0:
                run.images.append(images)
            if compared_with is not None:
                for metric in distances:
                    run.distances[metric] += distance_of_pairs(
                        metric, self.scorer, compared_with.images[batch], images
                    )
            if self.on_progress is not None:
                self.on_progress(number * total + start + len(part), runs * total, name)
        run.features = torch.cat(features)
        return run

    def _recognised(self, images: Tensor, cases: Sequence[Case]) -> list[bool | None]:
        """Return whether each picture is recognised as the concept of its case; `None` without a label for it."""
        labels = [_label(case.concept, self.scorer) for case in cases]
        correct: list[bool | None] = [None] * len(cases)
        if "judge_accuracy" not in self.chosen:
            return correct
        classifier: Any = self.scorer
        for kind in dict.fromkeys(label[0] for label in labels if label):
            best = classifier.classify(images, kind).argmax(1).tolist()
            for i, label in enumerate(labels):
                if label and label[0] == kind:
                    correct[i] = classifier.labels[kind][best[i]] == label[1]
        return correct


def _label(concept: str, scorer: FeatureScorer) -> tuple[str, str] | None:
    """Return the kind and the scorer's label of `concept`; `None` if it has none."""
    labels = getattr(scorer, "labels", None)
    if not labels or not concept:
        return None
    try:
        return parse_concept(concept, labels)
    except ValueError:
        return None


def check_change(change: Any) -> None:
    """Raise unless `change` is one change.

    Raises:
        TypeError: It is a list or anything else.
    """
    if not isinstance(change, Change):
        raise TypeError(
            f"a change must be one `Change`, got {change!r}: solve several jointly with `edit.stack`, or compare them "
            "with `evaluate.compare`."
        )


def check_uncut(model: TextToImage, cases: EvaluationSet) -> None:
    """Raise if the token limit cuts off the concept of a prompt, so that the model cannot read it.

    Raises:
        ValueError: It does.
    """
    for case in cases.cases:
        concept = case.concept or (cases.erase if case.role == "target" else "")
        cut = cut_words(model.tokenizer, case.prompt)
        rest = case.prompt.removesuffix(cut)
        if cut and concept and contains(case.prompt, concept) and not contains(rest, concept):
            raise ValueError(
                f"the concept {concept!r} of the prompt {case.prompt!r} is cut off by the limit of "
                f"{model.tokenizer.model_max_length} tokens: shorten the prompt, or put the concept first."
            )


def _chosen(only: Collection[str] | None, scorer: FeatureScorer) -> tuple[str, ...]:
    """Return the metrics to compute, in the order of `METRICS`."""
    has_labels = bool(getattr(scorer, "labels", None))
    if only is None:
        return tuple(m for m in DEFAULT if has_labels or m != "judge_accuracy")
    check_texts(only, "only")
    for name in only:
        if name not in METRICS:
            raise ValueError(f"unknown metric {name!r}: choose one of {', '.join(METRICS)}.")
    if "judge_accuracy" in only and not has_labels:
        raise ValueError(
            f"{scorer.name} is a CLIP without labels, which `judge_accuracy` needs: leave the metric out, or use a "
            "scorer with labels such as the judge 'icons-judge'."
        )
    return tuple(m for m in METRICS if m in only)
