"""Keys of edits of cross-attention: text features of concepts in captions, read and checked in one place.

Source: the methods of `overpaint.edit.methods` that use them cite their papers.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from overpaint.edit.captions import align_captions, captions, check_frames, check_pairs
from overpaint.edit.least_squares import contradiction
from overpaint.errors import check_texts
from overpaint.model import TextToImage, text_features

__all__ = [
    "FeatureEdit",
    "Keys",
    "check_contradictions",
    "feature_edit",
    "last_tokens",
    "read_features",
    "rows_from_last_token",
    "unconditional_features",
]

Keys = Literal["last", "last_to_pads"]
_BATCH = 64  # texts


@dataclass(frozen=True, eq=False)
class FeatureEdit:
    """An edit stated in text features: N keys and their sources, and M preserved keys.

    Attributes:
        keys: Features of the old concepts, shape (N, D), float32.
        sources: For each key, the features of the new concept, shape (N, D), float32.
        owners: For each key, the index of its concept among the pairs.
        labels: For each key, the pair as text, for error messages.
        preserve: Features whose outputs should not change, shape (M, D), float32.
        preserve_prompts: For each preserved key, its prompt.
        empty: Features of the unconditional branch of the guidance, shape (L, D), to measure its drift.
        started: `time.perf_counter()` before the first caption was read.
    """

    keys: Tensor
    sources: Tensor
    owners: tuple[int, ...]
    labels: tuple[str, ...]
    preserve: Tensor
    preserve_prompts: tuple[str, ...]
    empty: Tensor
    started: float


def feature_edit(
    model: TextToImage,
    pairs: Mapping[str, str],
    preserve: Sequence[str],
    *,
    frames: Sequence[str],
    keys: Keys = "last",
) -> FeatureEdit:
    """Return the edit of `pairs` in `frames`; preserved prompts have no frame.

    Args:
        model: Its text encoders and tokenizer are called.
        pairs: Old concept to new; the source of `""` is the token before its place, begin-of-text in an empty frame.
        preserve: Prompts whose outputs should not change.
        frames: Captions around the concept: a prefix, or a text in which `{}` is replaced.
        keys: `"last"` reads the concept's last token; `"last_to_pads"` also every token after it, to the last pad, each
            aligned with the token as far from the last token of the new concept.

    Raises:
        ValueError: A concept is empty, cut off or equals its target, or `keys` is another word.
        TypeError: `pairs` is no dictionary of texts, or a list of texts is one text.
    """
    check_pairs(pairs)
    check_texts(preserve, "preserve")
    check_frames(frames)
    if keys not in get_args(Keys):
        raise ValueError(
            f"`keys` must be 'last' or 'last_to_pads', got {keys!r}. Leave it out for 'last'."
        )
    started = time.perf_counter()
    positions = "last_subject" if keys == "last" else "from_subject_to_end"
    planned = align_captions(model, pairs, frames, positions)
    ends = last_tokens(model, [(prompt, "") for prompt in preserve])
    last = [p.old.last for p in planned] + [p.new.last for p in planned] + [e for _, e in ends]
    length = max(last) + 2 if keys == "last" else None  # with the end of text
    texts = [c.text for p in planned for c in (p.old, p.new)]
    features = read_features(model, [*texts, *(text for text, _ in ends)], length=length)
    preserved = [rows_from_last_token(features[text], place, keys) for text, place in ends]
    width = features[texts[0]].shape[1]
    concepts = list(pairs)
    aligned = [(p, old, new) for p in planned for old, new in p.positions]
    return FeatureEdit(
        keys=torch.stack([features[p.old.text][old] for p, old, _ in aligned]),
        sources=torch.stack([features[p.new.text][new] for p, _, new in aligned]),
        owners=tuple(concepts.index(p.names[0]) for p, *_ in aligned),
        labels=tuple(f"{p.names[0]!r} → {p.names[1]!r}" for p, *_ in aligned),
        preserve=torch.cat([torch.zeros(0, width), *preserved]),
        preserve_prompts=tuple(
            p for p, rows in zip(preserve, preserved, strict=True) for _ in rows
        ),
        empty=unconditional_features(model),
        started=started,
    )


def rows_from_last_token(features: Tensor, place: int, keys: Keys) -> Tensor:
    """Return the rows of `features` (L, D) at the position `place`, and of those after it for `"last_to_pads"`."""
    return features[place : place + 1] if keys == "last" else features[place:]


def last_tokens(model: TextToImage, concepts: Sequence[tuple[str, str]]) -> list[tuple[str, int]]:
    """Return the caption of each concept and the position of the concept's last token in it.

    Args:
        model: Its tokenizer is called once.
        concepts: Pairs of a concept and a frame. For an empty concept the position is that of the token before its
            place in the frame, or of begin-of-text.

    Raises:
        ValueError: The token limit cuts a concept off, or a caption holds a special token.
    """
    return [(c.text.strip(), c.last) for c in captions(model, concepts)]


@torch.no_grad()
def read_features(
    model: TextToImage, texts: Sequence[str], *, length: int | None = None
) -> dict[str, Tensor]:
    """Return the text features that cross-attention reads for each text, float32 on the CPU, shape (L, D) each.

    Args:
        model: Its text encoders are causal, so a token's features do not depend on later tokens.
        texts: Read in batches; equal texts are read once.
        length: Number of tokens to read, which saves most of the time for short captions; all if `None`.
    """
    distinct = list(dict.fromkeys(texts))
    ids = [model.tokenize(distinct, encoder=i)[:, :length] for i in range(len(model.text_encoders))]
    parts: list[Tensor] = []
    for start in range(0, len(distinct), _BATCH):
        rows = [part[start : start + _BATCH].to(model.device) for part in ids]
        features = text_features(model.text_encoders, rows, clip_skip=model.clip_skip)
        parts.append(features.cpu().float())
    features = torch.cat(parts)
    if len(ids) == 2:
        features = features[:, :-1]  # the last row is the pooled one, which no layer reads
    return dict(zip(distinct, features, strict=True))


def unconditional_features(model: TextToImage) -> Tensor:
    """Return the text features of the unconditional branch of the guidance, zero in SDXL, float32 on the CPU, (L, D).

    They are those of the empty prompt that `model.encode` returns. A concept that is erased is mapped to features of
    the empty prompt as the encoders compute them, which `read_features` returns.
    """
    features = model.encode([""])[0].cpu().float()
    return features[:-1] if len(model.text_encoders) == 2 else features


def check_contradictions(edit: FeatureEdit) -> None:
    """Raise a `ValueError` if one key has two targets, also if a preserved key is edited."""
    rows = contradiction(
        torch.cat([edit.keys, edit.preserve]), torch.cat([edit.sources, edit.preserve])
    )
    if rows is None:
        return
    first, second = rows
    if second >= len(edit.keys):
        prompt = edit.preserve_prompts[second - len(edit.keys)]
        raise ValueError(
            f"the preserved prompt {prompt!r} has the same key as {edit.labels[first]}, which is edited: take it off "
            "the `preserve` list."
        )
    raise ValueError(
        f"contradictory pairs: {edit.labels[first]} and {edit.labels[second]} give one key two targets. Keep one "
        "of them."
    )
