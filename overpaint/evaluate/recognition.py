"""Efficacy, redirection, generality and specificity of changes, by the labels that a classifier recognises.

The model draws the same prompts and seeds before and after each change, and a classifier that was not used to train the
model labels the pictures:

efficacy       share of pictures still recognised as the erased concept; should fall to 0
redirection    share recognised as the replacement; should rise
generality     efficacy on wordings that no edit was fitted to, and on held-out pairs; should fall too
specificity    share of pictures whose other labels are recognised: other concepts of the kind, objects, colors

Each is a share of top-1 labels with a 95 % interval over scenes (one object and start noise, drawn in several styles),
see `metrics.share`; the change is the mean difference per picture. The relative movement of the empty prompt's
features, which enter the guidance of every picture, is reported beside them.
"""

import dataclasses
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from overpaint.edit import Change
from overpaint.edit.weights import fingerprint
from overpaint.errors import check_one_text, check_seed, later_seed
from overpaint.evaluate.metrics_on_sets import check_change, empty_drift
from overpaint.evaluate.results import Comparison, Scores
from overpaint.evaluate.shares import Labels, Tally
from overpaint.files import public_name
from overpaint.images.pictures import is_blank
from overpaint.model import TextToImage
from overpaint.model.sampling import Progress
from overpaint.probes.questions import Question, parse_concept
from overpaint.probes.questions import build as build_questions
from overpaint.scorers import judge
from overpaint.scorers.protocols import Classifier, check_size, scorer_name

__all__ = ["compare", "score"]


def score(model: TextToImage, change: Change, **options: Any) -> Scores:
    """Return the scores of `change` on `model`; options as in `compare`."""
    return compare(model, {"change": change}, **options).scores["change"]


def compare(
    model: TextToImage,
    changes: Mapping[str, Change | None],
    *,
    erase: str | None = None,
    replace: str | None = None,
    scorer: Classifier | None = None,
    size: int = 40,
    steps: int = 16,
    guidance_scale: float | None = None,
    seed: int = 0,
    batch_size: int = 32,
    gallery: int = 4,
    on_progress: Progress | None = None,
) -> Comparison:
    """Return the scores of several changes on the same questions; the unedited pictures are drawn once.

    Args:
        model: The model, which is left unchanged. Its `held_out` pairs make questions of their own.
        changes: Changes by name; `None` stands for no edit.
        erase: The edited concept, as in a prompt; by default the first concept of the first change.
        replace: Its replacement; by default that of the first change.
        scorer: Classifier of the pictures; by default the judge `icons-judge`.
        size: Questions for each concept, see `questions.build`.
        steps: Denoising steps of each picture.
        guidance_scale: Weight of the prompt; the model's own if `None`.
        seed: Seed of the questions; the latent seeds of the scenes count up from it.
        batch_size: Pictures drawn at once.
        gallery: Scenes whose pictures are returned, each in every concept of the kind.
        on_progress: Called after each batch with (pictures done, total, name of the method).

    Raises:
        ValueError: `changes` is empty, `scorer` has no label of `erase` or of a `replace` that is given, or reads
            pictures of another size.
        TypeError: `changes` is no dictionary of changes, or a concept is no text.
    """
    began = time.perf_counter()
    seed = check_seed(seed)
    scorer = judge.load() if scorer is None else scorer
    concept, target = _concepts(changes, erase, replace)
    check_size(
        scorer, model
    )  # first, because labels are useless for pictures that the scorer cannot read
    kind, label = parse_concept(concept, scorer.labels)
    if replace:  # given, and not that of a change, which may have no label
        _check_replacement(replace, concept, scorer, kind)
    questions = build_questions(
        kind, label, labels=scorer.labels, held_out=model.held_out, size=size, seed=seed
    )
    first = {later_seed(seed, i) for i in range(gallery)}
    shown = [
        i for i, q in enumerate(questions) if q.role in ("target", "other") and q.seed in first
    ]
    runner = _Runner(
        model, scorer, questions, shown, steps, guidance_scale, batch_size, on_progress
    )
    before, runs = runner.run_all(changes)
    protocol = {
        "size": size, "questions": len(questions), "steps": steps, "guidance_scale": guidance_scale,
        "seed": seed, "judge": scorer_name(scorer), "model": public_name(model.name),
        "interval": "95 % percentile bootstrap over scenes, 2000 resamples; Clopper-Pearson where all scenes agree",
        "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip
    tally = Tally(questions, before.labels, kind, label, _label(target, scorer, kind))
    scores = {
        name: tally.scores(
            name,
            run.labels,
            drift=empty_drift(model, changes[name]),
            protocol={**protocol, **_digest(changes[name]), **run.counts()},
        )
        for name, run in runs.items()
    }
    pictures = {"before": before.gallery(), **{name: run.gallery() for name, run in runs.items()}}
    return Comparison(scores, tally.baseline(), tuple(questions[i] for i in shown), pictures)


@dataclass(frozen=True)
class _Run:
    """Labels and pictures of the questions under one method."""

    labels: Labels
    pictures: Mapping[int, Tensor]  # those of the gallery, by index of the question
    blank: Sequence[bool]  # whether a picture has one color
    digests: Mapping[str, str]  # of each prompt's text features; empty if the UNet changed
    reused: (
        int  # number of pictures that equal those of the unedited model and were not drawn again
    )

    def counts(self) -> dict[str, int]:
        """Return the counts that go into the protocol."""
        return {"blank_pictures": sum(self.blank), "reused_pictures": self.reused}

    def gallery(self) -> Tensor:
        """Return the pictures of the gallery, uint8, shape (N, 3, H, W), in the order of the questions."""
        stacked = [self.pictures[i] for i in sorted(self.pictures)]
        return torch.stack(stacked) if stacked else torch.zeros(0, 3, 1, 1, dtype=torch.uint8)


@dataclass(frozen=True)
class _Runner:
    """Draws the pictures of the questions and labels them."""

    model: TextToImage
    scorer: Classifier
    questions: Sequence[Question]
    shown: Collection[int]  # indices of the questions whose pictures are kept in memory
    steps: int
    guidance_scale: float | None
    batch_size: int
    on_progress: Progress | None

    def run_all(self, changes: Mapping[str, Change | None]) -> tuple[_Run, dict[str, _Run]]:
        """Return the run of the unedited model, and the run of each change by name."""
        count = len(self.questions)
        edits = {name: change for name, change in changes.items() if change is not None}
        total = count * (1 + len(edits))
        before = self.run(None, "no edit", done=0, total=total)
        runs = {name: dataclasses.replace(before, reused=count) for name in changes}
        for i, (name, change) in enumerate(edits.items(), start=1):
            runs[name] = self.run(change, name, done=i * count, total=total, before=before)
        return before, runs

    def run(
        self,
        change: Change | None,
        name: str,
        *,
        done: int,
        total: int,
        before: _Run | None = None,
    ) -> _Run:
        """Return labels and pictures of the questions under `change`.

        If the change moves text encoders only, a prompt is not drawn again when its text features and those of the
        empty prompt are bit for bit as in `before`: its picture is then the same.
        """
        start = self._empty_run() if before is None else before
        labels = {kind: list(names) for kind, names in start.labels.items()}
        blank, pictures = list(start.blank), dict(start.pictures)
        with change.applied(self.model) if change is not None else nullcontext():
            digests = self._digests() if _moves_text_only(change) else {}
            unchanged = {prompt for prompt, _ in digests.items() & start.digests.items()}
            rows = [i for i, q in enumerate(self.questions) if not {"", q.prompt} <= unchanged]
            reused = len(self.questions) - len(rows)
            done += reused
            if reused:
                self._report(done, total, name)
            for batch, batch_labels, images in self._labelled(rows):
                for kind, names in batch_labels.items():
                    for i, label in zip(batch, names, strict=True):
                        labels[kind][i] = label
                for i, flag, image in zip(batch, is_blank(images).tolist(), images, strict=True):
                    blank[i] = bool(flag)
                    if i in self.shown:
                        pictures[i] = (image * 255).round().to(torch.uint8)
                done += len(batch)
                self._report(done, total, name)
        return _Run(labels, pictures, blank, digests, reused)

    def _empty_run(self) -> _Run:
        """Return a run without pictures."""
        count = len(self.questions)
        return _Run({k: [""] * count for k in self.scorer.labels}, {}, [False] * count, {}, 0)

    def _labelled(self, rows: Sequence[int]) -> Iterator[tuple[Sequence[int], Labels, Tensor]]:
        """Yield batches: indices of the questions, labels by kind, and pictures (B, 3, H, W)."""
        known = self.scorer.labels
        for start in range(0, len(rows), self.batch_size):
            batch = rows[start : start + self.batch_size]
            images = self._draw([self.questions[i] for i in batch])
            best = {k: self.scorer.classify(images, k).argmax(1).tolist() for k in known}
            labels = {k: [known[k][int(n)] for n in indices] for k, indices in best.items()}
            yield batch, labels, images

    def _report(self, done: int, total: int, name: str) -> None:
        if self.on_progress is not None:
            self.on_progress(done, total, name)

    def _digests(self) -> dict[str, str]:
        """Return the digest of the text features of each prompt and of the empty prompt."""
        digests: dict[str, str] = {}
        distinct = list(dict.fromkeys(["", *(q.prompt for q in self.questions)]))
        for start in range(0, len(distinct), self.batch_size):
            batch = distinct[start : start + self.batch_size]
            rows = self.model.encode(batch)
            digests |= {p: fingerprint(row) for p, row in zip(batch, rows, strict=True)}
        return digests

    def _draw(self, batch: Sequence[Question]) -> Tensor:
        pictures = self.model.generate(
            [q.prompt for q in batch],
            seed=[q.seed for q in batch],
            steps=self.steps,
            guidance_scale=self.guidance_scale,
            batch_size=self.batch_size,
        )
        return pictures.images.float().cpu()


def _moves_text_only(change: Change | None) -> bool:
    """Return whether the change moves nothing but text encoders."""
    return change is None or all(site.startswith("text") for site in change.sites)


def _digest(change: Change | None) -> dict[str, str]:
    """Return the protocol's entry that identifies the change."""
    return {} if change is None else {"change_digest": change.digest}


def _label(concept: str, scorer: Classifier, kind: str) -> str:
    """Return the scorer's label of `concept` in `kind`; `""` if there is none."""
    try:
        label_kind, label = parse_concept(concept, scorer.labels)
    except ValueError:
        return ""
    return label if label_kind == kind else ""


def _check_replacement(replace: str, erase: str, scorer: Classifier, kind: str) -> None:
    """Raise unless the scorer recognises `replace` among the concepts of `kind`."""
    other, _ = parse_concept(replace, scorer.labels)
    if other != kind:
        raise ValueError(
            f"the replacement {replace!r} is a label of the kind {other!r}, and {erase!r} of the kind {kind!r}: name "
            "one of the same kind, or leave `replace` out."
        )


def _concepts(
    changes: Mapping[str, Change | None], erase: str | None, replace: str | None
) -> tuple[str, str]:
    """Return the edited concept and its replacement: the arguments, else the first pair of the first change."""
    if not isinstance(changes, Mapping):
        raise TypeError(
            f"`changes` must be a dictionary of changes by name, got {changes!r}: write {{'mine': change}}."
        )
    for change in changes.values():
        if change is not None:
            check_change(change)
    if not changes:
        raise ValueError(
            "`changes` is empty: give at least one change by name, `None` for no edit."
        )
    pairs = next((change.pairs for change in changes.values() if change is not None), {})
    old = next(iter(pairs), "") if erase is None else erase
    for name, text in (("erase", old), ("replace", "" if replace is None else replace)):
        check_one_text(
            text, f"`{name}`", "`compare` and `score` measure one concept; call them for each"
        )
    if not old:
        raise ValueError("no change says which concept it edits: name it with `erase`.")
    return old, pairs.get(old, "") if replace is None else replace
