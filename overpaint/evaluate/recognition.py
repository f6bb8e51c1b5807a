"""What did the change do? Efficacy, redirection, generality and specificity, before and after.

A judge that had no part in making the model looks at pictures of the same prompts and seeds before and after:

efficacy       share of pictures still recognised as the erased concept: should fall to nothing
redirection    share recognised as what should stand in its place: should rise
generality     efficacy on wordings that nothing was fitted to, and on held-out pairs: should fall too
specificity    share of pictures whose other labels are recognised: other concepts of the kind, objects, colors

Each is a share of top-1 verdicts with a 95 % bootstrap interval over scenes (one object and start noise, drawn in
several styles); the change is taken picture by picture. The relative movement of the empty prompt's features, the half
of guidance that every picture shares, is reported beside them.
"""

import dataclasses
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from overpaint import metrics
from overpaint.edit import Change
from overpaint.edit.weights import fingerprint
from overpaint.evaluate.metrics_on_sets import empty_drift
from overpaint.evaluate.results import Comparison, Paired, Scores
from overpaint.images.pictures import is_blank
from overpaint.metrics import Interval
from overpaint.model import TextToImage
from overpaint.probes import questions
from overpaint.probes.questions import Question
from overpaint.scorers import judge as features

__all__ = ["Classifier", "compare", "score"]

Progress = Callable[[int, int, str], None]  # pictures made, pictures in all, the method at work


class Classifier(Protocol):
    """What an evaluation needs of a judge."""

    @property
    def labels(self) -> Mapping[str, Sequence[str]]:
        """What it can say, by kind: `style`, `object`, `color`."""
        ...

    def classify(self, images: Tensor, kind: str) -> Tensor:
        """Return the probability of each of `labels[kind]`, shape (B, K), for `images` (B, 3, H, W) in [0, 1]."""
        ...


@dataclass(frozen=True)
class _Run:
    """What became of the questions in one run."""

    verdicts: Mapping[str, Sequence[str]]  # what the judge said, by kind
    pictures: Mapping[int, Tensor]  # those kept, by question
    blank: Sequence[bool]  # whether a picture was of one color
    read: Mapping[str, str]  # the hash of each prompt's text features; none where the UNet moved
    reused: int  # pictures that are those of the unedited model, and were not drawn again

    def counts(self) -> dict[str, int]:
        """Return what the protocol counts of a run."""
        return {"blank_pictures": sum(self.blank), "reused_pictures": self.reused}

    def kept(self) -> Tensor:
        """Return the pictures kept, uint8, shape (N, 3, H, W), in the order of the questions."""
        stacked = [self.pictures[i] for i in sorted(self.pictures)]
        return torch.stack(stacked) if stacked else torch.zeros(0, 3, 1, 1, dtype=torch.uint8)


def score(model: TextToImage, change: Change, **options: Any) -> Scores:
    """Return what `change` does to `model`; options as in `compare`."""
    return compare(model, {"change": change}, **options).scores["change"]


def compare(
    model: TextToImage,
    changes: Mapping[str, Change | None],
    *,
    erase: str | None = None,
    replace: str | None = None,
    judge: Classifier | None = None,
    held_out: Collection[tuple[str, str]] | None = None,
    size: int = 40,
    steps: int = 16,
    guidance_scale: float | None = None,
    seed: int = 0,
    batch_size: int = 32,
    gallery: int = 4,
    on_progress: Progress | None = None,
) -> Comparison:
    """Judge several changes on the same questions; the pictures before are made once.

    Args:
        model: The model; left as it was found.
        changes: By name; `None` stands for no edit.
        erase: The concept that was edited, as in a prompt; by default what the first change says.
        replace: What should stand in its place; likewise.
        judge: Names what it sees; by default `features.load()`.
        held_out: (object, style) pairs that training never showed; those of `model` if `None`.
        size: Questions for each concept, see `questions.build`.
        steps: Denoising steps of each picture.
        guidance_scale: By default the model's own.
        seed: Of the questions, and from it on one latent seed a question.
        batch_size: Pictures made at once.
        gallery: Scenes whose pictures are kept, each in every concept of the kind.
        on_progress: Told after each batch how many pictures are made, of how many, and for which method.

    Raises:
        ValueError: No change is given, the judge does not know the erased concept, or reads pictures of another size.
    """
    began = time.perf_counter()
    judge = features.load() if judge is None else judge
    old, new = _concepts(changes, erase, replace)
    kind, erased = questions.parse_concept(old, judge.labels)
    replaced = _known(new, judge, kind)
    _check_size(model, judge)
    composed = model.held_out if held_out is None else held_out
    asked = questions.build(
        kind, erased, labels=judge.labels, held_out=composed, size=size, seed=seed
    )
    kept = [i for i, q in enumerate(asked) if q.role in ("target", "other")]
    kept = [i for i in kept if asked[i].seed < seed + gallery]
    pending = {name: change for name, change in changes.items() if change is not None}
    work = _Work(model, judge, asked, kept, steps, guidance_scale, batch_size, on_progress)
    total = len(asked) * (1 + len(pending))
    before = work.run(None, "no edit", done=0, total=total)
    runs = {name: dataclasses.replace(before, reused=len(asked)) for name in changes}
    for i, (name, change) in enumerate(pending.items(), start=1):
        runs[name] = work.run(change, name, done=i * len(asked), total=total, before=before)
    protocol = {
        "size": size, "questions": len(asked), "steps": steps, "guidance_scale": guidance_scale,
        "seed": seed, "judge": getattr(judge, "name", type(judge).__name__), "model": model.name,
        "interval": "95 % percentile bootstrap over scenes, 2000 resamples",
        "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip
    tally = _Tally(asked, before.verdicts, kind, erased, replaced)
    scores = {
        name: tally.scores(
            name,
            run.verdicts,
            drift=empty_drift(model, changes[name]),
            protocol={**protocol, **_digest(changes[name]), **run.counts()},
        )
        for name, run in runs.items()
    }
    pictures = {"before": before.kept(), **{name: run.kept() for name, run in runs.items()}}
    return Comparison(scores, tally.baseline(), tuple(asked[i] for i in kept), pictures)


@dataclass(frozen=True)
class _Work:
    """Makes and judges the pictures of one method after another."""

    model: TextToImage
    judge: Classifier
    asked: Sequence[Question]
    kept: Collection[int]
    steps: int
    guidance_scale: float | None
    batch_size: int
    on_progress: Progress | None

    def run(
        self,
        change: Change | None,
        name: str,
        *,
        done: int,
        total: int,
        before: _Run | None = None,
    ) -> _Run:
        """Return what becomes of the questions under `change`.

        A prompt whose text features, and those of the empty prompt, are bit for bit what they were `before` has the
        picture it had, unless the UNet moved: it is not drawn again.
        """
        start = self._nothing() if before is None else before
        verdicts = {kind: list(said) for kind, said in start.verdicts.items()}
        plain, pictures = list(start.blank), dict(start.pictures)
        with change.applied(self.model) if change is not None else nullcontext():
            read = self._read() if _is_textual(change) else {}
            still = {prompt for prompt, _ in read.items() & start.read.items()}
            left = [i for i, q in enumerate(self.asked) if not {"", q.prompt} <= still]
            reused = len(self.asked) - len(left)
            done += reused
            if reused:
                self._tell(done, total, name)
            for batch, said, images in self._judged(left):
                for kind, labels in said.items():
                    for i, label in zip(batch, labels, strict=True):
                        verdicts[kind][i] = label
                for i, one, image in zip(batch, is_blank(images).tolist(), images, strict=True):
                    plain[i] = bool(one)
                    if i in self.kept:
                        pictures[i] = (image * 255).round().to(torch.uint8)
                done += len(batch)
                self._tell(done, total, name)
        return _Run(verdicts, pictures, plain, read, reused)

    def _nothing(self) -> _Run:
        """Return a run in which nothing was drawn, read or said."""
        count = len(self.asked)
        return _Run({k: [""] * count for k in self.judge.labels}, {}, [False] * count, {}, 0)

    def _judged(
        self, rows: Sequence[int]
    ) -> Iterator[tuple[Sequence[int], Mapping[str, Sequence[str]], Tensor]]:
        """Yield batches of questions: which, what the judge says of their pictures by kind, and those (B, 3, H, W)."""
        for start in range(0, len(rows), self.batch_size):
            batch = rows[start : start + self.batch_size]
            images = self._images([self.asked[i] for i in batch])
            best = {k: self.judge.classify(images, k).argmax(1).tolist() for k in self.judge.labels}
            said = {k: [self.judge.labels[k][int(n)] for n in found] for k, found in best.items()}
            yield batch, said, images

    def _tell(self, done: int, total: int, name: str) -> None:
        if self.on_progress is not None:
            self.on_progress(done, total, name)

    def _read(self) -> dict[str, str]:
        """Return the hash of each prompt's text features, and of the empty prompt's."""
        found: dict[str, str] = {}
        distinct = list(dict.fromkeys(["", *(q.prompt for q in self.asked)]))
        for start in range(0, len(distinct), self.batch_size):
            batch = distinct[start : start + self.batch_size]
            rows = self.model.encode(batch)
            found |= {p: fingerprint(row) for p, row in zip(batch, rows, strict=True)}
        return found

    def _images(self, batch: Sequence[Question]) -> Tensor:
        made = self.model.generate(
            [q.prompt for q in batch],
            seed=[q.seed for q in batch],
            steps=self.steps,
            guidance_scale=self.guidance_scale,
            batch_size=self.batch_size,
        )
        return made.images.float().cpu()


def _is_textual(change: Change | None) -> bool:
    """Whether nothing moves but text encoders, if anything does."""
    return change is None or all(site.startswith("text") for site in change.sites)


@dataclass(frozen=True)
class _Tally:
    """Turns verdicts into shares."""

    asked: Sequence[Question]
    before: Mapping[str, Sequence[str]]
    kind: str
    erased: str
    replaced: str

    def scores(
        self,
        name: str,
        after: Mapping[str, Sequence[str]],
        *,
        drift: float,
        protocol: Mapping[str, Any],
    ) -> Scores:
        kind, rest = self.kind, ("other", "other held out")
        others = dict.fromkeys(q.label(kind) for q in self.asked if q.role == "other")
        kept = {
            k: self._right(after, k, rest if k == kind else (*rest, "plain")) for k in self.before
        }
        return Scores(
            name, kind, self.erased, self.replaced,
            efficacy=self._seen_as(after, self.erased, ("target",)),
            redirection=self._seen_as(after, self.replaced, ("target",)),
            generality={
                "unseen wordings": self._seen_as(after, self.erased, ("unseen",)),
                "held-out pairs": self._seen_as(after, self.erased, ("held out",)),
            },
            others={o: self._right(after, kind, rest, only=o) for o in others},
            specificity=kept,
            empty_drift=drift,
            protocol=protocol,
        )  # fmt: skip

    def baseline(self) -> dict[str, Interval]:
        """Return how often the unedited pictures are recognised, for trained and for held-out pairs."""
        trained, composed = ("target", "other", "plain"), ("held out", "other held out")
        found = {k: self._right(self.before, k, trained).before for k in self.before}
        return found | {
            f"{k} held out": self._right(self.before, k, composed).before for k in self.before
        }

    def _seen_as(
        self, after: Mapping[str, Sequence[str]], label: str, roles: Collection[str]
    ) -> Paired:
        """Share of the pictures with `roles` that are seen as `label`; of none if the judge knows no such label."""
        rows = [i for i, q in enumerate(self.asked) if q.role in roles and label]
        return self._pair(
            rows,
            [self.before[self.kind][i] == label for i in rows],
            [after[self.kind][i] == label for i in rows],
        )

    def _right(
        self,
        after: Mapping[str, Sequence[str]],
        kind: str,
        roles: Collection[str],
        *,
        only: str = "",
    ) -> Paired:
        """Share of the pictures with `roles` whose prompt names a `kind` that is seen as named."""
        said = [q.label(kind) for q in self.asked]
        rows = [i for i, q in enumerate(self.asked) if q.role in roles and said[i]]
        rows = [i for i in rows if not only or said[i] == only]
        return self._pair(
            rows,
            [self.before[kind][i] == said[i] for i in rows],
            [after[kind][i] == said[i] for i in rows],
        )

    def _pair(self, rows: Sequence[int], before: Sequence[bool], after: Sequence[bool]) -> Paired:
        """Return shares whose intervals draw scenes: one scene and seed in several styles is one draw."""
        scenes = [self.asked[i].seed for i in rows]
        return Paired(
            metrics.bootstrap(before, groups=scenes),
            metrics.bootstrap(after, groups=scenes),
            metrics.paired(before, after, groups=scenes),
        )


def _digest(change: Change | None) -> dict[str, str]:
    """Return what tells a change from any other, for its protocol."""
    return {} if change is None else {"change_digest": change.digest}


def _check_size(model: TextToImage, judge: Classifier) -> None:
    wanted = getattr(judge, "size", None)
    if wanted is not None and model.size != (wanted, wanted):
        raise ValueError(
            f"{getattr(judge, 'name', 'the judge')} reads pictures of {wanted}x{wanted} pixels, {model.name} draws "
            f"{model.size[1]}x{model.size[0]}: pass a judge for this size as `judge`."
        )


def _known(concept: str, judge: Classifier, kind: str) -> str:
    """Return the judge's label of `concept` in `kind`, or `""`."""
    try:
        found, label = questions.parse_concept(concept, judge.labels)
    except ValueError:
        return ""
    return label if found == kind else ""


def _concepts(
    changes: Mapping[str, Change | None], erase: str | None, replace: str | None
) -> tuple[str, str]:
    """Return what was edited to what: as told, else the first pair of the first change."""
    if not changes:
        raise ValueError(
            "`changes` is empty: give at least one change by name, `None` for no edit."
        )
    pairs = next((change.pairs for change in changes.values() if change is not None), {})
    old = next(iter(pairs), "") if erase is None else erase
    if not old:
        raise ValueError("no change says which concept it edits: name it with `erase`.")
    return old, pairs.get(old, "") if replace is None else replace
