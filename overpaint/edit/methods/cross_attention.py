r"""Closed-form edits of the UNet's cross-attention keys and values: the part that UCE, TIME and LocoEdit share.

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

from overpaint.edit.captions import captions, layer_inputs
from overpaint.edit.change import Change
from overpaint.edit.drift import weight_drift
from overpaint.edit.least_squares import Factors, Solution, contradiction, factorise
from overpaint.edit.methods.quickfix import preserve_gram
from overpaint.edit.movement import Movement
from overpaint.edit.provenance import notes
from overpaint.edit.provenance import protocol as shared_protocol
from overpaint.edit.weights import encoder_index, find_weights
from overpaint.errors import UnknownSite, UnsupportedModel
from overpaint.model import TextToImage, text_features
from overpaint.model.sites import Site, find_unet

__all__ = [
    "FeatureEdit",
    "Layer",
    "Projection",
    "last_tokens",
    "preserved_keys",
    "projection_sites",
    "pooled_remark",
    "read_features",
    "solve_projections",
    "unconditional_features",
]

_ALL_POSITIONS = ("quickfix", "random_site")  # methods that preserve every token of a prompt
_LAST_TOKEN = ("uce", "debias")  # methods that preserve the last token of a prompt

Layer = int | str | Site
Projection = Literal["k", "v"]
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
    protocol: Mapping[str, Any],
) -> Change:
    """Return the change of all `sites` by a feature edit; the model is not modified.

    Args:
        model: The model whose weights move.
        sites: From `projection_sites`.
        edit: Keys, sources and preserved keys.
        ridge: Pull towards the old weights, in units of a key's squared norm. Positive.
        preserve_weight: Weight of one preserved key against one edited key.
        protocol: The method and its arguments; model, ridge, sites and versions are added.

    Raises:
        ValueError: Two pairs contradict one another, a preserved prompt is edited, or a weight is not finite.
        UnsupportedModel: The projections do not read the text features, or are not plain matrices in memory.
    """
    _check_contradictions(edit)
    weights = find_weights(model, sites)
    gram = preserve_gram(edit.preserve, preserve_weight)
    started = time.perf_counter()
    factors = factorise(edit.keys, ridge=ridge, gram=gram, method="auto")
    shift = edit.sources.double() - edit.keys.double()
    inputs = (edit.keys, edit.preserve, edit.empty)
    projected = [rows.double() @ factors.right.T for rows in inputs]  # shared by all weights
    movements: list[Movement] = []
    squares: list[dict[str, float]] = []
    for weight in weights:
        matrix = weight.parameter.detach().to("cpu", torch.float64)
        _check_weight(weight.site, matrix, edit.keys.shape[1])
        residuals = shift @ matrix.T
        solution = factors.solve(residuals)
        movements.append(
            Movement.from_solution(
                weight.site, weight.parameter, solution, edit.keys, residuals, edit.owners, gram
            )
        )
        squares.append(_squared_norms(solution, residuals, projected, edit, weight.parameter))
    solved = time.perf_counter()
    report = {
        "seconds": {
            "keys": round(started - edit.started, 6),
            "solve": round(solved - started, 6),
        },
        **_report(factors, edit, movements, squares),
    }
    method, pairs = protocol["method"], protocol["pairs"]
    full = {
        **shared_protocol(method, model, pairs, unet=True), **protocol, "ridge": ridge, "sites": list(sites)
    }  # fmt: skip
    report |= notes(model, [*pairs, *pairs.values()], pooled_remark(model))
    return Change(tuple(movements), full, report)


def preserved_keys(model: TextToImage, method: Any, site: str, prompts: Sequence[str]) -> Tensor:
    """Return the keys (M, D_in) at the weight `site` that a change by `method` preserves for `prompts`.

    Raises:
        ValueError: The keys of changes by `method` cannot be read again.
    """
    if method in _ALL_POSITIONS:
        ids = model.tokenize(prompts, encoder=encoder_index(model, site.partition(".")[0]))
        return layer_inputs(model, site, ids).flatten(0, 1)
    if method in _LAST_TOKEN:
        places = last_tokens(model, [(prompt, "") for prompt in prompts])
        features = read_features(model, [text for text, _ in places])
        return torch.stack([features[text][place] for text, place in places])
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


def _check_contradictions(edit: FeatureEdit) -> None:
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


def _check_weight(site: str, weight: Tensor, width: int) -> None:
    if weight.shape[1] != width:
        raise UnsupportedModel(
            f"{site} reads {weight.shape[1]} numbers for each token, but the text features have {width}: this UNet "
            "transforms them before its cross-attention, so no edit can be solved. Use a plain Stable Diffusion "
            "pipeline."
        )
    if not bool(torch.isfinite(weight).all()):
        raise ValueError(f"the weight at {site} holds NaN or infinity: load an undamaged model.")


def _squared_norms(
    solution: Solution,
    residuals: Tensor,
    projected: Sequence[Tensor],
    edit: FeatureEdit,
    parameter: Tensor,
) -> dict[str, float]:
    """Return squared norms that are summed over the weights for the report.

    `projected` holds keys, preserved keys and the empty prompt times the right factor, which all weights share. The
    rows of that factor are orthonormal, so these products with the left factor have the same norms as the inputs with
    the whole movement.
    """
    left, weight = solution.left, parameter.detach().cpu().float()
    keys, preserve, empty = projected
    norms = {
        "delta": weight_drift(left),
        "weight": weight_drift(weight),
        "before": float(residuals.norm()),
        "after": float((residuals - keys @ left.T).norm()),
        "target": weight_drift(weight, inputs=edit.sources),
        "preserve_moved": weight_drift(left, inputs=preserve),
        "preserve": weight_drift(weight, inputs=edit.preserve),
        "empty_moved": weight_drift(left, inputs=empty),
        "empty": weight_drift(weight, inputs=edit.empty),
    }
    return {name: norm**2 for name, norm in norms.items()}


def _report(
    factors: Factors,
    edit: FeatureEdit,
    movements: Sequence[Movement],
    squares: Sequence[Mapping[str, float]],
) -> dict[str, Any]:
    sums = {name: sum(square[name] for square in squares) for name in squares[0]}

    def ratio(part: str, whole: str) -> float:
        return (sums[part] / sums[whole]) ** 0.5 if sums[whole] > 0 else 0.0

    return {
        "weights": len(movements),
        "keys": len(edit.keys),
        "preserved_keys": len(edit.preserve),
        "condition_number": factors.condition_number,
        "effective_rank": factors.effective_rank,
        "rank": max(m.left.shape[1] for m in movements),
        "delta_norm": max(sums["delta"], 0.0) ** 0.5,
        "relative_delta_norm": ratio("delta", "weight"),
        "residual_before": ratio("before", "target"),
        "residual_after": ratio("after", "target"),
        "preserve_drift": ratio("preserve_moved", "preserve"),
        "empty_prompt_drift": ratio("empty_moved", "empty"),
    }
