"""Corruption: Gaussian noise on the token embeddings of the words that carry the attribute.

The encoder is causal: noise on positions s to e - 1 reaches every later position, end-of-text and
padding included, and no earlier one.

Source: Basu et al., 2024, https://arxiv.org/abs/2310.13730, section 3; the paper states neither
sigma nor the position. Both follow ROME (three standard deviations of the subjects' embeddings, added
at the input). Deviations: noise is drawn for each prompt and sample from a seed of its own, on the CPU;
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

__all__ = [
    "Corruption",
    "Noise",
    "Prompted",
    "check_probes",
    "corruptions",
    "noisy",
    "role_positions",
]

_FACTOR = re.compile(r"(\d+(?:\.\d+)?)std")


class Prompted(Protocol):
    """The attributes of a probe that the tracers read; `overpaint.probes.Probe` has them."""

    @property
    def id(self) -> str:
        """A unique name; seeds the noise."""
        ...

    @property
    def kind(self) -> str:
        """Kind of the attribute."""
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
class Noise:
    """Settings of the noise on the concept's token embeddings.

    Attributes:
        samples: Number of noise samples, and therefore of corruptions, for each prompt.
        sigma: Standard deviation, or a factor such as `"3std"`: three times the standard deviation of the concepts'
            embeddings.

    Raises:
        ValueError: A setting is out of range.
    """

    samples: int = 1
    sigma: float | str = "3std"

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"`samples` must be at least 1, got {self.samples}.")
        if isinstance(self.sigma, str):
            valid = _FACTOR.fullmatch(self.sigma) is not None
        else:
            valid = 0 <= self.sigma < float("inf")
        if not valid:
            raise ValueError(
                f"`sigma` must be a number from 0 on, or a factor such as '3std', got {self.sigma!r}."
            )

    def scale(self, embeds: Tensor) -> float:
        """Return the standard deviation of the noise, given the token embeddings (N, D) of the concepts."""
        if isinstance(self.sigma, str):
            return float(self.sigma.removesuffix("std")) * float(embeds.double().std())
        return float(self.sigma)


@dataclass(frozen=True)
class Corruption:
    """One corrupted prompt.

    Attributes:
        probe: The probe of the prompt.
        ids: Its padded token ids, shape (L,).
        span: The positions that are corrupted.
        eos: The first end-of-text position.
        noise: Noise added to their embeddings, float32, shape (len(span), D).
        sample: Number of the noise sample.
        others: Ids and noise for each further text encoder; its tokens have the same positions.
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

    def on_other_words(self) -> "Corruption | None":
        """Return the same noise on as many tokens outside the concept; `None` if the prompt has too few."""
        length = len(self.span)
        for start in range(1, self.eos - length + 1):
            other = Span(start, start + length)
            if other.end <= self.span.start or other.start >= self.span.end:
                return replace(self, span=other)
        return None


def corruptions(
    model: Any, probes: Sequence[Prompted], noise: Noise
) -> tuple[list[Corruption], float]:
    """Return one corruption for each probe and noise sample, and the standard deviation of the noise.

    Args:
        model: Its tokenizers and token embeddings are read.
        probes: Prompts with the concept's words.
        noise: Number of samples and standard deviation. A factor is computed for each text encoder from its own
            embeddings; the returned standard deviation is that of the first encoder.

    Raises:
        ValueError: There are no probes, or a concept is not in its prompt exactly once.
        UnsupportedModel: The model's tokenizers disagree on the position of a concept.
    """
    check_probes(probes)
    spans = [find_span(model.tokenizer, probe.prompt, probe.concept) for probe in probes]
    prompts = [probe.prompt for probe in probes]
    first, *further = [
        _Encoder(encoder, tokenizer, probes, spans, noise, model.tokenize(prompts, encoder=i))
        for i, (encoder, tokenizer) in enumerate(
            zip(model.text_encoders, model.tokenizers, strict=True)
        )
    ]
    corrupted = [
        Corruption(
            probe, first.ids[i], span, end_of_text(model.tokenizer, first.ids[i]),
            first.draw(f"{probe.id}:{sample}", span), sample,
            tuple((e.ids[i], e.draw(f"{probe.id}:{sample}:{n}", span)) for n, e in enumerate(further, 2)),
        )
        for i, (probe, span) in enumerate(zip(probes, spans, strict=True))
        for sample in range(noise.samples)
    ]  # fmt: skip
    return corrupted, first.scale


def check_probes(probes: Sequence[Prompted]) -> None:
    """Raise unless `probes` is a list of at least one probe.

    Raises:
        TypeError: It is one probe, a text, or holds something else than probes.
        ValueError: It is empty.
    """
    is_list = isinstance(probes, Sequence) and not isinstance(probes, str)
    if not is_list or not all(hasattr(probe, "concept") for probe in probes):
        raise TypeError(
            f"`probes` must be a list of probes, got {probes!r}: give `probes.load('style')`, or [probe] for one."
        )
    if not probes:
        raise ValueError(
            "`probes` is empty: give at least one, for example `probes.load('style')`."
        )


class _Encoder:
    """Token ids of all probes for one text encoder, shape (N, L), and the standard deviation of its noise."""

    def __init__(
        self,
        encoder: Any,
        tokenizer: Any,
        probes: Sequence[Prompted],
        spans: Sequence[Span],
        noise: Noise,
        ids: Tensor,
    ) -> None:
        for probe, span in zip(probes, spans, strict=True):
            if find_span(tokenizer, probe.prompt, probe.concept) != span:
                raise UnsupportedModel(
                    f"the model's tokenizers disagree on the position of {probe.concept!r} in {probe.prompt!r}: reword "
                    "the prompt, or use a model whose encoders share a vocabulary."
                )
        self.ids = ids
        table = encoder.get_input_embeddings().weight.detach()
        rows = [row[span.start : span.end] for row, span in zip(self.ids, spans, strict=True)]
        self.width = table.shape[1]
        self.scale = noise.scale(table[torch.cat(rows).to(table.device)])

    def draw(self, key: str, span: Span) -> Tensor:
        """Draw the noise of one probe and sample, shape (len(span), D); `key` is its seed."""
        seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big")
        generator = Generator().manual_seed(seed)
        return self.scale * torch.randn((len(span), self.width), generator=generator)


def role_positions(corruption: Corruption, roles: Sequence[str]) -> list[tuple[str, int]]:
    """Return (role, position) of every position whose role is among `roles`, in order.

    Raises:
        ValueError: No such role.
    """
    for role in roles:
        if role not in ROLES:
            raise ValueError(f"unknown position {role!r}: choose among {', '.join(ROLES)}.")
    span, eos = corruption.span, corruption.eos
    pairs = [("subject", position) for position in span.positions[:-1]]
    pairs.append(("last_subject", span.last))
    if span.end < eos:
        pairs.append(("after", span.end))
    pairs.append(("eos", eos))
    if eos + 1 < len(corruption.ids):
        pairs.append(("pad", eos + 1))
    return [(role, position) for role, position in pairs if role in roles]


@contextmanager
def noisy(
    text_encoder: Any, corruption: Corruption, *, first: int, end: int | None = None, part: int = 0
) -> Iterator[None]:
    """Add the noise to the token embeddings of rows `first` to `end - 1`, inside the block.

    Args:
        text_encoder: The text encoder.
        corruption: Span and noise.
        first: First row to corrupt.
        end: One past the last row, or `None` for all rows from `first` on.
        part: Index of this encoder among the model's text encoders.
    """
    span, noise = corruption.span, corruption.parts[part][1]

    def add(embeds: Tensor) -> Tensor:
        changed = embeds.clone()
        changed[first:end, span.start : span.end] += noise.to(embeds)
        return changed

    with hooks.patch({text_encoder.get_input_embeddings(): add}):
        yield
