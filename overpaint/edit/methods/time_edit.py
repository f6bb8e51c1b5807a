"""TIME: edit an implicit assumption, so that cross-attention reads an underspecified prompt as a more specific one.

All tokens of the old caption are keys. The target of each is the projection of the token that it is aligned with in the
new caption. "a pack of roses" → "a pack of blue roses" is aligned word by word: each token with its next occurrence,
and the remaining positions with the last one.

Source: Orgad et al., 2023, https://arxiv.org/abs/2303.08084, and the authors' code.
Deviations: their code refuses an old caption that is not contained in the new one; here the concepts are then aligned
from their last tokens, and the first new token is repeated. Solved in float64, over the whole padded prompt as theirs.
"""

import time as clock
from collections.abc import Mapping, Sequence

import torch

from overpaint.edit.captions import Caption, caption, check_frames, check_pairs
from overpaint.edit.change import Change
from overpaint.edit.methods.cross_attention import (
    Layer,
    Projection,
    projection_sites,
    solve_projections,
)
from overpaint.edit.methods.quickfix import FRAMES
from overpaint.edit.methods.text_keys import FeatureEdit, read_features, unconditional_features
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
    """Return the change that makes cross-attention map each old prompt to its new one; the model is not modified.

    Args:
        model: The model to edit.
        pairs: Old prompt to new, as `{"a pack of roses": "a pack of blue roses"}`; `""` erases the old one.
        ridge: Pull towards the old weights, in units of a key's squared norm. Positive.
        matrices: Which projections move: `("v",)` or `("k", "v")`.
        frames: Captions around the concept: a prefix, or a text in which `{}` is replaced.
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
    sites = projection_sites(model, layers, matrices)
    started = clock.perf_counter()
    framed = [(i, old, new, f) for i, (old, new) in enumerate(pairs.items()) for f in frames]
    olds = [caption(model, old, frame) for _, old, _, frame in framed]
    news = [caption(model, new, frame) for _, _, new, frame in framed]
    features = read_features(model, [c.text for c in [*olds, *news]])
    articles = _articles(model)
    aligned = [align(old, new, same=articles) for old, new in zip(olds, news, strict=True)]
    rows = [row for row, places in zip(framed, aligned, strict=True) for _ in places]
    edit = FeatureEdit(
        keys=torch.cat([features[old.text] for old in olds]),
        sources=torch.cat([features[c.text][p] for c, p in zip(news, aligned, strict=True)]),
        owners=tuple(row[0] for row in rows),
        labels=tuple(f"{row[1]!r} → {row[2]!r}" for row in rows),
        preserve=torch.zeros(0, features[olds[0].text].shape[1]),
        preserve_prompts=(),
        empty=unconditional_features(model),
        started=started,
    )
    protocol = {
        "method": "time", "pairs": dict(pairs), "frames": list(frames), "matrices": list(matrices),
    }  # fmt: skip
    return solve_projections(model, sites, edit, ridge=ridge, protocol=protocol)


def align(old: Caption, new: Caption, *, same: Mapping[int, int]) -> list[int]:
    """Return, for each of the L positions of `old`, the position of `new` that gives its target.

    Args:
        old: The caption whose tokens are the keys.
        new: The caption whose tokens give the targets, in the same frame.
        same: Tokens that are compared as if they were other tokens, as "an" and "a".
    """
    keys = [same.get(token, token) for token in old.ids.tolist()]
    sources = [same.get(token, token) for token in new.ids.tolist()]
    last = len(sources) - 1
    places: list[int] = []
    for token in keys:
        start = places[-1] + 1 if places else 0
        if token not in sources[start:]:
            break
        places.append(sources.index(token, start))
    if len(places) >= old.eos and places[old.eos - 1] < new.eos:
        return places + [last] * (len(keys) - len(places))
    shift = new.last - old.last
    return [p if p < old.first else min(max(p + shift, new.first), last) for p in range(len(keys))]


def _articles(model: TextToImage) -> dict[int, int]:
    """Return the mapping of the token "an" to "a": the next word decides which of them is written."""
    a, an = (model.tokenizer(word, add_special_tokens=False).input_ids for word in ("a", "an"))
    return {an[0]: a[0]} if len(a) == len(an) == 1 else {}
