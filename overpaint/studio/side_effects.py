r"""What a change will do to other concepts, from text alone: told at once, before any picture is drawn.

Plain captions of each known concept, and of the erased ones, are encoded with and without the change. The drift of a
concept is :math:`\|E' - E\|^2 / \|E'_{old} - E_{old}\|^2` of the text features :math:`E`, all positions: how far its
captions move, as a share of how far those of the erased concepts do. Concepts of 5 % and more are endangered. The empty
prompt's movement is measured likewise, as a share of its own size. What a solve reports of itself holds for the edit as
made: of a change at another strength it is left out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from overpaint.edit import Change
from overpaint.edit.vocabulary import concepts
from overpaint.model import TextToImage
from overpaint.studio.model_copy import private

__all__ = ["Collateral", "Drift", "collateral"]

_FRAMES = ("a picture of {}",)
_BATCH = 64  # captions between two looks at who else waits
ENDANGERED = 0.05


@dataclass(frozen=True)
class Drift:
    """How far a concept's captions move, as a share of the erased concept's; 0 for not at all.

    `kept` says that the edit itself looked after it.
    """

    concept: str
    share: float
    kept: bool = False

    @property
    def endangered(self) -> bool:
        """Whether it moves so far that pictures are likely to show it."""
        return self.share >= ENDANGERED


@dataclass(frozen=True)
class Collateral:
    """What a change is expected to do.

    Attributes:
        drifts: Of the known concepts, the largest first; empty where it cannot be told from text.
        reached: Share of the wanted movement that the solve, or its repair, reports; `None` at another strength than 1.
        empty: Movement of the empty prompt, relative to its own size, if it can be told; guidance reads it for every
            picture.
        rank: Of the largest movement.
        size: Of the movement, relative to the weight it is added to, if reported.
        reason: Why no drift can be told, if it cannot.
    """

    drifts: tuple[Drift, ...]
    reached: float | None
    empty: float | None
    rank: int
    size: float | None
    reason: str = ""

    @property
    def endangered(self) -> tuple[Drift, ...]:
        """The concepts that are likely to suffer."""
        return tuple(drift for drift in self.drifts if drift.endangered)


def collateral(
    model: TextToImage,
    change: Change,
    *,
    vocabulary: Sequence[str] | None = None,
    step: Callable[[float, float, str], None] | None = None,
) -> Collateral:
    """Predict what `change` does to concepts that it does not name.

    Args:
        model: The unedited model.
        change: Of text encoders' weights; of others the report alone is told.
        vocabulary: Concepts to look at; the shipped list for the model if `None`.
        step: Told between batches of captions.
    """
    drifts: tuple[Drift, ...] = ()
    told = {} if change.protocol.get("strength") else change.report
    reason, empty = "", _number(told.get("empty_prompt_drift"))
    if change.pairs and all(site.startswith("text") for site in change.sites):
        names = concepts("icons" if model.name == "icons" else "natural")
        drifts, empty = _drifts(model, change, names if vocabulary is None else vocabulary, step)
    else:
        reason = "it moves the UNet" if change.pairs else "it does not say which concept it is for"
    repaired = _number(told.get("layer_missed"))
    missed = _number(told.get("missed")) if repaired is None else repaired
    before, after = _number(told.get("residual_before")), _number(told.get("residual_after"))
    if missed is None and before and after is not None:
        missed = (after / before) ** 2
    return Collateral(
        drifts,
        None if missed is None else max(0.0, 1 - missed),
        empty,
        max(m.left.shape[1] for m in change.movements),
        _number(told.get("relative_delta_norm")),
        reason,
    )


def _drifts(
    model: TextToImage,
    change: Change,
    known: Sequence[str],
    step: Callable[[float, float, str], None] | None,
) -> tuple[tuple[Drift, ...], float]:
    """Return the drifts, the largest first, and how far the empty prompt moves, relative to its own size."""
    olds = [f" {' '.join(old.lower().split())} " for old in change.pairs]
    others = [c for c in known if not any(old in f" {c.lower()} " for old in olds)]
    asked = [*change.pairs, *others]
    captions = [frame.replace("{}", concept) for concept in asked for frame in _FRAMES]
    mine = private(model, change)
    moves: list[Tensor] = []
    for start in range(0, len(captions), _BATCH):
        if step is not None:
            step(start, len(captions), "foretelling what else moves")
        part = captions[start : start + _BATCH]
        shift = mine.encode(part).double() - model.encode(part).double()
        moves.append(shift.square().sum((1, 2)).cpu())
    means = torch.cat(moves).view(len(asked), len(_FRAMES)).mean(1).tolist()
    own = sum(means[: len(olds)]) / len(olds)
    named: Any = change.report.get("endangered") or []
    kept = {row.get("concept") for row in named if isinstance(row, dict)}
    kept |= {str(text) for text in change.protocol.get("preserve", [])}
    found = [
        Drift(concept, mean / own if own else 0.0, concept in kept)
        for concept, mean in zip(others, means[len(olds) :], strict=True)
    ]
    nothing = model.encode([""]).double()
    empty = float((mine.encode([""]).double() - nothing).norm() / nothing.norm())
    return tuple(sorted(found, key=lambda drift: -drift.share)), empty


def _number(value: Any) -> float | None:
    """Return a number of a report, if it is one; a file may hold anything there."""
    whole = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if whole else None
