"""A short search for prompts that bring an erased concept back.

Three families of attempts are tried on the edited model: paraphrases of the concept, tokens with similar embeddings in
the place of each of its tokens, and a soft token, see `overpaint.evaluate.soft_token`. The best attempt of each family
is drawn again from other seeds, and only that score is reported, because the best score of many attempts is biased
upwards by the selection.

The search finds weak edits. It does not show that an edit is robust: a longer search, more tokens or other words may
succeed where this one fails.

Source: Zhang et al., 2024 (UnlearnDiffAtk), https://arxiv.org/abs/2310.11868, for matching the unedited noise; Pham et
al., 2024, https://arxiv.org/abs/2308.01508, for embeddings that are no word; Pei et al., Tsai et al., 2024
(Ring-A-Bell), https://arxiv.org/abs/2310.10012, for the search in text. Deviations: all are much shorter, and the soft
token follows the prompt.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor

from overpaint import metrics
from overpaint.edit import Change
from overpaint.errors import check_seed, check_texts, later_seed
from overpaint.evaluate import soft_token
from overpaint.evaluate.attack_results import Attack, Attempt
from overpaint.evaluate.metrics_on_sets import check_change, check_uncut
from overpaint.evaluate.rewordings import neighbours, paraphrases, replace_concept
from overpaint.metrics import Interval
from overpaint.model import TextToImage
from overpaint.model.sampling import Progress, denoise
from overpaint.model.token_spans import find_span
from overpaint.probes import Case, EvaluationSet
from overpaint.probes.questions import parse_concept
from overpaint.scorers.protocols import FeatureScorer, check_size, scorer_name

__all__ = ["FAMILIES", "Attack", "Attempt", "Budget", "search"]

FAMILIES = ("paraphrase", "neighbour", "soft token")
_CONFIRM = 2_000_000  # offset of the seeds of the confirmation


@dataclass(frozen=True)
class Budget:
    """Size of a search.

    Attributes:
        prompts: Target prompts.
        pictures: Pictures of each prompt in the search; the confirmation draws twice as many.
        tokens: Nearest tokens tried in the place of each token of the concept.
        gradient_steps: Gradient steps of the soft token.
        rate: Length of a gradient step, relative to the norm of the concept's mean embedding.

    Raises:
        ValueError: A value is not positive.
    """

    prompts: int = 2
    pictures: int = 3
    tokens: int = 4
    gradient_steps: int = 16
    rate: float = 1.0

    def __post_init__(self) -> None:
        for name in ("prompts", "pictures", "gradient_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.rate <= 0:
            raise ValueError(f"`rate` must be positive, got {self.rate}.")


def search(
    model: TextToImage,
    change: Change,
    cases: EvaluationSet,
    *,
    scorer: FeatureScorer,
    families: Sequence[str] = FAMILIES,
    budget: Budget | None = None,
    steps: int = 8,
    guidance_scale: float | None = None,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> Attack:
    """Search for prompts that bring back the concept that `change` erased.

    Args:
        model: The unedited model, which is left unchanged.
        change: The edit.
        cases: Their target prompts are attacked, those that contain `cases.erase` once.
        scorer: Scores the pictures: by the probability of the concept's label if it has one, else by the cosine with
            the case's text minus that with the text of the replacement.
        families: Which of `FAMILIES`.
        budget: Size of the search; by default `Budget()`.
        steps: Denoising steps of each picture.
        guidance_scale: Weight of the prompt; the model's own if `None`.
        seed: First seed of the search; the confirmation uses seeds far from it.
        on_progress: Called with (attempts done, total, family).

    Raises:
        ValueError: No target prompt contains the concept once, a family is unknown, or `families` is empty.
    """
    began = time.perf_counter()
    _check_families(families)
    check_change(change)
    check_uncut(model, cases)
    seed = check_seed(seed)
    check_size(scorer, model)
    budget = budget or Budget()
    chosen = _targets(model, cases, budget.prompts)
    scale = model.guidance_scale if guidance_scale is None else guidance_scale
    scored = _Scored(model, scorer, chosen, cases.erase, budget.pictures, steps, scale, seed)
    plans = list(_plans(model, cases.erase, families, budget.tokens))
    total = len(plans) + ("soft token" in families) + 2
    report = on_progress or (lambda done, total, label: None)
    prompts = [case.prompt for case in chosen]
    before = scored.score(model.encode(prompts), confirm=True)
    targets: list[soft_token.NoiseTarget] = []
    if "soft token" in families:
        targets = soft_token.noise_targets(
            model, prompts, steps=steps, guidance_scale=scale, seed=seed
        )
    report(1, total, "plain")
    embeds: dict[Attempt, Callable[[], Tensor]] = {}
    with change.applied(model):
        after = scored.score(model.encode(prompts), confirm=True)
        chance = scored.score(scored.reworded(""), confirm=True)
        for done, (family, words) in enumerate(plans, start=2):
            report(done, total, family)
            attempt = Attempt(family, words, scored.score(scored.reworded(words)))
            embeds[attempt] = lambda words=words: scored.reworded(words)
        if targets:
            attempt, features = _soft_attempt(model, scored, prompts, targets, budget)
            embeds[attempt] = lambda: features
        attempts = _confirmed(scored, embeds)
        report(total, total, "confirming")
    protocol = {
        **model.protocol(steps=steps, guidance_scale=scale), "scorer": scorer_name(scorer), "seed": seed,
        **asdict(budget), "prompts": prompts, "confirming_pictures": 2 * budget.pictures,
        "attempts": len(attempts), "score": scored.score_name, "change_digest": change.digest,
        "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip
    return Attack(cases.erase, before, after, chance, attempts, protocol)


@dataclass(frozen=True)
class _Scored:
    """Draws and scores the target prompts on one model, edited or not."""

    model: TextToImage
    scorer: FeatureScorer
    cases: Sequence[Case]
    erase: str
    pictures: int
    steps: int
    guidance_scale: float
    seed: int

    @property
    def label(self) -> tuple[str, str] | None:
        """Kind and label of the concept; `None` if the scorer has no label for it."""
        labels = getattr(self.scorer, "labels", None)
        try:
            return parse_concept(self.erase, labels) if labels else None
        except ValueError:
            return None

    @property
    def score_name(self) -> str:
        """Description of the score."""
        if self.label is None:
            return "cosine with the concept's text minus the other's"
        return f"probability of the {self.label[0]} {self.label[1]}"

    def reworded(self, words: str) -> Tensor:
        """Return the text features of the prompts with `words` in the place of the concept, shape (N, L, D)."""
        return self.model.encode(
            [replace_concept(case.prompt, self.erase, words) for case in self.cases]
        )

    def score(self, embeds: Tensor, *, confirm: bool = False) -> Interval:
        """Draw each row of `embeds` (N, L, D) from every seed and return the mean score, its interval over prompts."""
        count = self.pictures * (2 if confirm else 1)
        first = _CONFIRM if confirm else 0
        rows = [i for i in range(len(self.cases)) for _ in range(count)]
        seeds = [later_seed(self.seed, first + i) for i in range(len(rows))]
        latents = denoise(
            self.model, self.model.initial_latents(seeds, steps=self.steps), embeds[rows], self.model.encode([""]),
            steps=self.steps, guidance_scale=self.guidance_scale,
            generators=[Generator().manual_seed(s + 1) for s in seeds],
        )  # fmt: skip
        images = self.model.decode(latents).float().cpu()
        values = self._values(images, [self.cases[i] for i in rows])
        if self.label is None:  # cosines
            return metrics.bootstrap(values.tolist(), groups=rows)
        return metrics.share(values.clamp(0, 1).tolist(), groups=rows)

    def _values(self, images: Tensor, cases: Sequence[Case]) -> Tensor:
        """Return the score of each image (B, 3, H, W), shape (B,)."""
        if self.label is not None:
            kind, label = self.label
            classifier: Any = self.scorer
            column = list(classifier.labels[kind]).index(label)
            return classifier.classify(images, kind)[:, column]
        features = self.scorer.image_features(images)
        old = self.scorer.text_features([case.old for case in cases])
        score = metrics.clip_score(features, old)
        if all(case.new for case in cases):
            new = self.scorer.text_features([case.new for case in cases])
            score = score - metrics.clip_score(features, new)
        return score


def _soft_attempt(
    model: TextToImage,
    scored: _Scored,
    prompts: Sequence[str],
    targets: Sequence[soft_token.NoiseTarget],
    budget: Budget,
) -> tuple[Attempt, Tensor]:
    """Fit the soft token; return its attempt and the text features of the prompts with it."""
    soft, losses = soft_token.fit(
        model, prompts, scored.erase, targets,
        gradient_steps=budget.gradient_steps, rate=budget.rate,
    )  # fmt: skip
    words = f"one embedding after the prompt, noise error {losses[0]:.3g} to {losses[-1]:.3g}"
    with torch.no_grad():
        features = soft_token.encode_with(model, prompts, soft)
    return Attempt("soft token", words, scored.score(features)), features


def _confirmed(
    scored: _Scored, embeds: Mapping[Attempt, Callable[[], Tensor]]
) -> tuple[Attempt, ...]:
    """Draw the best attempt of each family again from other seeds; return all attempts, best first."""
    ranked = sorted(embeds, key=lambda a: -a.score.mean)
    best = {a.family: a for a in reversed(ranked)}
    return tuple(
        replace(a, confirmed=scored.score(embeds[a](), confirm=True)) if best[a.family] is a else a
        for a in ranked
    )


def _targets(model: TextToImage, cases: EvaluationSet, count: int) -> list[Case]:
    """Return the first `count` target cases whose prompt contains the concept once."""
    chosen: list[Case] = []
    for case in cases.cases:
        if case.role == "target" and len(chosen) < count:
            try:
                find_span(model.tokenizer, case.prompt, cases.erase)
            except ValueError:
                continue
            chosen.append(case)
    if not chosen:
        raise ValueError(
            f"no target prompt of {cases.name!r} contains {cases.erase!r} once: pass a set whose prompts do."
        )
    return chosen


def _plans(
    model: TextToImage, concept: str, families: Sequence[str], tokens: int
) -> Iterator[tuple[str, str]]:
    """Yield the family and the words of each attempt in text."""
    if "paraphrase" in families:
        yield from (("paraphrase", words) for words in paraphrases(concept))
    if "neighbour" in families:
        yield from (("neighbour", words) for words in neighbours(model, concept, tokens))


def _check_families(families: Sequence[str]) -> None:
    check_texts(families, "families")
    if not families:
        raise ValueError(f"`families` is empty: choose of {', '.join(FAMILIES)}.")
    for family in families:
        if family not in FAMILIES:
            raise ValueError(
                f"unknown family of attacks {family!r}: choose of {', '.join(FAMILIES)}."
            )
