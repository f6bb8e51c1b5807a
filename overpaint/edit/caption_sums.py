"""Captions that an automatic edit fits and captions that it preserves, and the sums over their keys.

Memory does not grow with the number of captions: for each concept, and for all preserved captions, only sums over keys
are stored.
"""

import dataclasses
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from overpaint.edit import vocabulary as vocabularies
from overpaint.edit.captions import Pair, align_captions, gather, layer_inputs
from overpaint.edit.concept_words import contains, words
from overpaint.edit.least_squares import product
from overpaint.edit.weights import encoder_index, find_weight
from overpaint.model import TextToImage

__all__ = [
    "TEST_CAPTIONS", "Reader", "Sums", "background_captions", "background_gram", "concept_captions", "extended_pair",
    "extended_pairs", "known_concepts", "other_concepts", "preserved_captions",
]  # fmt: skip

Term = dict[str, Any]
TEST_CAPTIONS = 64  # captions of each concept that are not fitted; reports measure on them
_CHUNK = 256  # captions encoded at once
_PER_CONCEPT = 8  # captions of a preserved concept
_EMPTY = 0.05  # weight of the empty prompt in the background: guidance uses it for every picture


@dataclass(frozen=True, eq=False)
class Sums:
    """Sums over a concept's keys K and residuals R that a least-squares fit needs, as means over captions.

    Attributes:
        gram: K^T K, shape (D_in, D_in).
        cross: R^T K, shape (D_out, D_in).
        energy: Squared norm of R.
    """

    gram: Tensor
    cross: Tensor
    energy: float

    def missed(self, delta: Tensor) -> float:
        """Return the squared residual left by the movement `delta`, relative to `energy`: 1 for no movement."""
        quadratic = float((delta @ self.gram * delta).sum() - 2 * (delta * self.cross).sum())
        return (quadratic + self.energy) / self.energy if self.energy else 0.0

    def equivalent_rows(self) -> tuple[Tensor, Tensor]:
        """Return keys (N, D_in) and residuals (N, D_out) with the same sums; N is at most D_in."""
        values, vectors = torch.linalg.eigh(self.gram)
        positive = values > 1e-12 * values[-1].clamp(min=1e-300)
        sizes, vectors = values[positive].sqrt(), vectors[:, positive]
        return sizes[:, None] * vectors.T, (self.cross @ vectors / sizes).T


@dataclass(frozen=True, eq=False)
class Reader:
    """Sums over the inputs of one weight of a text encoder.

    Attributes:
        model: The model.
        site: Name of the weight.
        weight: Its values, float64, shape (D_out, D_in).
    """

    model: TextToImage
    site: str
    weight: Tensor

    @classmethod
    def at_layer(cls, model: TextToImage, layer: int, part: str = "text") -> "Reader":
        """Return the reader of the `out_proj` of a layer of the text encoder `part`."""
        site = f"{part}.{layer}.self_attn.out_proj"
        weight = find_weight(model, site).parameter
        return cls(model, site, weight.detach().to("cpu", torch.float64))

    @property
    def part(self) -> str:
        """The text encoder, `"text"` or `"text2"`."""
        return self.site.partition(".")[0]

    def gram(self, captions: Sequence[str]) -> Tensor:
        """Return the mean of H^T H over captions, float64, where H (L, D_in) are the inputs of the weight."""
        total = self.weight.new_zeros(self.weight.shape[1], self.weight.shape[1])
        for start in range(0, len(captions), _CHUNK):
            index = encoder_index(self.model, self.part)
            ids = self.model.tokenize(captions[start : start + _CHUNK], encoder=index)
            total += product(layer_inputs(self.model, self.site, ids).flatten(0, 1))
        return total / len(captions)

    def sums(self, pairs: Sequence[Pair]) -> Sums:
        """Return the sums of one concept over its captions."""
        out, width = self.weight.shape
        gram, cross, energy = (
            self.weight.new_zeros(width, width),
            self.weight.new_zeros(out, width),
            0.0,
        )
        for start in range(0, len(pairs), _CHUNK):
            chunk = pairs[start : start + _CHUNK]
            ids = torch.cat([torch.stack([p.old.ids, p.new.ids]) for p in chunk])
            keys, sources = gather(layer_inputs(self.model, self.site, ids), chunk)
            gram += product(keys)
            keys = keys.double()
            residual = (sources.double() - keys) @ self.weight.T
            cross += residual.T @ keys
            energy += float(residual.square().sum())
        return Sums(gram / len(pairs), cross / len(pairs), energy / len(pairs))


def known_concepts(model: TextToImage, vocabulary: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return the concepts that should not drift: a vocabulary by name, a list, or the vocabulary of the model."""
    if vocabulary is None:
        vocabulary = "icons" if model.name == "icons" else "natural"
    return vocabularies.concepts(vocabulary) if isinstance(vocabulary, str) else tuple(vocabulary)


def other_concepts(known: Sequence[str], pairs: Mapping[str, str]) -> list[str]:
    """Return the known concepts and the targets, without those that contain an edited concept."""
    concepts = dict.fromkeys((*known, *pairs.values()))
    return sorted(c for c in concepts if c.strip() and not any(contains(c, old) for old in pairs))


def extended_pairs(
    model: TextToImage,
    pairs: Mapping[str, str],
    frames: Sequence[str],
    known: Sequence[str],
    part: str = "text",
) -> list[list[Pair]]:
    """Return, for each concept, its captions paired with those of its replacement, as `extended_pair` aligns them."""
    return [
        [
            extended_pair(pair, old, known)
            for pair in align_captions(model, {old: new}, frames, "subject_to_end", encoder=part)
        ]
        for old, new in pairs.items()
    ]


def extended_pair(pair: Pair, old: str, known: Sequence[str]) -> Pair:
    """Return the pair with positions from the first token that differs to the last pad; pads keep their positions.

    Where the old concept begins with one of `known` ("apple" of "apple logo"), the positions start at the last token of
    the old concept, because a causal encoder gives both concepts the same states before it.
    """
    first, second = pair.old, pair.new
    start, end = first.first, len(first.ids) - 1
    whole, parts = words(old), [words(c) for c in known]
    if any(part and whole != part and whole[: len(part)] == part for part in parts):
        start = first.last
    else:
        while start < first.last and start <= second.last and first.ids[start] == second.ids[start]:
            start += 1
    inside = [(p, q) for p, q in pair.positions if start <= p < first.eos]
    pads = [(p, min(max(p, second.eos + 1), end)) for p in range(first.eos + 1, end + 1)]
    return dataclasses.replace(pair, positions=[*inside, (first.eos, second.eos), *pads])


def background_gram(reader: Reader, captions: Sequence[str]) -> Tensor:
    """Return the mean Gram matrix of captions that should not move, and of the empty prompt."""
    return (1 - _EMPTY) * reader.gram(captions) + _EMPTY * reader.gram([""])


def background_captions(model: TextToImage, term: Term) -> list[str]:
    """Return captions that should not move; three in four contain a concept."""
    fillers = vocabularies.fillers(model.tokenizer, without=term["without"])
    rng = random.Random(term["seed"])
    slots = [
        rng.choice(term["concepts"] or fillers) if i % 4 else rng.choice(fillers)
        for i in range(term["background"])
    ]
    frames = vocabularies.frames(
        fillers, size=term["background"], seed=term["seed"] + 2, among=term["concepts"]
    )
    return [frame.replace("{}", slot) for frame, slot in zip(frames, slots, strict=True)]


def preserved_captions(
    background: Sequence[str], terms: Sequence[Term], frames: Sequence[str]
) -> list[tuple[Sequence[str], float]]:
    """Return groups of preserved captions with their weights.

    Only every second caption of the background is returned, because a repair takes time for each caption.

    Args:
        background: The captions of the first term, as `background_captions` returns them.
        terms: The preserve terms of a change by `auto`; the first is the background.
        frames: Captions around the concepts of the other terms.
    """
    first, *concepts = terms
    weight = first["weight"]
    return [
        (background[::2], (1 - _EMPTY) * weight),
        ([""], _EMPTY * weight),
        *((concept_captions(term["concept"], frames), term["weight"]) for term in concepts),
    ]


def concept_captions(concept: str, frames: Sequence[str]) -> list[str]:
    """Return captions of a preserved concept."""
    return [frame.replace("{}", concept) for frame in frames[:_PER_CONCEPT]]
