"""The captions that an automatic edit is fitted on and those it keeps, and the sums that it reads from them.

Memory does not grow with the captions: of each concept, and of all that is kept, only sums over keys remain.
"""

import dataclasses
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from overpaint.edit import vocabulary as vocabularies
from overpaint.edit.captions import Pair, gather, layer_inputs, plan
from overpaint.edit.weights import find_weight
from overpaint.model import TextToImage

__all__ = [
    "FRESH", "Reader", "Sums", "background", "background_captions", "captioned", "captions_of", "known_concepts",
    "others", "placed", "spared",
]  # fmt: skip

Term = dict[str, Any]
FRESH = 64  # captions that nothing is fitted to
_CHUNK = 256  # captions read at once
_PER_CONCEPT = 8  # captions of a concept to look after
_EMPTY = 0.05  # the empty prompt's share of the background: guidance reads it for every picture


@dataclass(frozen=True, eq=False)
class Sums:
    """All that a least-squares fit reads of a concept's keys K and residuals R, as means over captions.

    `gram` is K^T K, (D_in, D_in); `cross` is R^T K, (D_out, D_in); `energy` the squared norm of R.
    """

    gram: Tensor
    cross: Tensor
    energy: float

    def missed(self, delta: Tensor) -> float:
        """Return the share of the wanted movement that `delta` misses: 1 for no edit, 0 for a perfect one."""
        quadratic = float((delta @ self.gram * delta).sum() - 2 * (delta * self.cross).sum())
        return (quadratic + self.energy) / self.energy if self.energy else 0.0

    def rows(self) -> tuple[Tensor, Tensor]:
        """Return keys (N, D_in) and residuals (N, D_out), N <= D_in, with the same sums."""
        values, vectors = torch.linalg.eigh(self.gram)
        told = values > 1e-12 * values[-1].clamp(min=1e-300)
        sizes, vectors = values[told].sqrt(), vectors[:, told]
        return sizes[:, None] * vectors.T, (self.cross @ vectors / sizes).T


@dataclass(frozen=True, eq=False)
class Reader:
    """Reads captions at one weight of a model's first text encoder."""

    model: TextToImage
    site: str
    weight: Tensor

    @classmethod
    def of(cls, model: TextToImage, layer: int) -> "Reader":
        """Return what reads at a layer's `out_proj`."""
        site = f"text.{layer}.self_attn.out_proj"
        weight = find_weight(model, site).parameter
        return cls(model, site, weight.detach().to("cpu", torch.float64))

    def gram(self, captions: Sequence[str]) -> Tensor:
        """Return the mean of H^T H over captions, H (L, D_in) what reaches the weight; float64."""
        total = self.weight.new_zeros(self.weight.shape[1], self.weight.shape[1])
        for start in range(0, len(captions), _CHUNK):
            ids = self.model.tokenize(captions[start : start + _CHUNK])
            rows = layer_inputs(self.model, self.site, ids).flatten(0, 1).double()
            total += rows.T @ rows
        return total / len(captions)

    def sums(self, pairs: Sequence[Pair]) -> Sums:
        """Return the sums of one concept in its captions."""
        out, width = self.weight.shape
        gram, cross, energy = (
            self.weight.new_zeros(width, width),
            self.weight.new_zeros(out, width),
            0.0,
        )
        for start in range(0, len(pairs), _CHUNK):
            found = pairs[start : start + _CHUNK]
            ids = torch.cat([torch.stack([p.old.ids, p.new.ids]) for p in found])
            keys, sources = gather(layer_inputs(self.model, self.site, ids), found)
            keys = keys.double()
            residual = (sources.double() - keys) @ self.weight.T
            gram += keys.T @ keys
            cross += residual.T @ keys
            energy += float(residual.square().sum())
        return Sums(gram / len(pairs), cross / len(pairs), energy / len(pairs))


def known_concepts(model: TextToImage, vocabulary: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return the concepts that may be in danger: a vocabulary by name, a list, or the model's own."""
    if vocabulary is None:
        vocabulary = "icons" if model.name == "icons" else "natural"
    return vocabularies.concepts(vocabulary) if isinstance(vocabulary, str) else tuple(vocabulary)


def others(known: Sequence[str], pairs: Mapping[str, str]) -> list[str]:
    """Return the concepts to look after: the known ones and the targets, but none that holds an edited concept."""
    olds = [f" {old.lower().strip()} " for old in pairs]
    found = dict.fromkeys((*known, *pairs.values()))
    return sorted(c for c in found if not any(old in f" {c.lower()} " for old in olds))


def captioned(
    model: TextToImage, pairs: Mapping[str, str], frames: Sequence[str], known: Sequence[str]
) -> list[list[Pair]]:
    """Return, for each concept, its captions beside those of its replacement."""
    return [
        [placed(found, old, known) for found in plan(model, {old: new}, frames, "subject_to_end")]
        for old, new in pairs.items()
    ]


def placed(found: Pair, old: str, known: Sequence[str]) -> Pair:
    """Return the pair from where the two concepts part to the end of the padding, each pad at its own place.

    Where a known concept is how the old one begins ("apple" of "apple logo"), from the old one's last token on: up to
    there a causal encoder cannot tell them apart.
    """
    first, second = found.old, found.new
    start, end = first.first, len(first.ids) - 1
    if any(
        f"{old.lower()} ".startswith(f"{c.lower()} ") and c.lower() != old.lower() for c in known
    ):
        start = first.last
    else:
        while start < first.last and start <= second.last and first.ids[start] == second.ids[start]:
            start += 1
    words = [(p, q) for p, q in found.positions if start <= p < first.eos]
    pads = [(p, min(max(p, second.eos + 1), end)) for p in range(first.eos + 1, end + 1)]
    return dataclasses.replace(found, positions=[*words, (first.eos, second.eos), *pads])


def background(reader: Reader, term: Term) -> Tensor:
    """Return the mean Gram matrix of captions that should not move."""
    captions = background_captions(reader.model, term)
    return (1 - _EMPTY) * reader.gram(captions) + _EMPTY * reader.gram([""])


def background_captions(model: TextToImage, term: Term) -> list[str]:
    """Return captions that should not move: three in four hold a concept."""
    words = vocabularies.fillers(model.tokenizer, without=term["without"])
    rng = random.Random(term["seed"])
    slots = [
        rng.choice(term["concepts"] or words) if i % 4 else rng.choice(words)
        for i in range(term["background"])
    ]
    frames = vocabularies.frames(
        words, size=term["background"], seed=term["seed"] + 2, among=term["concepts"]
    )
    return [frame.replace("{}", slot) for frame, slot in zip(frames, slots, strict=True)]


def spared(
    model: TextToImage, terms: Sequence[Term], frames: Sequence[str]
) -> list[tuple[Sequence[str], float]]:
    """Return the captions to keep and their weights: every second one of the background, since a repair is dearer."""
    background, *concepts = terms
    weight = background["weight"]
    return [
        (background_captions(model, background)[::2], (1 - _EMPTY) * weight),
        ([""], _EMPTY * weight),
        *((captions_of(term["concept"], frames), term["weight"]) for term in concepts),
    ]


def captions_of(concept: str, frames: Sequence[str]) -> list[str]:
    """Return captions of a concept to look after."""
    return [frame.replace("{}", concept) for frame in frames[:_PER_CONCEPT]]
