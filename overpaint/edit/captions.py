"""Captions of concepts, the tokens of a concept in them, and the inputs of a layer at these tokens.

Captions are tokenised in one call, and the text encoder runs no further than the requested layer. Before the first
attention, the state of a token depends only on the token and its position, so each distinct pair of both is projected
only once there.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import linear as project
from torch.overrides import TorchFunctionMode

from overpaint.edit.concept_words import check_special, words
from overpaint.edit.weights import encoder_index, find_weight
from overpaint.errors import UnsupportedModel, check_one_text, check_texts
from overpaint.model import TextToImage, text_features
from overpaint.model.hooks import record_inputs
from overpaint.model.token_spans import Span, end_of_text, span_at

__all__ = [
    "POSITIONS",
    "Caption",
    "Pair",
    "Positions",
    "align_captions",
    "aligned_rows",
    "caption",
    "captions",
    "check_frames",
    "check_pairs",
    "encoder_features",
    "gather",
    "layer_inputs",
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
    """A concept in a frame.

    Attributes:
        text: The caption.
        ids: Its padded token ids, shape (L,).
        first: Position of the concept's first token; for an empty concept, of the token before it.
        last: Position of the concept's last token; for an empty concept the same as `first`.
        eos: Position of the end-of-text token.
    """

    text: str
    ids: Tensor
    first: int
    last: int
    eos: int


@dataclass(frozen=True)
class Pair:
    """One concept pair in one frame.

    Attributes:
        names: The old and the new concept.
        old: Caption of the old concept.
        new: Caption of the new concept.
        positions: For each key, its position in the old caption and the position of its target in the new one.
    """

    names: tuple[str, str]
    old: Caption
    new: Caption
    positions: list[tuple[int, int]]


def check_pairs(pairs: Mapping[str, str]) -> None:
    """Raise unless there are pairs and each has two different concepts; the new one may be empty.

    Args:
        pairs: Old concept to new.

    Raises:
        TypeError: `pairs` is no dictionary, or a concept or replacement is not one text.
        ValueError: There are no pairs, a concept is empty, or a concept equals its target.
    """
    if not isinstance(pairs, Mapping):
        raise TypeError(
            f"`pairs` must be a dictionary of concepts and their replacements, got {pairs!r}: write "
            "{'van gogh': 'painting', 'monet': ''} for several concepts; '' erases to nothing."
        )
    if not pairs:
        raise ValueError(
            "`pairs` is empty: name at least one concept and its replacement, {'van gogh': 'painting'}."
        )
    for old, new in pairs.items():
        check_one_text(old, "a concept of `pairs`", "give a pair for each concept")
        check_one_text(
            new,
            f"the replacement of {old!r}",
            "choose one; `edit.debias` balances several for one concept",
        )
        if not old.strip():
            raise ValueError(
                f"the old concept of the pair {old!r} → {new!r} is empty: name it in words."
            )
        if words(old) == words(new):
            raise ValueError(
                f"the concept {old!r} equals its target: name another one to replace it."
            )


def check_frames(frames: Sequence[str]) -> None:
    """Raise unless `frames` is a list of at least one caption.

    Raises:
        TypeError: It is one text, or holds something else than texts.
        ValueError: It is empty.
    """
    check_texts(frames, "frames")
    if not frames:
        raise ValueError("`frames` is empty: give at least one caption; '' is the bare concept.")


def align_captions(
    model: TextToImage,
    pairs: Mapping[str, str],
    frames: Sequence[str],
    positions: Positions,
    *,
    encoder: str = "text",
) -> list[Pair]:
    """Return each pair in each frame, ordered by pair, then by frame.

    Args:
        model: Its tokenizer locates the concepts.
        pairs: Old concept to new.
        frames: Captions around the concept: a prefix, or a text in which `{}` is replaced.
        positions: The tokens that become keys, as in `quickfix`.
        encoder: Its tokenizer is used: `"text"` or `"text2"`.

    Raises:
        ValueError: A concept is empty or cut off by the token limit.
    """
    combinations = [(old, new, frame) for old, new in pairs.items() for frame in frames]
    distinct = list(dict.fromkeys((name, f) for old, new, f in combinations for name in (old, new)))
    located = dict(zip(distinct, captions(model, distinct, encoder=encoder), strict=True))
    return [
        _aligned((old, new), located[old, frame], located[new, frame], positions)
        for old, new, frame in combinations
    ]


def _aligned(names: tuple[str, str], first: Caption, second: Caption, positions: Positions) -> Pair:
    end = len(first.ids) - 1
    key_positions = {
        "from_subject_to_end": range(first.last, end + 1),
        "last_subject": [first.last],
        "subject": range(first.first, first.last + 1),
        "subject_to_end": range(first.first, end + 1),
        "last_subject+eos": [first.last],
    }[positions]
    shift = second.last - first.last
    aligned = [(p, min(max(p + shift, second.first), end)) for p in key_positions]
    if positions == "last_subject+eos":
        aligned.append((first.eos, second.eos))
    return Pair(names, first, second, aligned)


def caption(model: TextToImage, concept: str, frame: str, *, encoder: str = "text") -> Caption:
    """Return the caption of `concept` in `frame`. Raises as `captions`."""
    return captions(model, [(concept, frame)], encoder=encoder)[0]


def captions(
    model: TextToImage, concepts: Sequence[tuple[str, str]], *, encoder: str = "text"
) -> list[Caption]:
    """Return the caption of each concept in its frame. For an empty concept it is the frame alone.

    Args:
        model: Its tokenizer locates the concepts.
        concepts: Concepts with their frames.
        encoder: Its tokenizer is used: `"text"` or `"text2"`.

    Raises:
        ValueError: A concept is cut off by the token limit, or a caption holds a special token.
        UnsupportedModel: The tokenizer does not return the characters of its tokens.
    """
    if not concepts:
        return []
    index = encoder_index(model, encoder)
    tokenizer = model.tokenizers[index]
    texts: list[str] = []
    characters: list[tuple[int, int]] = []
    for concept, frame in concepts:
        before, _, after = frame.partition("{}")
        texts.append(f"{before}{concept.strip()}{after}")
        characters.append((len(before), len(before) + len(concept.strip())))
    check_special(tokenizer, texts)
    spans = _spans(tokenizer, texts, characters)
    rows = model.tokenize(texts, encoder=index)
    return [
        Caption(text, ids, span.start, span.last, end_of_text(tokenizer, ids))
        for text, ids, span in zip(texts, rows, spans, strict=True)
    ]


def _spans(
    tokenizer: Any, texts: Sequence[str], characters: Sequence[tuple[int, int]]
) -> list[Span]:
    """Return the token span of the characters of each text, from one call of the tokenizer. Raises as `span_at`.

    An empty range of characters has the position of the token before it.
    """
    if not getattr(tokenizer, "is_fast", False):
        return [span_at(tokenizer, t, *part) for t, part in zip(texts, characters, strict=True)]
    encoded = tokenizer(
        list(texts), return_offsets_mapping=True, truncation=False, padding=False, verbose=False
    )
    spans: list[Span] = []
    rows = zip(texts, characters, encoded["offset_mapping"], strict=True)
    for text, (start, end), offsets in rows:
        if start == end:
            before = sum(a < b <= start for a, b in offsets)
            spans.append(Span(before, before + 1))
            continue
        tokens = [i for i, (a, b) in enumerate(offsets) if a < b and a < end and b > start]
        fits = tokens and tokens[-1] < int(tokenizer.model_max_length) - 1
        spans.append(
            Span(tokens[0], tokens[-1] + 1) if fits else span_at(tokenizer, text, start, end)
        )
    return spans


def layer_inputs(model: TextToImage, site: str, ids: Tensor) -> Tensor:
    """Return the inputs of the text projection `site` for token ids, on the CPU in float32.

    Args:
        model: The model; it is not changed, and no hook is left on it.
        site: `text.<layer>.self_attn.<q, k, v or out>_proj`, or of `text2`.
        ids: Padded token ids, shape (B, L); equal rows are encoded once.

    Returns:
        Shape (B, L, D_in).

    Raises:
        UnsupportedModel: The encoder's attention does not run through the projection.
    """
    features, rows = read_layer(model, site, ids)
    return features[rows]


def encoder_features(model: TextToImage, index: int, ids: Tensor) -> Tensor:
    """Return the state of one text encoder that the UNet reads, for token ids (B, L) on its device, shape (B, L, D)."""
    encoder = model.text_encoders[index]
    if len(model.text_encoders) == 1:
        return text_features([encoder], [ids], clip_skip=model.clip_skip)
    states = encoder(ids, output_hidden_states=True).hidden_states
    return states[-2 - model.clip_skip]


def read_layer(model: TextToImage, site: str, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return `layer_inputs` of the distinct rows of token ids, and the index of each row among them.

    Args:
        model: The model; it is not changed, and no hook is left on it.
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
                f"the text encoder did not call {site} once on the whole batch, so its inputs are unknown: use a "
                "plain `CLIPTextModel` that is not compiled and not fused."
            )
        read.append(inputs[0].cpu())
    return torch.cat(read), rows


class _EachTokenOnce(TorchFunctionMode):
    """Project each distinct pair of token and position of a batch once; valid before the first attention only."""

    def __init__(self, ids: Tensor) -> None:
        super().__init__()
        length = ids.shape[1]
        marks = ids * length + torch.arange(length, device=ids.device)
        distinct, index = torch.unique(marks, return_inverse=True)
        row = torch.zeros_like(distinct)
        row[index.flatten()] = torch.arange(marks.numel(), device=ids.device)  # any of its rows
        self.row, self.index = row, index

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not project or not args or args[0].shape[:-1] != self.index.shape:
            return func(*args, **kwargs)
        few = func(args[0].flatten(0, 1).index_select(0, self.row), *args[1:], **kwargs)
        return few.index_select(0, self.index.flatten()).unflatten(0, self.index.shape)


def gather(inputs: Tensor, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
    """Return the keys, and for each key the input that has its target as output, both of shape (N, D_in).

    Args:
        inputs: Inputs of the layer for old and new captions in turn, shape (2 P, L, D_in); more rows are ignored.
        pairs: P pairs.
    """
    key_rows, source_rows = aligned_rows(pairs, torch.arange(len(inputs)), inputs.shape[1])
    flat = inputs.flatten(0, 1)
    return flat.index_select(0, key_rows), flat.index_select(0, source_rows)


def aligned_rows(pairs: Sequence[Pair], rows: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Return the rows of the keys and of their targets' inputs in flattened captions, shapes (N,).

    Args:
        pairs: P pairs.
        rows: Rows of the old and new captions in turn, shape (2 P,); more are ignored.
        length: Number of tokens of a caption, L.
    """
    counts = torch.tensor([len(p.positions) for p in pairs])
    both = torch.tensor([position for p in pairs for position in p.positions]).reshape(-1, 2)
    starts = rows[: 2 * len(pairs)].reshape(-1, 2) * length
    flat_rows = both + starts.repeat_interleave(counts, dim=0)
    return flat_rows[:, 0], flat_rows[:, 1]
