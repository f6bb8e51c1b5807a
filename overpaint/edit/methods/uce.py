r"""UCE: erase, replace, preserve and debias concepts in the cross-attention's keys and values, in closed form.

The key is the text feature :math:`c` of a concept's last token. Its target is the projection of the new concept's
feature, :math:`v = W c_{new}`; preserved concepts :math:`p` have their present output as target. With preserve weight
:math:`a` and ridge :math:`\lambda`

.. math:: W' = \Big(\lambda W + \sum v\, c^\top + a \sum W p\, p^\top\Big)
               \Big(\lambda I + \sum c\, c^\top + a \sum p\, p^\top\Big)^{-1} .

Source: Gandikota et al., 2024, https://arxiv.org/abs/2308.14761, and the authors' code
https://github.com/rohitgandikota/unified-concept-editing.
Deviations: solved in float64 and in the dual form; for an empty new concept in a frame ("painting by ") the target is
that of the frame's last token. Their erase scale is left out: dividing ridge and preserve weight by it is the same. In
`debias` the part of an attribute along the concept is removed and its length is set to the concept's, so that the
attribute's weight has a unit; the caller provides the function that counts attributes. `keys="last_to_pads"` makes
keys of the end of text and the pads too, since SD-1.x reads them; the present release has the last token alone.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from overpaint.edit.change import Change
from overpaint.edit.methods.cross_attention import (
    Layer,
    projection_sites,
    solve_projections,
)
from overpaint.edit.methods.text_keys import Keys, feature_edit, last_tokens, read_features
from overpaint.errors import check_one_text
from overpaint.model import TextToImage
from overpaint.model.sampling import Progress

__all__ = ["ARTISTS", "OBJECTS", "Search", "debias", "uce"]

ARTISTS = ("", "painting by ", "art by ", "artwork by ", "picture by ", "style of ")
OBJECTS = ("", "image of ", "photo of ", "portrait of ", "picture of ", "painting of ")


def uce(
    model: TextToImage,
    pairs: Mapping[str, str],
    *,
    preserve: Sequence[str] = (),
    preserve_weight: float = 1.0,
    ridge: float = 0.5,
    keys: Keys = "last",
    frames: Sequence[str] = OBJECTS,
    layers: Sequence[Layer] | None = None,
) -> Change:
    """Return the change that makes cross-attention map each old concept to its new one; the model is not modified.

    Args:
        model: The model to edit.
        pairs: Old concept to new, as `{"van gogh": "painting"}`; `""` erases a concept: it is mapped to the token
            before its place, begin-of-text where the frame is empty.
        preserve: Concepts whose outputs should not change, at the tokens that `keys` names.
        preserve_weight: Weight of one preserved key against one edited key.
        ridge: Pull towards the old weights, in units of a key's squared norm. Positive.
        keys: `"last"`, the concept's last token, as released; `"last_to_pads"`, every token from it to the last pad.
        frames: Captions around the concept; `OBJECTS` and `ARTISTS` are the paper's two sets, `("",)` is the bare
            concept.
        layers: Cross-attention layers, all if `None`.

    Returns:
        The change of `to_k` and `to_v` in all layers.

    Raises:
        ValueError: A concept is empty, cut off or equals its target, two pairs contradict one another, a preserved
            concept is edited, or a number is out of range.
        TypeError: A list of texts is one text.
        UnknownSite: The UNet has no such layer.
    """
    sites = projection_sites(model, layers, ("k", "v"))
    edit = feature_edit(model, pairs, preserve, frames=frames, keys=keys)
    protocol = {
        "method": "uce", "pairs": dict(pairs), "preserve": list(preserve), "preserve_weight": preserve_weight,
        "keys": keys, "frames": list(frames),
    }  # fmt: skip
    return solve_projections(
        model, sites, edit, ridge=ridge, preserve_weight=preserve_weight, protocol=protocol
    )


@dataclass(frozen=True)
class Search:
    """Settings of the search in `debias`.

    Attributes:
        rate: Step of an attribute's weight, in lengths of the concept's feature, for a share that is too low by 1.
        tolerance: The search stops when no share is off by more.
        rounds: Largest number of rounds.

    Raises:
        ValueError: A number is out of range.
    """

    rate: float = 0.5
    tolerance: float = 0.05
    rounds: int = 10

    def __post_init__(self) -> None:
        if not (self.rate > 0 and self.tolerance >= 0 and self.rounds >= 1):
            raise ValueError(
                f"`rate` and `rounds` must be positive and `tolerance` 0 or more, got {self.rate!r}, {self.rounds!r} "
                f"and {self.tolerance!r}. Leave them out for 0.5, 10 and 0.05."
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
    search: Search | None = None,
    on_progress: Progress | None = None,
) -> Change:
    """Return the change that makes pictures of `concept` show its attributes in the given shares.

    Each round applies the present change, calls `classify`, raises the weight of attributes whose share is too low and
    lowers the weight of the others. The best change of all rounds is returned; the model is restored after each round.

    Args:
        model: The model to edit.
        concept: The concept with an unbalanced attribute, as `"a doctor"`.
        shares: Attribute to its target share of the pictures, in [0, 1], with a sum of at most 1.
        classify: Called with the edited model; returns the share of pictures with each attribute, in [0, 1].
        preserve: As in `uce`.
        preserve_weight: As in `uce`.
        ridge: As in `uce`.
        frames: As in `uce`.
        layers: As in `uce`.
        search: Rate, tolerance and number of rounds; `Search()` if `None`.
        on_progress: Called with (rounds done, largest number of rounds, label).

    Returns:
        The best change; its report holds the shares and weights of every round.

    Raises:
        ValueError: Shares are out of range, `classify` returns other attributes, or as in `uce`.
        TypeError: As in `uce`.
        UnknownSite: As in `uce`.
    """
    _check_shares(concept, shares)
    search = search or Search()
    sites = projection_sites(model, layers, ("k", "v"))
    edit = feature_edit(model, {concept: ""}, preserve, frames=frames)
    directions = _directions(model, edit.keys, list(shares))
    weights = torch.zeros(len(shares), dtype=torch.float64)
    best: tuple[float, Change] | None = None
    history: list[dict[str, Any]] = []
    for done in range(1, search.rounds + 1):
        sources = edit.keys + torch.einsum("a,and->nd", weights, directions).float()
        change = solve_projections(
            model, sites, dataclasses.replace(edit, sources=sources, started=time.perf_counter()),
            ridge=ridge, preserve_weight=preserve_weight,
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
            on_progress(done, search.rounds, "balancing attributes")
        if off <= search.tolerance:
            break
        weights = weights + search.rate * short
    assert best is not None
    report = {**best[1].report, "rounds": history, "off": best[0]}
    return Change(best[1].movements, best[1].protocol, report)


def _directions(model: TextToImage, keys: Tensor, attributes: Sequence[str]) -> Tensor:
    """Return each attribute's feature without its part along the key and as long as the key, shape (A, N, D)."""
    places = last_tokens(model, [(name, "") for name in attributes])
    features = read_features(model, [text for text, _ in places])
    rows = torch.stack([features[text][place] for text, place in places]).double()  # (A, D)
    k = keys.double()
    along = (rows @ k.T) / k.square().sum(1)  # (A, N)
    across = rows[:, None] - along[..., None] * k
    return across * (k.norm(dim=1)[:, None] / across.norm(dim=2, keepdim=True).clamp(min=1e-300))


def _described(shares: Mapping[str, float], weights: Tensor) -> str:
    return ", ".join(f"{w:+.3f} {name}" for name, w in zip(shares, weights.tolist(), strict=True))


def _counted(counts: Mapping[str, float], shares: Mapping[str, float]) -> dict[str, float]:
    missing = [name for name in shares if name not in counts]
    if missing or not all(0 <= counts[name] <= 1 for name in shares):
        raise ValueError(
            f"`classify` returned {dict(counts)!r}: give the share of each of {', '.join(map(repr, shares))}, from 0 "
            "to 1. Divide counts by the number of pictures."
        )
    return {name: float(counts[name]) for name in shares}


def _check_shares(concept: str, shares: Mapping[str, float]) -> None:
    check_one_text(concept, "`concept`", "balance one concept after the other")
    if not isinstance(shares, Mapping):
        raise TypeError(
            f"`shares` must be a dictionary of attributes and their shares, got {shares!r}: write {{'red': 0.5, "
            "'blue': 0.5}."
        )
    if not concept.strip():
        raise ValueError("the concept is empty: write the words of the concept to balance.")
    total = sum(shares.values())
    in_range = all(0 <= share <= 1 for share in shares.values())
    if not shares or not in_range or total > 1 + 1e-9 or not all(name.strip() for name in shares):
        raise ValueError(
            f"`shares` must give attributes their shares, from 0 to 1 and at most 1 in all, got {dict(shares)!r}. For "
            "two in balance: {'red': 0.5, 'blue': 0.5}."
        )
