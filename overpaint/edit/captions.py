"""From concepts to keys: captions, the tokens of a concept in them, and what reaches a layer there.

Captions are read by one text encoder, all in one batch and no further than the layer in question.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from overpaint.edit.weights import encoder_index, linear_at, weight_at
from overpaint.errors import UnsupportedModel
from overpaint.hooks import record_inputs
from overpaint.model import TextToImage
from overpaint.spans import end_of_text, span_at

__all__ = [
    "POSITIONS",
    "Caption",
    "Pair",
    "Positions",
    "caption",
    "gather",
    "layer_inputs",
    "pair",
    "plan",
]

Positions = Literal[
    "from_subject_to_end", "last_subject", "last_subject+eos", "subject", "subject_to_end"
]
POSITIONS: tuple[Positions, ...] = (
    "from_subject_to_end",
    "last_subject",
    "last_subject+eos",
    "subject",
    "subject_to_end",
)


@dataclass(frozen=True)
class Caption:
    """A concept in a frame: its padded ids, shape (L,), the concept's first and last token, and where the text ends."""

    text: str
    ids: Tensor
    first: int
    last: int
    eos: int


@dataclass(frozen=True)
class Pair:
    """One concept pair in one frame, and the positions of its keys and values."""

    names: tuple[str, str]
    old: Caption
    new: Caption
    positions: list[tuple[int, int]]


def plan(
    model: TextToImage,
    pairs: Mapping[str, str],
    frames: Sequence[str],
    positions: Positions,
    *,
    encoder: str = "text",
) -> list[Pair]:
    """Return each pair in each frame, frames within pairs.

    Args:
        model: Its tokenizers place the concepts.
        pairs: Old concept to new.
        frames: Captions around the concept: put before it, or filled in where they hold `{}`.
        positions: Which tokens become keys, as in `quickfix`.
        encoder: Whose tokenizer: `"text"` or `"text2"`.

    Raises:
        ValueError: A concept is empty or cut off.
    """
    return [
        pair(model, old, new, frame, positions, encoder=encoder)
        for old, new in pairs.items()
        for frame in frames
    ]


def pair(
    model: TextToImage,
    old: str,
    new: str,
    frame: str,
    positions: Positions,
    *,
    encoder: str = "text",
) -> Pair:
    """Return one pair in one frame: which token of the old caption gets what the new one has where."""
    first = caption(model, old, frame, encoder=encoder)
    second = caption(model, new, frame, encoder=encoder)
    end = len(first.ids) - 1
    wanted = {
        "from_subject_to_end": range(first.last, end + 1),
        "last_subject": [first.last],
        "subject": range(first.first, first.last + 1),
        "subject_to_end": range(first.first, end + 1),
        "last_subject+eos": [first.last],
    }[positions]
    shift = second.last - first.last
    places = [(p, min(max(p + shift, second.first), end)) for p in wanted]
    if positions == "last_subject+eos":
        places.append((first.eos, second.eos))
    return Pair((old, new), first, second, places)


def caption(model: TextToImage, concept: str, frame: str, *, encoder: str = "text") -> Caption:
    """Return `concept` in `frame`, with its place."""
    index = encoder_index(model, encoder)
    tokenizer = model.tokenizers[index]
    concept = concept.strip()
    before, _, after = frame.partition("{}")
    text = f"{before}{concept}{after}"
    span = span_at(tokenizer, text, len(before), len(before) + len(concept))
    ids = model.tokenize([text], encoder=index)[0]
    return Caption(text, ids, span.start, span.last, end_of_text(tokenizer, ids))


def layer_inputs(model: TextToImage, site: str, ids: Tensor) -> Tensor:
    """Return what reaches the text projection `site` for token ids, on the CPU in float32.

    Args:
        model: Read, not changed; no hook stays.
        site: `text.<layer>.self_attn.<q, k, v or out>_proj`, or of `text2`.
        ids: Padded token ids, shape (B, L); rows that are equal are read once.

    Returns:
        Shape (B, L, D_in).

    Raises:
        UnsupportedModel: The encoder's attention does not run through the projection.
    """
    linear: Any = linear_at(model, site)
    encoder = model.text_encoders[encoder_index(model, site.partition(".")[0])]
    distinct, rows = torch.unique(ids, dim=0, return_inverse=True)
    with torch.no_grad(), record_inputs(linear, stop=True) as inputs:
        encoder(distinct.to(weight_at(model, site).device))
    if len(inputs) != 1 or inputs[0].shape[:2] != distinct.shape:
        raise UnsupportedModel(
            f"the text encoder did not call {site} once on the whole batch, so there is nothing to fit: use a plain "
            "`CLIPTextModel`, neither compiled nor fused."
        )
    return inputs[0].cpu()[rows]


def gather(inputs: Tensor, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
    """Return the keys (N, D_in) and, aligned with them, the inputs that the values are made of.

    Args:
        inputs: What reaches the layer for old and new captions in turn, shape (2 P, L, D_in); more rows are ignored.
        pairs: P of them.
    """
    keys = [inputs[2 * i, [key for key, _ in p.positions]] for i, p in enumerate(pairs)]
    values = [inputs[2 * i + 1, [value for _, value in p.positions]] for i, p in enumerate(pairs)]
    return torch.cat(keys), torch.cat(values)
