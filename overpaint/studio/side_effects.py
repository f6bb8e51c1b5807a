r"""Prediction of a change's effect on other concepts, from text features alone, before any picture is drawn.

Captions of each known concept, and of the erased ones, are encoded with and without the change. The drift of a concept
is :math:`\|E' - E\|^2 / \|E'_{old} - E_{old}\|^2` of the text features :math:`E` at all positions: the squared movement
of its captions, relative to that of the erased concepts. Concepts with a drift of 5 % or more are called endangered.
The drift of the empty prompt is :math:`\|E' - E\| / \|E\|`. If a model has two text encoders, both figures are computed
for each encoder and the larger one is used, because the features of one can be so large that they hide the other's.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from overpaint.edit import Change, verdict
from overpaint.edit.drift import feature_drift
from overpaint.edit.vocabulary import concepts
from overpaint.model import TextToImage
from overpaint.model.sampling import Progress
from overpaint.studio.model_copy import copy_model

__all__ = ["ConceptDrift", "SideEffects", "predict"]

_CAPTION = "a picture of {}"
_BATCH_SIZE = 64  # captions between two calls of `on_progress`
_ENDANGERED = 0.05


@dataclass(frozen=True)
class ConceptDrift:
    """Movement of a concept's captions, relative to that of the erased concepts.

    Attributes:
        concept: The words of the concept.
        drift: At least 0; 1 is the movement of the erased concepts.
        preserved: True if the edit itself preserved the concept.
    """

    concept: str
    drift: float
    preserved: bool = False

    @property
    def endangered(self) -> bool:
        """True if the drift is so large that pictures are likely to show it."""
        return self.drift >= _ENDANGERED


@dataclass(frozen=True)
class SideEffects:
    """The predicted effect of a change.

    Attributes:
        drifts: Drifts of the known concepts, the largest first; empty if text features cannot show them.
        reached: Share of the target movement that the solve, or its repair, reports; `None` if the change has another
            strength than 1, where it does not follow from the report.
        empty_prompt: Drift of the empty prompt, which guidance uses for every picture; `None` if it is not known.
        rank: Rank of the largest movement.
        size: Norm of the movement relative to that of the weight, if reported.
        reason: Why `drifts` is empty, if it is.
        verdict: One sentence: what moves, how far the empty prompt moves, what is endangered.
    """

    drifts: tuple[ConceptDrift, ...]
    reached: float | None
    empty_prompt: float | None
    rank: int
    size: float | None
    reason: str = ""
    verdict: str = ""

    @property
    def endangered(self) -> tuple[ConceptDrift, ...]:
        """The concepts whose pictures are likely to change."""
        return tuple(drift for drift in self.drifts if drift.endangered)


def predict(
    model: TextToImage,
    change: Change,
    *,
    vocabulary: Sequence[str] | None = None,
    on_progress: Progress | None = None,
) -> SideEffects:
    """Return the predicted effect of `change` on concepts that it does not name.

    Args:
        model: The original model.
        change: Drifts are computed for changes of text encoders; for others only reported figures are returned.
        vocabulary: Concepts to measure; the shipped list for the model if `None`.
        on_progress: Called before each batch of captions.
    """
    drifts: tuple[ConceptDrift, ...] = ()
    report = change.report
    reason, empty_prompt = "", _number(report.get("empty_prompt_drift"))
    if change.pairs and all(site.startswith("text") for site in change.sites):
        names = concepts("icons" if model.name == "icons" else "natural")
        drifts, empty_prompt = _drifts(
            model, change, names if vocabulary is None else vocabulary, on_progress
        )
    else:
        reason = "it moves the UNet" if change.pairs else "its file does not name its concepts"
    repaired = _number(report.get("layer_missed"))
    missed = _number(report.get("missed")) if repaired is None else repaired
    before, after = _number(report.get("residual_before")), _number(report.get("residual_after"))
    if missed is None and before and after is not None:
        missed = (after / before) ** 2
    return SideEffects(
        drifts,
        None if missed is None else max(0.0, 1 - missed),
        empty_prompt,
        max(m.left.shape[1] for m in change.movements),
        _number(report.get("relative_delta_norm")),
        reason,
        verdict.describe(_with_measured(change, drifts, empty_prompt)),
    )


def _with_measured(
    change: Change, drifts: Sequence[ConceptDrift], empty_prompt: float | None
) -> Change:
    """Return `change` with a report of the drifts that were measured here, for `verdict.describe`."""
    if not drifts or empty_prompt is None:
        return change
    measured = {
        "empty_prompt_drift": empty_prompt,
        "endangered": [one.concept for one in drifts if one.endangered and one.preserved],
        "not_kept": [one.concept for one in drifts if one.endangered and not one.preserved],
    }
    return replace(change, report={**change.report, **measured})


def _drifts(
    model: TextToImage, change: Change, vocabulary: Sequence[str], on_progress: Progress | None
) -> tuple[tuple[ConceptDrift, ...], float]:
    """Return the drifts, the largest first, and the drift of the empty prompt."""
    erased = [f" {' '.join(old.lower().split())} " for old in change.pairs]
    others = [c for c in vocabulary if not any(old in f" {c.lower()} " for old in erased)]
    captions = [_CAPTION.format(concept) for concept in others]
    edited = copy_model(model, change)
    erased_captions = [_CAPTION.format(old) for old in change.pairs]
    references = [
        feature_drift(before, after) for before, after in _encoded(model, edited, erased_captions)
    ]
    squares: list[float] = []
    for start in range(0, len(captions), _BATCH_SIZE):
        if on_progress is not None:
            on_progress(start, len(captions), "predicting side effects")
        batch = captions[start : start + _BATCH_SIZE]
        encoders = [
            [
                feature_drift(a, b, relative_to=reference) ** 2
                for a, b in zip(before.split(1), after.split(1), strict=True)
            ]
            for reference, (before, after) in zip(
                references, _encoded(model, edited, batch), strict=True
            )
        ]
        squares += map(max, zip(*encoders, strict=True))
    reported: Any = change.report.get("endangered") or []
    preserved = {row.get("concept") for row in reported if isinstance(row, dict)}
    preserved |= {str(text) for text in change.protocol.get("preserve", [])}
    drifts = [
        ConceptDrift(concept, square, concept in preserved)
        for concept, square in zip(others, squares, strict=True)
    ]
    empty_prompt = max(
        feature_drift(before, after, relative_to=before)
        for before, after in _encoded(model, edited, [""])
    )
    return tuple(sorted(drifts, key=lambda drift: -drift.drift)), empty_prompt


def _encoded(
    model: TextToImage, edited: TextToImage, prompts: Sequence[str]
) -> list[tuple[Tensor, Tensor]]:
    """Return the features of `prompts` in both models, a pair for each text encoder, shape (N, L, D_i).

    SDXL packs both encoders into one tensor: the columns of the first, the columns of the second, and a last row with
    the pooled output of the second.
    """
    before, after = model.encode(prompts), edited.encode(prompts)
    if len(model.text_encoders) == 1:
        return [(before, after)]
    width = model.text_encoder.config.hidden_size
    parts = [
        (f[:, :-1, :width], torch.cat([f[:, :-1, width:].flatten(1), f[:, -1]], 1)[:, None])
        for f in (before, after)
    ]
    return list(zip(*parts, strict=True))


def _number(value: Any) -> float | None:
    """Return a number of a report, or `None`; a file may hold any type there."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number else None
