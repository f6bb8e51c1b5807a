r"""Closed-form edits of the UNet's cross-attention keys and values: the part that the methods share.

Every layer reads the same text features, and none of the projections has a bias. So the edit is stated in text features
alone: a weight :math:`W` should map the keys :math:`K` to its present outputs for the sources :math:`S`. The targets
are :math:`S W^\top`, the residuals :math:`(S - K) W^\top`, and one factorisation of :math:`K` serves all weights.

Source: the objective is that of `least_squares`; the methods cite their papers.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from overpaint.edit.captions import layer_inputs
from overpaint.edit.change import Change
from overpaint.edit.drift import concept_movement, weight_drift
from overpaint.edit.least_squares import Factors, factorise
from overpaint.edit.methods.quickfix import preserve_gram
from overpaint.edit.methods.text_keys import (
    FeatureEdit,
    check_contradictions,
    last_tokens,
    read_features,
    rows_from_last_token,
)
from overpaint.edit.movement import Movement
from overpaint.edit.null_space import check_room, outside
from overpaint.edit.provenance import notes
from overpaint.edit.provenance import protocol as shared_protocol
from overpaint.edit.weights import encoder_index, find_weights
from overpaint.errors import UnknownSite, UnsupportedModel
from overpaint.model import TextToImage
from overpaint.model.sites import Site, find_unet

__all__ = [
    "Layer",
    "Projection",
    "SquaredNorms",
    "check_weight",
    "drift_report",
    "pooled_remark",
    "preserved_keys",
    "projection_sites",
    "solve_projections",
    "squared_norms",
    "trained_movement",
]

_ALL_POSITIONS = ("quickfix", "random_site")  # methods that preserve every token of a prompt
_LAST_TOKEN = ("uce", "debias")  # methods that preserve a prompt from its last token on, or at it

Layer = int | str | Site
Projection = Literal["k", "v"]


def projection_sites(
    model: TextToImage, layers: Sequence[Layer] | None, matrices: Sequence[Projection]
) -> list[str]:
    """Return the names of the key and value projections of `layers`, in execution order.

    Args:
        model: The model.
        layers: Cross-attention layers: numbers, names, or the sites of `trace.pick_window`; `None` means all.
        matrices: `"k"`, `"v"` or both.

    Raises:
        UnknownSite: The UNet has no such layer.
        ValueError: There is no layer, or a matrix is neither `"k"` nor `"v"`.
    """
    count = sum(site.kind == "cross_attn" for site in find_unet(model.unet))
    indices = range(count) if layers is None else sorted({_index(layer) for layer in layers})
    wrong = [index for index in indices if not 0 <= index < count]
    if wrong:
        raise UnknownSite(
            f"unknown layer {wrong[0]}: this model has unet.cross_attn 0 to {count - 1}. Name one of those."
        )
    unknown = [name for name in matrices if name not in ("k", "v")]
    if unknown or not matrices or not indices:
        value = repr(unknown[0]) if unknown else "none"
        raise ValueError(
            f"an edit of cross-attention moves 'k', 'v' or both, in at least one layer, got {value}: leave the "
            "argument out for the default."
        )
    return [f"unet.cross_attn.{i}.to_{name}" for i in indices for name in ("k", "v") if name in matrices]  # fmt: skip


def pooled_remark(model: TextToImage) -> str:
    """Return a remark that an edit of cross-attention does not change SDXL's pooled vector; empty for other models."""
    if len(model.text_encoders) == 1:
        return ""
    return (
        "the UNet also reads the pooled vector of the second text encoder, which an edit of cross-attention does not "
        "change: add an edit of the text encoders if pictures still show the concept."
    )


def solve_projections(
    model: TextToImage,
    sites: Sequence[str],
    edit: FeatureEdit,
    *,
    ridge: float,
    preserve_weight: float = 0.0,
    basis: Tensor | Sequence[Tensor] | None = None,
    protocol: Mapping[str, Any],
) -> Change:
    """Return the change of all `sites` by a feature edit; the model is not modified.

    Args:
        model: The model whose weights move.
        sites: From `projection_sites`.
        edit: Keys, sources and preserved keys.
        ridge: Pull towards the old weights, in units of a key's squared norm. Positive.
        preserve_weight: Weight of one preserved key against one edited key.
        basis: Orthonormal directions (D, R) of text features whose outputs do not change at all, float64, for all
            weights or for each of them.
        protocol: The method and its arguments; model, ridge, sites and versions are added.

    Raises:
        ValueError: Two pairs contradict one another, a preserved prompt is edited, or a weight is not finite.
        UnsupportedModel: The projections do not read the text features, or are not plain matrices in memory.
    """
    check_contradictions(edit)
    weights = find_weights(model, sites)
    gram = preserve_gram(edit.preserve, preserve_weight)
    concepts = list(protocol["pairs"])
    started = time.perf_counter()
    shift = edit.sources.double() - edit.keys.double()
    systems: list[_System] = []
    movements: list[Movement] = []
    squares: list[SquaredNorms] = []
    shared = basis is None or isinstance(basis, Tensor)
    bases: Sequence[Tensor | None] = (
        [basis] * len(weights) if basis is None or isinstance(basis, Tensor) else basis
    )
    for weight, directions in zip(weights, bases, strict=True):
        matrix = weight.parameter.detach().to("cpu", torch.float64)
        check_weight(weight.site, matrix, edit.keys.shape[1])
        if not (shared and systems):
            systems.append(_system(edit, directions, concepts, ridge=ridge, gram=gram))
        system = systems[-1]
        residuals = shift @ matrix.T
        solution = system.factors.solve(residuals)
        movements.append(
            Movement.from_solution(
                weight.site, weight.parameter, solution, system.keys, residuals, edit.owners, gram
            )
        )
        squares.append(
            squared_norms(solution.left, residuals, system.projected, edit, weight.parameter)
        )
    report = {
        "seconds": {
            "keys": round(started - edit.started, 6),
            "solve": round(time.perf_counter() - started, 6),
        },
        "condition_number": max(s.factors.condition_number for s in systems),
        "effective_rank": max(s.factors.effective_rank for s in systems),
        **drift_report(edit, movements, squares, concepts),
    }
    method, pairs = protocol["method"], protocol["pairs"]
    full = {
        **shared_protocol(method, model, pairs, unet=True), **protocol, "ridge": ridge, "sites": list(sites)
    }  # fmt: skip
    report |= notes(model, [*pairs, *pairs.values()], pooled_remark(model))
    return Change(tuple(movements), full, report)


@dataclass(frozen=True, eq=False)
class _System:
    """Keys, their factors, and the keys, preserved keys and empty prompt times the right factor."""

    keys: Tensor
    factors: Factors
    projected: list[Tensor]


def _system(
    edit: FeatureEdit,
    basis: Tensor | None,
    concepts: Sequence[str],
    *,
    ridge: float,
    gram: Tensor | None,
) -> _System:
    """Return the system that all weights with these keys and this basis share."""
    keys = edit.keys
    if basis is not None:
        keys = outside(edit.keys, basis)
        check_room(edit.keys, keys, edit.owners, concepts)
    factors = factorise(keys, ridge=ridge, gram=gram, method="auto")
    inputs = (edit.keys, edit.preserve, edit.empty)
    return _System(keys, factors, [rows.double() @ factors.right.T for rows in inputs])


def preserved_keys(
    model: TextToImage, protocol: Mapping[str, Any], site: str, prompts: Sequence[str]
) -> Tensor:
    """Return the keys (M, D_in) at the weight `site` that a change with this protocol preserves for `prompts`.

    Raises:
        ValueError: The keys of changes by this method cannot be read again.
    """
    method, keys = protocol.get("method"), protocol.get("keys", "last")
    if method in _ALL_POSITIONS:
        ids = model.tokenize(prompts, encoder=encoder_index(model, site.partition(".")[0]))
        return layer_inputs(model, site, ids).flatten(0, 1)
    if method in _LAST_TOKEN:
        places = last_tokens(model, [(prompt, "") for prompt in prompts])
        features = read_features(model, [text for text, _ in places])
        return torch.cat([rows_from_last_token(features[text], end, keys) for text, end in places])
    raise ValueError(
        f"the preserve terms of a change made by {method!r} cannot be read again: save it with `gram=True`, or make "
        "one change of all concepts."
    )


def _index(layer: Layer) -> int:
    if isinstance(layer, int):
        return layer
    name = layer.name if isinstance(layer, Site) else layer
    number = name.removeprefix("unet.cross_attn.")
    if number == name or not number.isdecimal():
        raise UnknownSite(
            f"{name!r} is no cross-attention layer: give numbers, or names like 'unet.cross_attn.8'."
        )
    return int(number)


def trained_movement(
    edit: FeatureEdit,
    movements: Sequence[Movement],
    weights: Sequence[Tensor],
    concepts: Sequence[str],
) -> dict[str, float]:
    """Return the `concept_movement` of a report for movements that were not solved from the keys of `edit`.

    Args:
        edit: Keys and sources of the concepts.
        movements: One for each weight.
        weights: The weights that move, shape (D_out, D).
        concepts: The concepts.
    """
    shift = edit.sources.double() - edit.keys.double()
    moved, requested = torch.zeros(2, len(shift), dtype=torch.float64)
    for m, weight in zip(movements, weights, strict=True):
        outputs = edit.keys.double() @ m.right.double().T @ m.left.double().T
        moved += outputs.square().sum(1)
        requested += (shift @ weight.detach().cpu().double().T).square().sum(1)
    return concept_movement(moved, requested, edit.owners, concepts)


def check_weight(site: str, weight: Tensor, width: int) -> None:
    """Raise unless a weight reads text features of `width` numbers, and all its own numbers are finite.

    Raises:
        UnsupportedModel: It reads something else.
        ValueError: It holds NaN or infinity.
    """
    if weight.shape[1] != width:
        raise UnsupportedModel(
            f"{site} reads {weight.shape[1]} numbers for each token, but the text features have {width}: this UNet "
            "transforms them before its cross-attention, so no edit can be solved. Use a plain Stable Diffusion "
            "pipeline."
        )
    if not bool(torch.isfinite(weight).all()):
        raise ValueError(f"the weight at {site} holds NaN or infinity: load an undamaged model.")


@dataclass(frozen=True, eq=False)
class SquaredNorms:
    """Squared norms of the movement of one weight.

    Attributes:
        totals: Norms over all keys, by name.
        moved: Norms of the movement of each key's output, shape (N,).
        requested: Norms of each key's residual, the requested movement, shape (N,).
    """

    totals: dict[str, float]
    moved: Tensor
    requested: Tensor


def squared_norms(
    left: Tensor,
    residuals: Tensor,
    projected: Sequence[Tensor],
    edit: FeatureEdit,
    parameter: Tensor,
) -> SquaredNorms:
    """Return squared norms of the movement of one weight, which `drift_report` sums over the weights.

    Args:
        left: Left factor of the movement, shape (D_out, R). The right one has orthonormal rows.
        residuals: Targets minus present outputs of the keys, shape (N, D_out).
        projected: Keys, preserved keys and empty prompt times the right factor, which weights share: their products
            with `left` have the norms of the inputs' products with the whole movement.
        edit: The edit.
        parameter: The weight.
    """
    weight = parameter.detach().cpu().float()
    keys, preserve, empty = projected
    outputs = keys @ left.T
    norms = {
        "delta": weight_drift(left),
        "weight": weight_drift(weight),
        "before": float(residuals.norm()),
        "after": float((residuals - outputs).norm()),
        "target": weight_drift(weight, inputs=edit.sources),
        "preserve_moved": weight_drift(left, inputs=preserve),
        "preserve": weight_drift(weight, inputs=edit.preserve),
        "empty_moved": weight_drift(left, inputs=empty),
        "empty": weight_drift(weight, inputs=edit.empty),
    }
    totals = {name: norm**2 for name, norm in norms.items()}
    return SquaredNorms(totals, outputs.square().sum(1), residuals.square().sum(1))


def drift_report(
    edit: FeatureEdit,
    movements: Sequence[Movement],
    squares: Sequence[SquaredNorms],
    concepts: Sequence[str],
) -> dict[str, Any]:
    """Return the part of a report about residuals, drift and the edited `concepts`, from the norms of all weights."""
    sums = {name: sum(square.totals[name] for square in squares) for name in squares[0].totals}
    moved, requested = (
        torch.stack([getattr(square, name) for square in squares]).sum(0)
        for name in ("moved", "requested")
    )

    def ratio(part: str, whole: str) -> float:
        return (sums[part] / sums[whole]) ** 0.5 if sums[whole] > 0 else 0.0

    return {
        "weights": len(movements),
        "keys": len(edit.keys),
        "preserved_keys": len(edit.preserve),
        "rank": max(m.left.shape[1] for m in movements),
        "delta_norm": max(sums["delta"], 0.0) ** 0.5,
        "relative_delta_norm": ratio("delta", "weight"),
        "residual_before": ratio("before", "target"),
        "residual_after": ratio("after", "target"),
        "concept_movement": concept_movement(moved, requested, edit.owners, concepts),
        "preserve_drift": ratio("preserve_moved", "preserve"),
        "empty_prompt_drift": ratio("empty_moved", "empty"),
    }
