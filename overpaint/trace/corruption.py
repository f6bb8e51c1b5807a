"""Corruption: Gaussian noise on the token embeddings of the words that carry the attribute.

The encoder is causal: noise on positions s to e - 1 reaches every later position, end-of-text and
padding included, and none before s.

Source: Basu et al., 2024, https://arxiv.org/abs/2310.13730, section 3; the paper states neither
sigma nor the place. Both follow ROME (three standard deviations of the subjects' embeddings, added
at the input). Deviations: noise is drawn per prompt and sample from a seed of its own, on the CPU;
with two text encoders (SDXL) the words are corrupted in both.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Generator, Tensor

from overpaint.errors import UnsupportedModel
from overpaint.model import hooks
from overpaint.model.token_spans import Span, end_of_text, find_span
from overpaint.trace.states import ROLES

__all__ = ["ROLES", "Corruption", "Prompted", "corruptions", "noisy", "places"]


class Prompted(Protocol):
    """What tracing needs of a probe; `overpaint.probes.Probe` is one."""

    @property
    def id(self) -> str:
        """A unique name; seeds the noise."""
        ...

    @property
    def kind(self) -> str:
        """The attribute."""
        ...

    @property
    def prompt(self) -> str:
        """The caption."""
        ...

    @property
    def concept(self) -> str:
        """The words of the caption that carry the attribute."""
        ...


@dataclass(frozen=True)
class Corruption:
    """One corrupted prompt.

    Attributes:
        probe: The question.
        ids: Its padded token ids, shape (L,).
        span: The positions that are corrupted.
        eos: The first end-of-text position.
        noise: What is added to their embeddings, float32, shape (len(span), D).
        sample: Which noise sample.
        others: Ids and noise for each further text encoder, whose tokens stand at the same places.
    """

    probe: Any
    ids: Tensor
    span: Span
    eos: int
    noise: Tensor
    sample: int
    others: tuple[tuple[Tensor, Tensor], ...] = ()

    @property
    def parts(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """Ids and noise for each text encoder."""
        return ((self.ids, self.noise), *self.others)

    def elsewhere(self) -> "Corruption | None":
        """Return the same noise on words of equal length that are not the concept, if there are any."""
        length = len(self.span)
        for start in range(1, self.eos - length + 1):
            other = Span(start, start + length)
            if other.end <= self.span.start or other.start >= self.span.end:
                return replace(self, span=other)
        return None


def corruptions(
    model: Any, probes: Sequence[Prompted], *, noise_samples: int, sigma: float | str
) -> tuple[list[Corruption], float]:
    """Return one corruption for each probe and noise sample, and the noise's standard deviation.

    Args:
        model: Whose tokenizers and embeddings to use.
        probes: The questions.
        noise_samples: Noise tensors a probe.
        sigma: Standard deviation, or `"3std"` (any number before `std`) for so many times that of the
            subjects' embeddings; with two encoders each has its own, and the first's is returned.

    Raises:
        ValueError: No probes, a concept that is not in its prompt once, or a setting out of range.
        UnsupportedModel: The model's tokenizers disagree on where a concept stands.
    """
    if not probes:
        raise ValueError(
            "`probes` is empty: give at least one, for example `probes.load('style')`."
        )
    if noise_samples < 1:
        raise ValueError(f"`noise_samples` must be at least 1, got {noise_samples}.")
    spans = [find_span(model.tokenizer, probe.prompt, probe.concept) for probe in probes]
    found = [
        _Vocabulary(encoder, tokenizer, probes, spans, sigma)
        for encoder, tokenizer in zip(model.text_encoders, model.tokenizers, strict=True)
    ]
    first, *further = found
    made = [
        Corruption(
            probe, first.ids[i], span, end_of_text(model.tokenizer, first.ids[i]),
            first.noise(f"{probe.id}:{sample}", span), sample,
            tuple((v.ids[i], v.noise(f"{probe.id}:{sample}:{n}", span)) for n, v in enumerate(further, 2)),
        )
        for i, (probe, span) in enumerate(zip(probes, spans, strict=True))
        for sample in range(noise_samples)
    ]  # fmt: skip
    return made, first.scale


class _Vocabulary:
    """What one encoder reads: the ids of all probes, shape (N, L), and the scale of its noise."""

    def __init__(
        self,
        encoder: Any,
        tokenizer: Any,
        probes: Sequence[Prompted],
        spans: Sequence[Span],
        sigma: float | str,
    ) -> None:
        for probe, span in zip(probes, spans, strict=True):
            if find_span(tokenizer, probe.prompt, probe.concept) != span:
                raise UnsupportedModel(
                    f"the model's tokenizers disagree on where {probe.concept!r} stands in {probe.prompt!r}: reword "
                    "the prompt, or use a model whose encoders share a vocabulary."
                )
        self.ids = tokenizer(
            [probe.prompt for probe in probes], padding="max_length", truncation=True,
            max_length=tokenizer.model_max_length, return_tensors="pt",
        ).input_ids  # fmt: skip
        table = encoder.get_input_embeddings().weight.detach()
        rows = [row[span.start : span.end] for row, span in zip(self.ids, spans, strict=True)]
        self.width = table.shape[1]
        self.scale = _sigma(sigma, table[torch.cat(rows).to(table.device)])

    def noise(self, key: str, span: Span) -> Tensor:
        """Draw the noise of one probe and sample, shape (len(span), D)."""
        return self.scale * _draw(key, (len(span), self.width))


def places(corruption: Corruption, roles: Sequence[str]) -> list[tuple[str, int]]:
    """Return (role, position) of every position that plays one of `roles`, in order.

    Raises:
        ValueError: No such role.
    """
    for role in roles:
        if role not in ROLES:
            raise ValueError(f"unknown position {role!r}: choose among {', '.join(ROLES)}.")
    span, eos = corruption.span, corruption.eos
    found = [("subject", position) for position in span.positions[:-1]]
    found.append(("last_subject", span.last))
    if span.end < eos:
        found.append(("after", span.end))
    found.append(("eos", eos))
    if eos + 1 < len(corruption.ids):
        found.append(("pad", eos + 1))
    return [(role, position) for role, position in found if role in roles]


@contextmanager
def noisy(
    text_encoder: Any, corruption: Corruption, *, first: int, past: int | None = None, part: int = 0
) -> Iterator[None]:
    """Add the noise to the token embeddings of rows `first` to `past - 1`, inside the block.

    Args:
        text_encoder: The encoder to disturb.
        corruption: Span and noise.
        first: First row to corrupt.
        past: One past the last, or `None` for all from `first` on.
        part: Which of the model's encoders this is.
    """
    span, noise = corruption.span, corruption.parts[part][1]

    def add(embeds: Tensor) -> Tensor:
        changed = embeds.clone()
        changed[first:past, span.start : span.end] += noise.to(embeds)
        return changed

    with hooks.patch({text_encoder.get_input_embeddings(): add}):
        yield


def _sigma(sigma: float | str, embeds: Tensor) -> float:
    factor = re.fullmatch(r"(\d+(?:\.\d+)?)std", sigma) if isinstance(sigma, str) else None
    if factor:
        return float(factor[1]) * float(embeds.double().std())
    if isinstance(sigma, str) or not 0 <= sigma < float("inf"):
        raise ValueError(
            f"`sigma` must be a number from 0 on, or a factor such as '3std', got {sigma!r}."
        )
    return float(sigma)


def _draw(key: str, shape: tuple[int, int]) -> Tensor:
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big")
    return torch.randn(shape, generator=Generator().manual_seed(seed))
