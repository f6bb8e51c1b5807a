r"""UCE: erase, replace, preserve and debias concepts in the cross-attention's keys and values, in closed form.

The key is the text feature :math:`c` of a concept's last token, its target what the projection makes of the guide's,
:math:`v = W c_{new}`; preserved concepts keep theirs. With preserve weight :math:`a` and ridge :math:`\lambda`

.. math:: W' = \Big(\lambda W + \sum v\, c^\top + a \sum W p\, p^\top\Big)
               \Big(\lambda I + \sum c\, c^\top + a \sum p\, p^\top\Big)^{-1} .

Source: Gandikota et al., 2024, https://arxiv.org/abs/2308.14761, and the authors' code
https://github.com/rohitgandikota/unified-concept-editing.
Deviations: solved in float64 and in the dual form; the empty guide inside a frame ("painting by ") is the frame's last
token. Their erase scale is left out: dividing ridge and preserve weight by it is the same. In `debias` the part of an
attribute along the concept is left out and its length set to the concept's, so that its weight has a unit; who counts
the attributes is the caller's choice.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from overpaint.edit.captions import check_pairs
from overpaint.edit.change import Change
from overpaint.edit.methods.cross_attention import (
    Layer,
    Wanted,
    projections,
    read,
    rewrite,
    spots,
)
from overpaint.model import TextToImage

__all__ = ["ARTISTS", "OBJECTS", "debias", "uce"]

ARTISTS = ("", "painting by ", "art by ", "artwork by ", "picture by ", "style of ")
OBJECTS = ("", "image of ", "photo of ", "portrait of ", "picture of ", "painting of ")


def uce(
    model: TextToImage,
    pairs: Mapping[str, str],
    *,
    preserve: Sequence[str] = (),
    preserve_weight: float = 1.0,
    ridge: float = 0.5,
    frames: Sequence[str] = OBJECTS,
    layers: Sequence[Layer] | None = None,
) -> Change:
    """Change that makes every cross-attention layer read each old concept as its new one; the model is not touched.

    Args:
        model: The model to edit.
        pairs: Old concept to new, as `{"van gogh": "painting"}`; `""` erases to what the empty prompt begins with.
        preserve: Concepts that should be read as before, at their last token.
        preserve_weight: What one of them counts against one edited key.
        ridge: Pull towards the old weights, in units of a key's squared norm. Positive.
        frames: Captions around the concept; `OBJECTS` and `ARTISTS` are the paper's two, `("",)` is the bare concept.
        layers: Cross-attention layers, all if `None`.

    Returns:
        The change of `to_k` and `to_v` in all layers.

    Raises:
        ValueError: A concept is empty, cut off or equals its target, two pairs contradict one another, a preserved
            concept is edited, or a number is out of range.
        TypeError: A list of texts is one text.
        UnknownSite: The UNet has no such layer.
    """
    check_pairs(pairs, erase=True)
    _check_lists(preserve, frames)
    sites = projections(model, layers, ("k", "v"))
    wanted = _wanted(model, pairs, preserve, frames)
    protocol = {
        "method": "uce", "pairs": dict(pairs), "preserve": list(preserve), "preserve_weight": preserve_weight,
        "frames": list(frames),
    }  # fmt: skip
    return rewrite(
        model, sites, wanted, ridge=ridge, preserve_weight=preserve_weight, protocol=protocol
    )


def debias(
    model: TextToImage,
    concept: str,
    shares: Mapping[str, float],
    *,
    classify: Callable[[TextToImage], Mapping[str, float]],
    preserve: Sequence[str] = (),
    preserve_weight: float = 1.0,
    ridge: float = 0.5,
    frames: Sequence[str] = OBJECTS,
    layers: Sequence[Layer] | None = None,
    rate: float = 0.5,
    tolerance: float = 0.05,
    rounds: int = 10,
    on_progress: Callable[[int, int], None] | None = None,
) -> Change:
    """Change that draws `concept` with its attributes in the given shares.

    Each round applies the change so far, lets `classify` draw and count, and adds more of what is short and takes away
    what there is too much of. Of all rounds the best is returned.

    Args:
        model: The model to edit; as it was after each round.
        concept: What is drawn one-sidedly, as `"a doctor"`.
        shares: Attribute to its wanted share of the pictures, in [0, 1], summing up to at most 1.
        classify: From the edited model to the share it draws of each attribute, in [0, 1].
        preserve: As in `uce`, like all that is not explained here.
        preserve_weight: What one preserved concept counts.
        ridge: Pull towards the old weights.
        frames: Captions around the concept.
        layers: Cross-attention layers.
        rate: How much of an attribute, in lengths of the concept's feature, answers a share that is 1 short.
        tolerance: Stop when no share is further off than this.
        rounds: Stop after so many.
        on_progress: Called with the rounds done and the most there can be.

    Returns:
        The best change; its report holds the shares and weights of every round.

    Raises:
        ValueError: Shares are out of range, `classify` counts something else, or as in `uce`.
    """
    _check_shares(concept, shares, rate, tolerance, rounds)
    _check_lists(preserve, frames)
    sites = projections(model, layers, ("k", "v"))
    wanted = _wanted(model, {concept: ""}, preserve, frames)
    directions = _directions(model, wanted.keys, list(shares))
    weights = torch.zeros(len(shares), dtype=torch.float64)
    best: tuple[float, Change] | None = None
    history: list[dict[str, Any]] = []
    for done in range(1, rounds + 1):
        sources = wanted.keys + torch.einsum("a,and->nd", weights, directions).float()
        change = rewrite(
            model, sites, _towards(wanted, sources), ridge=ridge, preserve_weight=preserve_weight,
            protocol={
                "method": "debias", "pairs": {concept: _described(shares, weights)}, "shares": dict(shares),
                "preserve": list(preserve), "preserve_weight": preserve_weight, "frames": list(frames),
            },
        )  # fmt: skip
        with change.applied(model):
            seen = _counted(classify(model), shares)
        short = torch.tensor([shares[name] - seen[name] for name in shares], dtype=torch.float64)
        off = float(short.abs().max())
        history.append({"seen": seen, "weights": weights.tolist(), "off": off})
        if best is None or off < best[0]:
            best = (off, change)
        if on_progress is not None:
            on_progress(done, rounds)
        if off <= tolerance:
            break
        weights = weights + rate * short
    assert best is not None
    report = {**best[1].report, "rounds": history, "off": best[0]}
    return Change(best[1].movements, best[1].protocol, report)


def _wanted(
    model: TextToImage, pairs: Mapping[str, str], preserve: Sequence[str], frames: Sequence[str]
) -> Wanted:
    started = time.perf_counter()
    asked = [(i, old, new, f) for i, (old, new) in enumerate(pairs.items()) for f in frames]
    olds = spots(model, [(old, frame) for _, old, _, frame in asked])
    news = spots(model, [(new, frame) for _, _, new, frame in asked])
    kept = spots(model, [(prompt, "") for prompt in preserve])
    length = max(place for _, place in [*olds, *news, *kept]) + 2  # with the end of text
    features = read(model, ["", *(text for text, _ in [*olds, *news, *kept])], length=length)
    width = features[""].shape[1]
    pick: Callable[[Sequence[tuple[str, int]]], Tensor] = lambda places: (  # noqa: E731
        torch.stack([features[text][place] for text, place in places])
        if places
        else torch.zeros(0, width)
    )
    return Wanted(
        keys=pick(olds),
        sources=pick(news),
        owners=tuple(i for i, *_ in asked),
        labels=tuple(f"{old!r} → {new!r}" for _, old, new, _ in asked),
        preserved=pick(kept),
        kept=tuple(preserve),
        empty=features[""],
        started=started,
    )


def _towards(wanted: Wanted, sources: Tensor) -> Wanted:
    return Wanted(
        wanted.keys, sources, wanted.owners, wanted.labels, wanted.preserved, wanted.kept, wanted.empty,
        time.perf_counter(),
    )  # fmt: skip


def _directions(model: TextToImage, keys: Tensor, attributes: Sequence[str]) -> Tensor:
    """Return each attribute's feature without its part along the key and as long as the key, shape (A, N, D)."""
    places = spots(model, [(name, "") for name in attributes])
    features = read(model, [text for text, _ in places])
    found = torch.stack([features[text][place] for text, place in places]).double()  # (A, D)
    k = keys.double()
    along = (found @ k.T) / k.square().sum(1)  # (A, N)
    across = found[:, None] - along[..., None] * k
    return across * (k.norm(dim=1)[:, None] / across.norm(dim=2, keepdim=True).clamp(min=1e-300))


def _described(shares: Mapping[str, float], weights: Tensor) -> str:
    return ", ".join(f"{w:+.3f} {name}" for name, w in zip(shares, weights.tolist(), strict=True))


def _counted(found: Mapping[str, float], shares: Mapping[str, float]) -> dict[str, float]:
    missing = [name for name in shares if name not in found]
    if missing or not all(0 <= found[name] <= 1 for name in shares):
        raise ValueError(
            f"`classify` returned {dict(found)!r}: give the share of each of {', '.join(map(repr, shares))}, from 0 to "
            "1. Divide counts by the number of pictures."
        )
    return {name: float(found[name]) for name in shares}


def _check_shares(
    concept: str, shares: Mapping[str, float], rate: float, tolerance: float, rounds: int
) -> None:
    if not concept.strip():
        raise ValueError("the concept is empty: name in words what is drawn one-sidedly.")
    total = sum(shares.values())
    fair = all(0 <= share <= 1 for share in shares.values())
    if not shares or not fair or total > 1 + 1e-9 or not all(name.strip() for name in shares):
        raise ValueError(
            f"`shares` must give attributes their shares, from 0 to 1 and at most 1 in all, got {dict(shares)!r}. For "
            "two in balance: {'red': 0.5, 'blue': 0.5}."
        )
    if not (rate > 0 and tolerance >= 0 and rounds >= 1):
        raise ValueError(
            f"`rate` and `rounds` must be positive and `tolerance` 0 or more, got {rate!r}, {rounds!r} and "
            f"{tolerance!r}. Leave them out for 0.5, 10 and 0.05."
        )


def _check_lists(preserve: Sequence[str], frames: Sequence[str]) -> None:
    if isinstance(preserve, str) or isinstance(frames, str):
        raise TypeError(
            "`preserve` and `frames` are lists of texts: write ['...'] around a single one."
        )
    if not frames:
        raise ValueError("`frames` is empty: give at least one caption; '' is the bare concept.")
