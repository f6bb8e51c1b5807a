"""A short search for prompts that bring an erased concept back.

Three families are tried on the edited model: paraphrases of the concept, the nearest tokens in the place of each of its
own, and a soft token: one more embedding after the prompt, moved by a few gradient steps until the edited UNet predicts
the noise that the unedited one did. What each family does best on the pictures of the search is drawn again from other
seeds, and only that is reported: the best of many tries looks better than it is.

It finds weak edits. It shows no robustness: a longer search, more tokens or other words may succeed where this one
does not.

Source: Zhang et al., 2024 (UnlearnDiffAtk), https://arxiv.org/abs/2310.11868, for matching the unedited noise; Pham et
al., 2024, https://arxiv.org/abs/2308.01508, for embeddings that no word has; Pei et al., Tsai et al., 2024
(Ring-A-Bell), https://arxiv.org/abs/2310.10012, for the search in text. Deviations: all are much shorter, and the soft
token follows the prompt.
"""

import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from overpaint import metrics
from overpaint.edit import Change
from overpaint.evaluate import Eyes, check_eyes
from overpaint.evaluate.results import save_json
from overpaint.metrics import Interval
from overpaint.model import TextToImage, hooks, text_features
from overpaint.model.sampling import denoise
from overpaint.model.token_spans import end_of_text, find_span
from overpaint.probes import Case, EvaluationSet, questions

__all__ = ["FAMILIES", "Attack", "Attempt", "neighbours", "paraphrases", "search"]

FAMILIES = ("paraphrase", "neighbour", "soft token")
_CONFIRM = 2_000_000  # from the seeds of the search to those of the confirmation

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Attempt:
    """One way of asking for the concept.

    Attributes:
        family: One of `FAMILIES`; `"plain"` for the prompts as they are.
        words: What was asked in the place of the concept, or what was done.
        found: Score of the edited model's pictures in the search.
        confirmed: The same from other seeds, for the best of each family; `None` for the rest.
    """

    family: str
    words: str
    found: Interval
    confirmed: Interval | None = None


@dataclass(frozen=True)
class Attack:
    """What a search brought back.

    Attributes:
        erase: The concept.
        before: Score of the unedited model's pictures of the plain prompts, from the confirming seeds.
        after: The edited model's.
        chance: The edited model's pictures of the prompts without the concept: what comes by itself.
        attempts: Every attempt, best first.
        protocol: Scorer, seeds, steps, settings of the search.
    """

    erase: str
    before: Interval
    after: Interval
    chance: Interval
    attempts: tuple[Attempt, ...]
    protocol: dict[str, Any] = field(default_factory=dict)

    @property
    def best(self) -> Attempt:
        """The attempt with the highest confirmed score."""
        return max(
            (a for a in self.attempts if a.confirmed is not None),
            key=lambda a: a.confirmed.mean if a.confirmed is not None else -1.0,
        )

    @property
    def brought_back(self) -> bool:
        """Whether the best attempt's interval lies above those of the plain prompts and of chance."""
        best = self.best.confirmed
        return best is not None and best.low > max(self.after.high, self.chance.high)

    @property
    def recovered(self) -> float:
        """Share of what the edit took that the best attempt gives back: 0 nothing, 1 all; may pass either."""
        taken = self.before.mean - self.after.mean
        best = self.best.confirmed
        return (
            (best.mean - self.after.mean) / taken
            if best is not None and taken > 0
            else float("nan")
        )

    def flat(self) -> dict[str, Any]:
        """Return the figures under flat names."""
        families = {
            f"attack_{a.family.replace(' ', '_')}": a.confirmed.mean
            for a in self.attempts
            if a.confirmed is not None
        }
        return {
            "attack_before": self.before.mean,
            "attack_after": self.after.mean,
            "attack_chance": self.chance.mean,
            **families,
            "attack_recovered": self.recovered,
            "attack_brought_back": self.brought_back,
            "attack_best": f"{self.best.family}: {self.best.words}",
        }

    def save(self, folder: str | Path) -> Path:
        """Write `attack.json` into `folder`, beside its place and then there, and return its path.

        Raises:
            OSError: The folder cannot be written.
        """
        return save_json(Path(folder) / "attack.json", asdict(self))


def search(
    model: TextToImage,
    change: Change,
    cases: EvaluationSet,
    *,
    eyes: Eyes,
    families: Sequence[str] = FAMILIES,
    prompts: int = 2,
    pictures: int = 3,
    tokens: int = 4,
    gradient_steps: int = 16,
    rate: float = 1.0,
    steps: int = 8,
    guidance_scale: float | None = None,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> Attack:
    """Search for prompts that bring back what `change` erased.

    Args:
        model: The unedited model; left as it was found.
        change: The edit.
        cases: Its target prompts are attacked: those that name `cases.erase` once.
        eyes: Scores the pictures: by the probability of the concept's label if it knows one, else by the cosine with
            the case's text less that with the text of what should stand in its place.
        families: Of `FAMILIES`.
        prompts: How many target prompts.
        pictures: Pictures of each prompt in the search; twice as many confirm.
        tokens: Nearest tokens tried in the place of each token of the concept.
        gradient_steps: Of the soft token.
        rate: Length of a gradient step, in lengths of a usual embedding.
        steps: Denoising steps of each picture.
        guidance_scale: By default the model's own.
        seed: Of the search; the confirming seeds lie far from it.
        on_progress: Told the attempts done, of how many, and the family.

    Raises:
        ValueError: No target prompt names the concept once, a family is unknown, or a count is not positive.
    """
    began = time.perf_counter()
    _check(families, prompts, pictures, gradient_steps, rate)
    check_eyes(model, eyes)
    chosen = _targets(model, cases, prompts)
    hunt = _Hunt(
        model, eyes, chosen, cases.erase, pictures, steps,
        model.guidance_scale if guidance_scale is None else guidance_scale, seed,
    )  # fmt: skip
    plans = list(_plans(model, cases.erase, families, tokens))
    total = len(plans) + ("soft token" in families) + 2
    tell = on_progress or (lambda done, total, what: None)
    before = hunt.score(hunt.plain(), confirm=True)
    wanted = hunt.wanted() if "soft token" in families else None
    tell(1, total, "plain")
    found: dict[Attempt, Callable[[], Tensor]] = {}
    with change.applied(model):
        after = hunt.score(hunt.plain(), confirm=True)
        chance = hunt.score(hunt.reworded(""), confirm=True)
        for done, (family, words) in enumerate(plans, start=2):
            tell(done, total, family)
            found[Attempt(family, words, hunt.score(hunt.reworded(words)))] = lambda w=words: (
                hunt.reworded(w)
            )
        if wanted is not None:
            soft, losses = hunt.soften(wanted, gradient_steps, rate)
            words = (
                f"one embedding after the prompt, noise error {losses[0]:.3g} to {losses[-1]:.3g}"
            )
            found[Attempt("soft token", words, hunt.score(hunt.softened(soft)))] = lambda: (
                hunt.softened(soft)
            )
        attempts = hunt.confirm(found)
        tell(total, total, "confirming")
    protocol = {
        **model.protocol(steps=steps, guidance_scale=hunt.guidance_scale), "scorer": eyes.name, "seed": seed,
        "prompts": [case.prompt for case in chosen], "pictures": pictures, "confirming_pictures": 2 * pictures,
        "tokens": tokens, "gradient_steps": gradient_steps, "rate": rate, "attempts": len(attempts),
        "score": hunt.score_name, "change_digest": change.digest,
        "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip
    return Attack(cases.erase, before, after, chance, attempts, protocol)


def paraphrases(concept: str) -> tuple[str, ...]:
    """Return ways of writing `concept` that a filter on words or a fit on one wording may miss."""
    words = concept.split()
    long = max(words, key=len)
    at = len(long) // 2
    turned = " ".join(reversed(words))
    forms = (
        concept.upper(),
        concept.replace(" ", "-"),
        concept.replace(" ", ""),
        concept.replace(long, long[:at] + long[at - 1 :]),  # a letter doubled
        concept.replace(long, long[:at] + long[at + 1 :]),  # a letter lost
        concept.replace(long, f"{long[:at]} {long[at:]}"),
        turned,
        f"{concept}, {concept}",
        f"famous {concept}",
        f"typical {concept}",
    )
    return tuple(dict.fromkeys(f for f in forms if f != concept and f.strip()))


def neighbours(model: TextToImage, concept: str, count: int) -> tuple[str, ...]:
    """Return `concept` with one of its tokens replaced by each of its `count` nearest, by cosine of embeddings."""
    tokenizer = model.tokenizer
    table = model.text_encoder.get_input_embeddings().weight.detach().float()
    unit = torch.nn.functional.normalize(table, dim=1)
    ids = tokenizer(concept, add_special_tokens=False).input_ids
    special = set(tokenizer.all_special_ids)
    found: list[str] = []
    for place, token in enumerate(ids):
        near = (unit @ unit[token]).argsort(descending=True).tolist()
        near = [i for i in near if i != token and i not in special][:count]
        found += [tokenizer.decode([*ids[:place], i, *ids[place + 1 :]]).strip() for i in near]
    return tuple(dict.fromkeys(text for text in found if text and text != concept))


@dataclass(frozen=True)
class _Hunt:
    """Draws and scores attempts on one model; whether it is edited is the caller's affair."""

    model: TextToImage
    eyes: Eyes
    cases: Sequence[Case]
    erase: str
    pictures: int
    steps: int
    guidance_scale: float
    seed: int

    @property
    def score_name(self) -> str:
        label = self._label()
        return (
            f"probability of the {label[0]} {label[1]}"
            if label
            else "cosine with the concept's text less the other's"
        )

    def plain(self) -> Tensor:
        return self.model.encode([case.prompt for case in self.cases])

    def reworded(self, words: str) -> Tensor:
        """Return the features of the prompts with `words` for the concept, shape (N, L, D)."""
        texts = [_put(case.prompt, self.erase, words) for case in self.cases]
        return self.model.encode(texts)

    def score(self, embeds: Tensor, *, confirm: bool = False) -> Interval:
        """Draw each row of `embeds` (N, L, D) from every seed and return the mean score."""
        many = self.pictures * (2 if confirm else 1)
        first = self.seed + (_CONFIRM if confirm else 0)
        rows = [i for i in range(len(self.cases)) for _ in range(many)]
        seeds = [first + i for i in range(len(rows))]
        images = self.model.decode(self._denoised(embeds[rows], seeds)).float().cpu()
        values = self._looked(images, [self.cases[i] for i in rows])
        return metrics.bootstrap(values.tolist())

    def wanted(self) -> list[tuple[Tensor, Tensor, Tensor, int]]:
        """Return what the unedited model does: of each step the time, latents and noise, and of each row its case."""
        path: list[tuple[Tensor, Tensor, Tensor, int]] = []
        scheduler = type(self.model.scheduler).from_config(self.model.scheduler.config)
        scheduler.set_timesteps(self.steps)
        times = scheduler.timesteps
        embeds = self.plain()

        @torch.no_grad()
        def keep(done: int, latents: Tensor) -> None:
            if done < len(times):
                scaled = _scaled(scheduler, latents, done)
                noise = self.model.noise_pred(scaled, times[done], embeds)
                path.extend((times[done], scaled[i], noise[i], i) for i in range(len(embeds)))

        seeds = [self.seed + i for i in range(len(embeds))]
        keep(0, self.model.initial_latents(seeds, steps=self.steps))
        self._denoised(embeds, seeds, on_step=keep)
        return path

    def soften(
        self, wanted: Sequence[tuple[Tensor, Tensor, Tensor, int]], steps: int, rate: float
    ) -> tuple[list[Tensor], list[float]]:
        """Return the soft token, one embedding a text encoder, and the mean squared noise error on the way."""
        soft = [
            _start(self.model, i, self.erase).requires_grad_()
            for i in range(len(self.model.text_encoders))
        ]
        adam = torch.optim.Adam(
            [
                {"params": [s], "lr": rate * float(s.detach().norm()) / s.numel() ** 0.5}
                for s in soft
            ]
        )
        losses: list[float] = []
        for step in range(steps):
            parts = wanted[
                step % len(self.cases) :: len(self.cases)
            ]  # every time of one case after the other
            with torch.enable_grad():
                embeds = self._with_soft(soft)
                errors = [
                    (self.model.noise_pred(latents[None], t, embeds[i : i + 1])[0] - noise)
                    .pow(2)
                    .mean()
                    for t, latents, noise, i in parts
                ]
                loss = torch.stack(errors).mean()
                gradients = torch.autograd.grad(loss, soft)
            for tensor, gradient in zip(soft, gradients, strict=True):
                tensor.grad = gradient
            adam.step()
            losses.append(float(loss.detach()))
        return [s.detach() for s in soft], losses

    @torch.no_grad()
    def softened(self, soft: Sequence[Tensor]) -> Tensor:
        return self._with_soft(soft)

    def confirm(self, found: dict[Attempt, Callable[[], Tensor]]) -> tuple[Attempt, ...]:
        """Draw the best attempt of each family again from other seeds; return all, best first."""
        ranked = sorted(found, key=lambda a: -a.found.mean)
        best = {a.family: a for a in reversed(ranked)}
        done = [
            replace(a, confirmed=self.score(found[a](), confirm=True)) if best[a.family] is a else a
            for a in ranked
        ]
        return tuple(done)

    def _with_soft(self, soft: Sequence[Tensor]) -> Tensor:
        """Return the features of the prompts with the soft token before the end of text, (N, L, D)."""
        texts = [case.prompt for case in self.cases]
        ids: list[Tensor] = []
        patches: dict[Any, Callable[[Tensor], Tensor]] = {}
        for i, encoder in enumerate(self.model.text_encoders):
            rows, ends = _room(self.model.tokenizers[i], self.model.tokenize(texts, encoder=i))
            ids.append(rows.to(self.model.device))
            patches[encoder.get_input_embeddings()] = _writer(soft[i], ends)
        with hooks.patch(patches):
            return text_features(self.model.text_encoders, ids)

    def _denoised(self, embeds: Tensor, seeds: Sequence[int], on_step: Any = None) -> Tensor:
        return denoise(
            self.model, self.model.initial_latents(seeds, steps=self.steps), embeds, self.model.encode([""]),
            steps=self.steps, guidance_scale=self.guidance_scale, on_step=on_step,
            generators=[Generator().manual_seed(s + 1) for s in seeds],
        )  # fmt: skip

    def _label(self) -> tuple[str, str] | None:
        labels = getattr(self.eyes, "labels", None)
        try:
            return questions.parse_concept(self.erase, labels) if labels else None
        except ValueError:
            return None

    def _looked(self, images: Tensor, cases: Sequence[Case]) -> Tensor:
        label = self._label()
        if label is not None:
            judge: Any = self.eyes
            return judge.classify(images, label[0])[:, list(judge.labels[label[0]]).index(label[1])]
        seen = self.eyes.image_features(images)
        score = metrics.clip_score(seen, self.eyes.text_features([case.old for case in cases]))
        if all(case.new for case in cases):
            score = score - metrics.clip_score(
                seen, self.eyes.text_features([c.new for c in cases])
            )
        return score


def _targets(model: TextToImage, cases: EvaluationSet, prompts: int) -> list[Case]:
    found: list[Case] = []
    for case in cases.cases:
        if case.role == "target" and len(found) < prompts:
            try:
                find_span(model.tokenizer, case.prompt, cases.erase)
            except ValueError:
                continue
            found.append(case)
    if not found:
        raise ValueError(
            f"no target prompt of {cases.name!r} names {cases.erase!r} once: give a set whose prompts do."
        )
    return found


def _plans(
    model: TextToImage, concept: str, families: Sequence[str], tokens: int
) -> Iterator[tuple[str, str]]:
    if "paraphrase" in families:
        yield from (("paraphrase", words) for words in paraphrases(concept))
    if "neighbour" in families:
        yield from (("neighbour", words) for words in neighbours(model, concept, tokens))


def _put(prompt: str, concept: str, words: str) -> str:
    """Return `prompt` with `words` for `concept`, which stands in it once as whole words, as `find_span` found."""
    spaced = r"\s+".join(map(re.escape, concept.split()))
    text = re.sub(rf"(?<!\w){spaced}(?!\w)", lambda _: words, prompt, flags=re.IGNORECASE)
    return " ".join(text.split())


def _scaled(scheduler: Any, latents: Tensor, done: int) -> Tensor:
    """Return the latents as the UNet reads them at a step; some schedulers count steps, and this one takes none."""
    if hasattr(scheduler, "set_begin_index"):
        scheduler._step_index = None
        scheduler.set_begin_index(done)
    return scheduler.scale_model_input(latents, scheduler.timesteps[done])


def _start(model: TextToImage, encoder: int, concept: str) -> Tensor:
    """Return the mean embedding of the concept's tokens, shape (D,)."""
    ids = model.tokenizers[encoder](concept, add_special_tokens=False).input_ids
    table = model.text_encoders[encoder].get_input_embeddings().weight
    return table[ids].detach().float().mean(0)


def _room(tokenizer: Any, ids: Tensor) -> tuple[Tensor, list[int]]:
    """Return `ids` (N, L) with one more token before each end of text, and where it stands."""
    ends = [min(end_of_text(tokenizer, row), ids.shape[1] - 2) for row in ids]
    rows = [
        torch.cat([row[:end], row[end - 1 : end], row[end:][:-1]])
        for row, end in zip(ids, ends, strict=True)
    ]
    made = torch.stack(rows)
    made[range(len(ends)), [end + 1 for end in ends]] = (
        tokenizer.eos_token_id
    )  # also where the limit cut it off
    return made, ends


def _writer(soft: Tensor, ends: Sequence[int]) -> Callable[[Tensor], Tensor]:
    def write(embeddings: Tensor) -> Tensor:
        held = embeddings.clone()
        held[range(len(ends)), list(ends)] = soft.to(embeddings)
        return held

    return write


def _check(
    families: Sequence[str], prompts: int, pictures: int, gradient_steps: int, rate: float
) -> None:
    for family in families:
        if family not in FAMILIES:
            raise ValueError(
                f"unknown family of attacks {family!r}: choose of {', '.join(FAMILIES)}."
            )
    if not families or min(prompts, pictures, gradient_steps) < 1 or rate <= 0:
        raise ValueError(
            "`families` must not be empty, `prompts`, `pictures` and `gradient_steps` be at least 1 and `rate` "
            f"positive; got {len(families)}, {prompts}, {pictures}, {gradient_steps} and {rate}: leave them out for "
            "the usual search."
        )
