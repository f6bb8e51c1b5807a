"""From concepts to keys: captions, the tokens of a concept in them, and what reaches a layer there.

Captions are tokenised in one call, and read by one text encoder no further than the layer in question. Before the first
attention a token's state depends on the token and its position alone, so there each pair of these is projected once.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import linear as project
from torch.overrides import TorchFunctionMode

from overpaint.edit.weights import encoder_index, find_weight
from overpaint.errors import UnsupportedModel
from overpaint.model import TextToImage
from overpaint.model.hooks import record_inputs
from overpaint.model.token_spans import Span, end_of_text, span_at

__all__ = [
    "POSITIONS",
    "Caption",
    "Pair",
    "Positions",
    "caption",
    "captions",
    "check_frames",
    "check_pairs",
    "gather",
    "layer_inputs",
    "places",
    "plan",
    "read_layer",
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
_BATCH = 64


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


def check_pairs(pairs: Mapping[str, str], *, erase: bool = False) -> None:
    """Refuse pairs that ask for nothing.

    Args:
        pairs: Old concept to new.
        erase: Whether the new one may be empty.

    Raises:
        ValueError: There are none, a concept is empty, or equals its target.
    """
    if not pairs:
        raise ValueError(
            "`pairs` is empty: name at least one concept and its replacement, {'van gogh': 'painting'}."
        )
    for old, new in pairs.items():
        if not old.strip() or not (erase or new.strip()):
            role = "new" if old.strip() else "old"
            raise ValueError(
                f"the {role} concept of the pair {old!r} → {new!r} is empty: name it in words."
            )
        if old.lower().split() == new.lower().split():
            raise ValueError(
                f"the concept {old!r} equals its target: name another one to put in its place."
            )


def check_frames(frames: Sequence[str]) -> None:
    """Refuse one text, or none, where a list of captions is wanted.

    Raises:
        TypeError: It is no list of texts, or empty.
    """
    if isinstance(frames, str) or not frames:
        raise TypeError(
            "`frames` is a list of captions, got one text or none: write [''] for the bare concept."
        )


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
    asked = [(old, new, frame) for old, new in pairs.items() for frame in frames]
    distinct = list(dict.fromkeys((name, f) for old, new, f in asked for name in (old, new)))
    placed = dict(zip(distinct, captions(model, distinct, encoder=encoder), strict=True))
    return [
        _aligned((old, new), placed[old, frame], placed[new, frame], positions)
        for old, new, frame in asked
    ]


def _aligned(names: tuple[str, str], first: Caption, second: Caption, positions: Positions) -> Pair:
    end = len(first.ids) - 1
    wanted = {
        "from_subject_to_end": range(first.last, end + 1),
        "last_subject": [first.last],
        "subject": range(first.first, first.last + 1),
        "subject_to_end": range(first.first, end + 1),
        "last_subject+eos": [first.last],
    }[positions]
    shift = second.last - first.last
    found = [(p, min(max(p + shift, second.first), end)) for p in wanted]
    if positions == "last_subject+eos":
        found.append((first.eos, second.eos))
    return Pair(names, first, second, found)


def caption(model: TextToImage, concept: str, frame: str, *, encoder: str = "text") -> Caption:
    """Return `concept` in `frame`, with its place."""
    return captions(model, [(concept, frame)], encoder=encoder)[0]


def captions(
    model: TextToImage, asked: Sequence[tuple[str, str]], *, encoder: str = "text"
) -> list[Caption]:
    """Return each concept in its frame, with its place.

    Args:
        model: Its tokenizers place the concepts.
        asked: Concept and frame of each.
        encoder: Whose tokenizer: `"text"` or `"text2"`.

    Raises:
        ValueError: A concept is empty or cut off.
        UnsupportedModel: The tokenizer cannot tell the characters of its tokens.
    """
    if not asked:
        return []
    index = encoder_index(model, encoder)
    tokenizer = model.tokenizers[index]
    texts: list[str] = []
    places: list[tuple[int, int]] = []
    for concept, frame in asked:
        before, _, after = frame.partition("{}")
        texts.append(f"{before}{concept.strip()}{after}")
        places.append((len(before), len(before) + len(concept.strip())))
    spans = _spans(tokenizer, texts, places)
    rows = model.tokenize(texts, encoder=index)
    return [
        Caption(text, ids, span.start, span.last, end_of_text(tokenizer, ids))
        for text, ids, span in zip(texts, rows, spans, strict=True)
    ]


def _spans(tokenizer: Any, texts: Sequence[str], places: Sequence[tuple[int, int]]) -> list[Span]:
    """Return `span_at` of each place, from one call of the tokenizer; what it refuses is left to it."""
    if len(texts) == 1 or not getattr(tokenizer, "is_fast", False):
        return [span_at(tokenizer, t, *place) for t, place in zip(texts, places, strict=True)]
    encoded = tokenizer(
        list(texts), return_offsets_mapping=True, truncation=False, padding=False, verbose=False
    )
    found: list[Span] = []
    for text, (start, end), offsets in zip(texts, places, encoded["offset_mapping"], strict=True):
        held = [i for i, (a, b) in enumerate(offsets) if a < b and a < end and b > start]
        fits = held and held[-1] < int(tokenizer.model_max_length) - 1
        found.append(Span(held[0], held[-1] + 1) if fits else span_at(tokenizer, text, start, end))
    return found


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
    features, rows = read_layer(model, site, ids)
    return features[rows]


def read_layer(model: TextToImage, site: str, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return `layer_inputs` of the distinct rows of token ids, and which of these each row is.

    Args:
        model: Read, not changed; no hook stays.
        site: As in `layer_inputs`.
        ids: Padded token ids, shape (B, L).

    Returns:
        Shapes (U, L, D_in), on the CPU in float32, and (B,).

    Raises:
        UnsupportedModel: As `layer_inputs`.
    """
    weight = find_weight(model, site)
    assert weight.encoder is not None
    encoder, device = model.text_encoders[weight.encoder], weight.parameter.device
    first = site.split(".")[1] == "0"
    distinct, rows = torch.unique(ids, dim=0, return_inverse=True)
    read: list[Tensor] = []
    for batch in distinct.split(_BATCH):
        once = _EachTokenOnce(batch.to(device)) if first else nullcontext()
        with torch.no_grad(), once, record_inputs(weight.module, stop=True) as inputs:
            encoder(batch.to(device))
        if len(inputs) != 1 or inputs[0].shape[:2] != batch.shape:
            raise UnsupportedModel(
                f"the text encoder did not call {site} once on the whole batch, so there is nothing to fit: use a "
                "plain `CLIPTextModel`, neither compiled nor fused."
            )
        read.append(inputs[0].cpu())
    return torch.cat(read), rows


class _EachTokenOnce(TorchFunctionMode):
    """Project each token of a batch once for each of its positions; only before the first attention has mixed them."""

    def __init__(self, ids: Tensor) -> None:
        super().__init__()
        length = ids.shape[1]
        marks = ids * length + torch.arange(length, device=ids.device)
        distinct, place = torch.unique(marks, return_inverse=True)
        one = torch.zeros_like(distinct)
        one[place.flatten()] = torch.arange(marks.numel(), device=ids.device)  # any of its rows
        self.one, self.place = one, place

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not project or not args or args[0].shape[:-1] != self.place.shape:
            return func(*args, **kwargs)
        few = func(args[0].flatten(0, 1).index_select(0, self.one), *args[1:], **kwargs)
        return few.index_select(0, self.place.flatten()).unflatten(0, self.place.shape)


def gather(inputs: Tensor, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
    """Return the keys (N, D_in) and, aligned with them, the inputs that the values are made of.

    Args:
        inputs: What reaches the layer for old and new captions in turn, shape (2 P, L, D_in); more rows are ignored.
        pairs: P of them.
    """
    at, of = places(pairs, torch.arange(len(inputs)), inputs.shape[1])
    flat = inputs.flatten(0, 1)
    return flat.index_select(0, at), flat.index_select(0, of)


def places(pairs: Sequence[Pair], rows: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Return where the keys and the inputs of the values are, counting token after token, shapes (N,).

    Args:
        pairs: P of them.
        rows: In which row old and new captions are in turn, shape (2 P,); more are ignored.
        length: Tokens of a row.
    """
    counts = torch.tensor([len(p.positions) for p in pairs])
    both = torch.tensor([place for p in pairs for place in p.positions]).reshape(-1, 2)
    starts = rows[: 2 * len(pairs)].reshape(-1, 2) * length
    found = both + starts.repeat_interleave(counts, dim=0)
    return found[:, 0], found[:, 1]
