"""One text layer in the automatic edit: fit its projection and its MLP, with the preserve list of `preserve_search`.

Source: ours; `automatic` describes the method and cites the papers that it builds on.
Deviations: none, the method is ours.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor

from overpaint.edit import caption_sums as texts
from overpaint.edit import vocabulary as vocabularies
from overpaint.edit.caption_sums import TEST_CAPTIONS, Reader, Sums
from overpaint.edit.change import Change
from overpaint.edit.concept_words import words
from overpaint.edit.drift import weight_drift
from overpaint.edit.least_squares import factorise
from overpaint.edit.methods import layer_scan, mlp_repair, preserve_search
from overpaint.edit.methods.preserve_search import RIDGES
from overpaint.edit.movement import Movement
from overpaint.edit.weights import find_weight
from overpaint.model import TextToImage
from overpaint.model.sampling import Progress

__all__ = [
    "Fit",
    "FitSettings",
    "LayerEdit",
    "Request",
    "edit_best_layer",
    "edit_layer",
    "ignore_progress",
    "no_layer",
]

Term = dict[str, Any]


class FitSettings(TypedDict, total=False):
    """Keyword arguments of `auto` that set the fit of a layer; `Fit` describes them and has the defaults."""

    contexts: int
    background: int
    bound: float
    preserve_weight: float | Literal["auto"]
    allowance: float
    ridge: float | Literal["auto"]
    repair: bool


@dataclass(frozen=True)
class Fit:
    """Settings of the fit of a layer in `auto`.

    Attributes:
        contexts: Number of captions of each edited concept.
        background: Number of captions that should not move.
        bound: Largest squared drift of a concept, relative to the target movement of the edit.
        preserve_weight: Weight of an average background caption against an average caption of a concept, or `"auto"`,
            one of `preserve_search.WEIGHTS`.
        allowance: Share of the target movement that may be given up to preserve concepts.
        ridge: Pull towards the old weight, in units of a caption's squared keys; positive, or `"auto"`, one of
            `preserve_search.RIDGES`.
        repair: Fit the layer's MLP to the residual that its projection cannot remove: a second weight moves.

    Raises:
        ValueError: A setting is out of range.
    """

    contexts: int = 400
    background: int = 2000
    bound: float = 0.02
    preserve_weight: float | str = "auto"
    allowance: float = 0.05
    ridge: float | str = 0.001
    repair: bool = True

    def __post_init__(self) -> None:
        for name, count in (("contexts", self.contexts), ("background", self.background)):
            if count < 8:
                raise ValueError(
                    f"`{name}` must be at least 8 captions, got {count}: some hundred are usual."
                )
        weight, ridge = self.preserve_weight, self.ridge
        if weight != "auto" and not (isinstance(weight, int | float) and 0 <= weight < math.inf):
            raise ValueError(
                f"`preserve_weight` must be 'auto' or a number from 0, got {weight!r}. 15 is usual."
            )
        for name, share in (("bound", self.bound), ("allowance", self.allowance)):
            if not 0 < share < math.inf:
                raise ValueError(
                    f"`{name}` must be positive and finite, got {share!r}: 0.02 is two per cent."
                )
        if ridge != "auto" and not (isinstance(ridge, int | float) and 0 < ridge < math.inf):
            raise ValueError(f"`ridge` must be 'auto' or positive and finite, got {ridge!r}.")


@dataclass(frozen=True)
class Request:
    """Arguments of `auto` about texts: the pairs, and everything that should not drift."""

    model: TextToImage
    pairs: dict[str, str]
    known: tuple[str, ...]
    preserve: tuple[str, ...]
    without: tuple[str, ...]
    seed: int
    part: str = "text"  # the text encoder
    aliases: Mapping[str, str] = field(
        default_factory=dict
    )  # alias to its concept; part of `pairs`

    @property
    def heads(self) -> list[str]:
        """Known concepts that are not erased; if an erased concept begins with one, that beginning is not edited."""
        erased = {words(old) for old in self.pairs}
        return [c for c in self.known if words(c) not in erased]

    @property
    def banned(self) -> list[str]:
        """Texts whose words are not used to fill captions."""
        return sorted({*self.pairs, *self.pairs.values(), *self.without})

    @property
    def others(self) -> list[str]:
        """Concepts that should not drift."""
        return texts.other_concepts(self.known, self.pairs)

    @cached_property
    def fillers(self) -> tuple[str, ...]:
        """Words that fill captions."""
        return vocabularies.fillers(self.model.tokenizer, without=self.banned)

    def frames(self, size: int, seed: int) -> tuple[str, ...]:
        """Return `size` frames with random words; their seed is that of the request plus `seed`."""
        return vocabularies.frames(
            self.fillers, size=size, seed=self.seed + seed, among=self.others
        )

    def term(self, background: int, seed: int) -> Term:
        """Return the preserve term of `background` captions, without its weight."""
        return {
            "background": background, "seed": self.seed + seed, "without": self.banned, "concepts": self.others
        }  # fmt: skip


@dataclass(frozen=True, eq=False)
class LayerEdit:
    """Movements of a layer, and the entries that it adds to the change's protocol and report."""

    movements: tuple[Movement, ...]
    protocol: dict[str, Any]
    report: dict[str, Any]


def ignore_progress(done: int, total: int, label: str) -> None:
    """Ignore the progress."""


def no_layer(fit: Fit, layer: int | str) -> LayerEdit:
    """Return an edit without movements, for concepts whose tokens are all replaced; `"auto"` settings get defaults."""
    settings = {
        "terms": [],
        "layer": 0 if layer == "auto" else layer,
        "ridge": RIDGES[1] if isinstance(fit.ridge, str) else fit.ridge,
        "preserve_weight": 0.0 if isinstance(fit.preserve_weight, str) else fit.preserve_weight,
    }
    return LayerEdit((), settings, {"endangered": [], "not_kept": []})


def edit_layer(
    request: Request, pairs: Mapping[str, str], fit: Fit, layer: int, on_progress: Progress
) -> LayerEdit:
    """Return the edit of one layer for some of the pairs."""
    model = request.model
    reader = Reader.at_layer(model, layer, request.part)
    frames, test_frames = request.frames(fit.contexts, 0), request.frames(TEST_CAPTIONS, 1)
    on_progress(0, 4, "reading captions of the concepts")
    captions, test_pairs = (
        texts.extended_pairs(model, pairs, f, request.heads, request.part)
        for f in (frames, test_frames)
    )
    fitted, test_sums = ([reader.sums(c) for c in group] for group in (captions, test_pairs))
    on_progress(1, 4, "reading background captions")
    term, test_term = request.term(fit.background, 0), request.term(4 * TEST_CAPTIONS, 1)
    others, test_others = (texts.background_captions(model, t) for t in (term, test_term))
    background, test_gram = (texts.background_gram(reader, part) for part in (others, test_others))
    scan = preserve_search.background_scan(
        fitted,
        test_sums,
        background,
        test_gram,
        preserve_weight=fit.preserve_weight,
        ridge=fit.ridge,
    )
    weight, ridge = preserve_search.best_row(scan)
    on_progress(2, 4, "preserving concepts that drift")
    concepts = [*request.others, *request.preserve]
    preserved = preserve_search.preserve_concepts(
        fitted, test_sums, weight * background, [reader.gram(texts.concept_captions(c, test_frames)) for c in concepts],
        ridge=ridge, bound=fit.bound, allowance=fit.allowance,
    )  # fmt: skip
    terms = [{**term, "weight": weight}]
    terms += [{"concept": c, "weight": w} for c, w in zip(concepts, preserved.weights, strict=True) if w]  # fmt: skip
    owners = [list(request.pairs).index(old) for old in pairs]
    movement = _movement(reader, fitted, owners, preserved.gram, ridge)
    drifts = list(zip(concepts, preserved.weights, preserved.before, preserved.after, strict=True))
    movements, report = (movement,), _report(reader, movement, test_sums, scan, drifts, fit.bound)
    report["concept_movement"] = {
        old: weight_drift(movement.delta, gram=sums.gram, relative_to=sums.energy**0.5)
        for old, sums in zip(pairs, test_sums, strict=True)
        if sums.energy
    }
    if fit.repair:
        on_progress(3, 4, "fitting the MLP")
        second, layer_report = mlp_repair.repair(
            model, movement, layer=layer, pairs=captions, preserve=texts.preserved_captions(others, terms, test_frames),
            test_pairs=test_pairs, test_captions=test_others, ridge=ridge,
        )  # fmt: skip
        movements, report = (movement, second), report | layer_report
    settings = {"terms": terms, "preserve_weight": weight, "ridge": ridge, "layer": layer}
    return LayerEdit(movements, settings, report)


def edit_best_layer(
    request: Request, pairs: Mapping[str, str], fit: Fit, on_progress: Progress
) -> LayerEdit:
    """Return the edit of the layer whose quick edit has the best result at the encoder's output."""
    model = request.model
    quick = dataclasses.replace(
        fit, repair=False, contexts=max(8, fit.contexts // 4), background=max(8, fit.background // 4)
    )  # fmt: skip
    frames = request.frames(TEST_CAPTIONS, 1)
    captions = texts.extended_pairs(model, pairs, frames, request.heads, request.part)

    def quick_change(layer: int) -> Change:
        edited = edit_layer(request, pairs, quick, layer, ignore_progress)
        return Change(edited.movements, {"pairs": request.pairs}, edited.report)

    rows = layer_scan.scan(
        model,
        quick_change,
        pairs=[pair for concept in captions for pair in concept],
        test_captions=texts.background_captions(model, request.term(2 * TEST_CAPTIONS, 1)),
        part=request.part,
        on_progress=on_progress,
    )
    best = max(rows, key=preserve_search.merit)
    edited = edit_layer(request, pairs, fit, int(best["layer"]), on_progress)
    layers = [{**row, "chosen": row is best} for row in rows]
    return dataclasses.replace(edited, report={**edited.report, "layers": layers})


def _movement(
    reader: Reader, fitted: Sequence[Sums], owners: Sequence[int], gram: Tensor, ridge: float
) -> Movement:
    """Return the movement solved from keys and residuals with the given sums.

    `owners` are the indices of their concepts.
    """
    rows = [s.equivalent_rows() for s in fitted]
    keys, residuals = (torch.cat(parts) for parts in zip(*rows, strict=True))
    key_owners = [o for o, (k, _) in zip(owners, rows, strict=True) for _ in range(len(k))]
    solution = factorise(keys, ridge=ridge, gram=gram, method="auto").solve(residuals)
    parameter = find_weight(reader.model, reader.site).parameter
    return Movement.from_solution(
        reader.site, parameter, solution, keys, residuals, key_owners, gram
    )


def _report(
    reader: Reader,
    movement: Movement,
    test_sums: Sequence[Sums],
    scan: Sequence[Mapping[str, float]],
    drifts: Sequence[tuple[str, float, float, float]],
    bound: float,
) -> dict[str, Any]:
    """Return measurements on captions that are not fitted, and the concepts that drift.

    `drifts` holds for each concept its name, preserve weight, and drift before and after.
    """
    delta, best = movement.delta, preserve_search.best_row(scan)
    names = ("concept", "weight", "drift_before", "drift")
    endangered: list[dict[str, Any]] = [
        dict(zip(names, row, strict=True)) for row in drifts if row[1]
    ]
    return {
        "keys": len(movement.keys),
        "rank": movement.left.shape[1],
        "delta_norm": weight_drift(delta),
        "relative_delta_norm": weight_drift(delta, relative_to=reader.weight),
        "missed": preserve_search.mean_missed(test_sums, delta),
        "empty_prompt_drift": weight_drift(
            delta, gram=reader.gram([""]), relative_to=reader.weight
        ),
        "scan": [{**row, "chosen": (row["preserve_weight"], row["ridge"]) == best} for row in scan],
        "endangered": sorted(endangered, key=lambda row: -row["drift_before"]),
        "drifts": {row[0]: row[3] for row in drifts},
        "not_kept": [row[0] for row in drifts if row[3] > bound],
    }
