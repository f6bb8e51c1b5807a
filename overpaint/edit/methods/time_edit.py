"""TIME: make cross-attention read an underspecified prompt as one that says more.

All tokens of the old caption are keys, each with what the projection makes of the token it is aligned with in the new
caption. "a pack of roses" → "a pack of blue roses" is aligned word by word: every token with its next occurrence, and
what is left over with the last position.

Source: Orgad et al., 2023, https://arxiv.org/abs/2303.08084, and the authors' code.
Deviations: where the old caption is not contained in the new one, which their code refuses, the concepts are aligned
from their last tokens and the first new token is repeated. Solved in float64, over the whole padded prompt as theirs.
"""

import time as clock
from collections.abc import Mapping, Sequence

import torch

from overpaint.edit.captions import Caption, caption, check_frames, check_pairs
from overpaint.edit.change import Change
from overpaint.edit.methods.cross_attention import (
    Layer,
    Projection,
    Wanted,
    projections,
    read,
    rewrite,
)
from overpaint.edit.methods.quickfix import FRAMES
from overpaint.model import TextToImage

__all__ = ["align", "time"]


def time(
    model: TextToImage,
    pairs: Mapping[str, str],
    *,
    ridge: float = 0.1,
    matrices: Sequence[Projection] = ("v",),
    frames: Sequence[str] = FRAMES,
    layers: Sequence[Layer] | None = None,
) -> Change:
    """Change that makes every cross-attention layer read each old prompt as its new one; the model is not touched.

    Args:
        model: The model to edit.
        pairs: Old prompt to new, as `{"a pack of roses": "a pack of blue roses"}`.
        ridge: Pull towards the old weights, in units of a key's squared norm. Positive.
        matrices: Which projections: `("v",)` or `("k", "v")`.
        frames: Captions around the concept: put before it, or filled in where they hold `{}`.
        layers: Cross-attention layers, all if `None`.

    Returns:
        The change of these projections in all layers.

    Raises:
        ValueError: A concept is empty, cut off or equals its target, two pairs contradict one another, or a number is
            out of range.
        TypeError: A list of texts is one text.
        UnknownSite: The UNet has no such layer.
    """
    check_pairs(pairs)
    check_frames(frames)
    sites = projections(model, layers, matrices)
    started = clock.perf_counter()
    asked = [(i, old, new, f) for i, (old, new) in enumerate(pairs.items()) for f in frames]
    olds = [caption(model, old, frame) for _, old, _, frame in asked]
    news = [caption(model, new, frame) for _, _, new, frame in asked]
    features = read(model, ["", *(c.text for c in [*olds, *news])])
    same = _articles(model)
    aligned = [align(old, new, same=same) for old, new in zip(olds, news, strict=True)]
    owned = [row for row, places in zip(asked, aligned, strict=True) for _ in places]
    wanted = Wanted(
        keys=torch.cat([features[old.text] for old in olds]),
        sources=torch.cat([features[c.text][p] for c, p in zip(news, aligned, strict=True)]),
        owners=tuple(row[0] for row in owned),
        labels=tuple(f"{row[1]!r} → {row[2]!r}" for row in owned),
        preserved=features[""][:0],
        kept=(),
        empty=features[""],
        started=started,
    )
    protocol = {
        "method": "time", "pairs": dict(pairs), "frames": list(frames), "matrices": list(matrices),
    }  # fmt: skip
    return rewrite(model, sites, wanted, ridge=ridge, protocol=protocol)


def align(old: Caption, new: Caption, *, same: Mapping[int, int]) -> list[int]:
    """Return for each position of `old` the position of `new` whose value it gets, L of them.

    Args:
        old: The caption that is read.
        new: What it should be read as; the same frame.
        same: Tokens that count as others.
    """
    sought = [same.get(token, token) for token in old.ids.tolist()]
    found = [same.get(token, token) for token in new.ids.tolist()]
    last = len(found) - 1
    places: list[int] = []
    for token in sought:
        start = places[-1] + 1 if places else 0
        if token not in found[start:]:
            break
        places.append(found.index(token, start))
    if len(places) >= old.eos and places[old.eos - 1] < new.eos:
        return places + [last] * (len(sought) - len(places))
    shift = new.last - old.last
    return [
        p if p < old.first else min(max(p + shift, new.first), last) for p in range(len(sought))
    ]


def _articles(model: TextToImage) -> dict[int, int]:
    """Return that "an" counts as "a", which the next word decides."""
    a, an = (model.tokenizer(word, add_special_tokens=False).input_ids for word in ("a", "an"))
    return {an[0]: a[0]} if len(a) == len(an) == 1 else {}
