"""A short search for inputs that bring an erased concept back.

Families of attempts by a prompt: paraphrases of the concept; the concept in other languages and spellings; tokens with
similar embeddings in the place of each of its tokens; the unedited rows of the token embedding in its place; and soft
tokens in its place, see `overpaint.evaluate.soft_token`. One family needs no text: pictures of the concept are
inverted to their initial noise on the unedited model, with the empty prompt, and the edited model draws this noise with
the empty prompt. A change of text encoders leaves the UNet as it is, so these pictures return after every such change.

The best attempt of each family by a prompt is drawn again from other seeds, and only that score is reported, because
the best score of many attempts is biased upwards by the selection. The inversion is one attempt without selection.

The search finds weak edits. It does not show that an edit is robust: a longer search, more tokens or other words may
succeed where this one fails.

Source: Zhang et al., 2024 (UnlearnDiffAtk), https://arxiv.org/abs/2310.11868, for matching the unedited noise; Pham et
al., 2024, https://arxiv.org/abs/2308.01508, for embeddings in the place of the concept; Tsai et al., 2024
(Ring-A-Bell), https://arxiv.org/abs/2310.10012, for the search in text; Rusanovsky et al., 2025,
https://arxiv.org/abs/2412.00782, for initial noise that draws an erased concept. Deviations: all are much shorter; the
soft tokens are as many as the concept's tokens and start from a neutral row; the noise is inverted on the unedited
model, because an exact inversion on the edited one would return every picture.
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
from overpaint.evaluate.attack_results import TEXT_FREE, Attack, Attempt
from overpaint.evaluate.metrics_on_sets import check_change, check_uncut
from overpaint.evaluate.rewordings import (
    distinct,
    neighbours,
    paraphrases,
    replace_concept,
    translations,
)
from overpaint.metrics import Interval
from overpaint.model import TextToImage
from overpaint.model.sampling import Progress, denoise, invert, make_scheduler
from overpaint.model.token_spans import find_span
from overpaint.probes import Case, EvaluationSet
from overpaint.probes.questions import parse_concept
from overpaint.scorers.protocols import FeatureScorer, check_size, scorer_name

__all__ = ["FAMILIES", "Attack", "Attempt", "Budget", "search"]

FAMILIES = ("paraphrase", "translation", "neighbour", "old rows", "soft token", TEXT_FREE)
_CONFIRM = 2_000_000  # offset of the seeds of the confirmation


@dataclass(frozen=True)
class Budget:
    """Size of a search.

    Attributes:
        prompts: Target prompts.
        pictures: Pictures of each prompt in the search; the confirmation draws twice as many.
        tokens: Nearest tokens tried in the place of each token of the concept.
        gradient_steps: Gradient steps of the soft tokens.
        rate: Length of a gradient step, relative to the standard deviation of the numbers in the token embedding.

    Raises:
        ValueError: A value is not positive.
    """

    prompts: int = 2
    pictures: int = 3
    tokens: int = 4
    gradient_steps: int = 16
    rate: float = 0.3

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
    """Search for inputs that bring back the concept that `change` erased.

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
    total = len(plans) + sum(family in families for family in FAMILIES[3:]) + 2
    report = on_progress or (lambda done, total, label: None)
    latents = scored.draw(scored.plain(), confirm=True)
    before = scored.score_latents(latents)
    rows = soft_token.concept_rows(model, cases.erase)
    targets = scored.noise_targets() if "soft token" in families else []
    noise = scored.inverted(latents) if TEXT_FREE in families else None
    report(1, total, "plain")
    encoders: dict[Attempt, Callable[[], Tensor]] = {}
    with change.applied(model):
        after = scored.score(scored.plain(), confirm=True)
        chance = scored.score(scored.reworded(""), confirm=True)
        trials = _trials(scored, plans, rows if "old rows" in families else None, targets, budget)
        for done, (family, words, encode) in enumerate(trials, start=2):
            report(done, total, family)
            encoders[Attempt(family, words, scored.score(encode()))] = encode
        attempts = _confirmed(scored, encoders)
        if noise is not None:
            attempts = (*attempts, _redrawn(scored, noise))
        report(total, total, "confirming")
    protocol = {
        **model.protocol(steps=steps, guidance_scale=scale), "scorer": scorer_name(scorer), "seed": seed,
        **asdict(budget), "prompts": scored.prompts, "confirming_pictures": 2 * budget.pictures,
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

    @property
    def prompts(self) -> list[str]:
        """The target prompts."""
        return [case.prompt for case in self.cases]

    def plain(self) -> Tensor:
        """Return the text features of the prompts as they are, shape (N, L, D)."""
        return self.model.encode(self.prompts)

    def noise_targets(self) -> list[soft_token.NoiseTarget]:
        """Return the noise that the model predicts for the prompts as they are."""
        return soft_token.noise_targets(
            self.model, self.prompts, steps=self.steps, guidance_scale=self.guidance_scale, seed=self.seed
        )  # fmt: skip

    def reworded(self, words: str) -> Tensor:
        """Return the text features of the prompts with `words` in the place of the concept, shape (N, L, D)."""
        return self.model.encode(
            [replace_concept(case.prompt, self.erase, words) for case in self.cases]
        )

    @torch.no_grad()
    def with_rows(self, rows: Sequence[Tensor]) -> Tensor:
        """Return the text features of the prompts with embedding rows in the place of the concept, shape (N, L, D)."""
        return soft_token.encode_with(self.model, self.prompts, self.erase, rows)

    def score(self, embeds: Tensor, *, confirm: bool = False) -> Interval:
        """Draw each row of `embeds` (N, L, D) from every seed and return the mean score, its interval over prompts."""
        return self.score_latents(self.draw(embeds, confirm=confirm))

    def draw(self, embeds: Tensor, *, confirm: bool = False) -> Tensor:
        """Return the denoised latents of each row of `embeds` (N, L, D) from every seed, prompt by prompt."""
        count = self.pictures * (2 if confirm else 1)
        first = _CONFIRM if confirm else 0
        rows = [i for i in range(len(self.cases)) for _ in range(count)]
        seeds = [later_seed(self.seed, first + i) for i in range(len(rows))]
        return denoise(
            self.model, self.model.initial_latents(seeds, steps=self.steps), embeds[rows], self.model.encode([""]),
            steps=self.steps, guidance_scale=self.guidance_scale,
            generators=[Generator().manual_seed(s + 1) for s in seeds],
        )  # fmt: skip

    def inverted(self, latents: Tensor) -> Tensor:
        """Return the initial noise of latents (B, C, h, w) under the empty prompt, by two steps or more."""
        empty = self.model.encode([""]).expand(len(latents), -1, -1)
        return invert(self.model, latents, empty, steps=max(self.steps, 2))

    def redrawn(self, noise: Tensor) -> Tensor:
        """Return the latents that DDIM draws from `noise` (B, C, h, w) with the empty prompt."""
        empty = self.model.encode([""])
        return denoise(
            self.model, noise, empty.expand(len(noise), -1, -1), empty,
            steps=max(self.steps, 2), guidance_scale=1, scheduler=make_scheduler(self.model, "ddim"),
        )  # fmt: skip

    def score_latents(self, latents: Tensor) -> Interval:
        """Return the mean score of the pictures of `latents` (B, C, h, w), as many for each prompt in turn."""
        count = len(latents) // len(self.cases)
        rows = [i for i in range(len(self.cases)) for _ in range(count)]
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


def _trials(
    scored: _Scored,
    plans: Sequence[tuple[str, str]],
    rows: Sequence[Tensor] | None,
    targets: Sequence[soft_token.NoiseTarget],
    budget: Budget,
) -> Iterator[tuple[str, str, Callable[[], Tensor]]]:
    """Yield for each attempt its family, words, and a function that returns the text features of the prompts.

    Args:
        scored: The prompts and the edited model.
        plans: Families and words of the attempts in text.
        rows: Unedited rows of the concept's tokens, if they are tried.
        targets: Noise that soft tokens are fitted to; empty if they are not tried.
        budget: Size of the search.
    """
    for family, words in plans:
        yield family, words, lambda words=words: scored.reworded(words)
    if rows is not None:
        words = f"unedited rows of {_tokens(rows)}"
        yield "old rows", words, lambda: scored.with_rows(rows)
    if targets:
        soft, losses = soft_token.fit(
            scored.model, scored.prompts, scored.erase, targets,
            gradient_steps=budget.gradient_steps, rate=budget.rate,
        )  # fmt: skip
        words = (
            f"{_tokens(soft)} that are no words, noise error {losses[0]:.3g} to {losses[-1]:.3g}"
        )
        yield "soft token", words, lambda: scored.with_rows(soft)


def _redrawn(scored: _Scored, noise: Tensor) -> Attempt:
    """Return the attempt that draws the inverted pictures of the concept again."""
    score = scored.score_latents(scored.redrawn(noise))
    words = f"no prompt, initial noise of {len(noise)} pictures (standard deviation {noise.float().std():.2f})"
    return Attempt(TEXT_FREE, words, score, score)


def _tokens(rows: Sequence[Tensor]) -> str:
    count = len(rows[0])
    return f"{count} token{'' if count == 1 else 's'}"


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
    forms = {
        "paraphrase": lambda: paraphrases(concept),
        "translation": lambda: translations(model.tokenizer, concept),
        "neighbour": lambda: neighbours(model, concept, tokens),
    }
    tried = [concept]
    for family, texts in forms.items():
        if family in families:
            new = distinct(model.tokenizer, texts(), besides=tried)
            tried += new
            yield from ((family, words) for words in new)


def _check_families(families: Sequence[str]) -> None:
    check_texts(families, "families")
    if not families:
        raise ValueError(f"`families` is empty: choose of {', '.join(FAMILIES)}.")
    for family in families:
        if family not in FAMILIES:
            raise ValueError(
                f"unknown family of attacks {family!r}: choose of {', '.join(FAMILIES)}."
            )
