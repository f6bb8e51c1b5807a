r"""Closed-form edits of the UNet's cross-attention keys and values: the part that the methods share.

Every layer reads the same text features, and none of the projections has a bias. So the edit is stated in text features
alone: a weight :math:`W` should map the keys :math:`K` to its present outputs for the sources :math:`S`. The targets
are :math:`S W^\top`, the residuals :math:`(S - K) W^\top`, and one factorisation of :math:`K` serves all weights.

Source: the objective is that of `least_squares`; the methods cite their papers.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from overpaint.edit.captions import align_captions, captions, layer_inputs
from overpaint.edit.change import Change
from overpaint.edit.drift import weight_drift
from overpaint.edit.least_squares import Factors, contradiction, factorise
from overpaint.edit.methods.quickfix import preserve_gram
from overpaint.edit.movement import Movement
from overpaint.edit.null_space import check_room, outside
from overpaint.edit.provenance import notes
from overpaint.edit.provenance import protocol as shared_protocol
from overpaint.edit.weights import encoder_index, find_weights
from overpaint.errors import UnknownSite, UnsupportedModel
from overpaint.model import TextToImage, text_features
from overpaint.model.sites import Site, find_unet

__all__ = [
    "FeatureEdit",
    "Keys",
    "Layer",
    "Projection",
    "check_contradictions",
    "check_weight",
    "drift_report",
    "feature_edit",
    "last_tokens",
    "pooled_remark",
    "preserved_keys",
    "projection_sites",
    "read_features",
    "rows_from_last_token",
    "solve_projections",
    "squared_norms",
    "unconditional_features",
]

_ALL_POSITIONS = ("quickfix", "random_site")  # methods that preserve every token of a prompt
_LAST_TOKEN = ("uce", "debias")  # methods that preserve a prompt from its last token on, or at it

Layer = int | str | Site
Projection = Literal["k", "v"]
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
        ValueError: A concept is cut off, or `keys` is another word.
    """
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


def solve_projections(
    model: TextToImage,
    sites: Sequence[str],
    edit: FeatureEdit,
    *,
    ridge: float,
    preserve_weight: float = 0.0,
    basis: Tensor | Callable[[Tensor], Tensor] | None = None,
    protocol: Mapping[str, Any],
) -> Change:
    """Return the change of all `sites` by a feature edit; the model is not modified.

    Args:
        model: The model whose weights move.
        sites: From `projection_sites`.
        edit: Keys, sources and preserved keys.
        ridge: Pull towards the old weights, in units of a key's squared norm. Positive.
        preserve_weight: Weight of one preserved key against one edited key.
        basis: Orthonormal directions (D, R) of text features whose outputs do not change at all, or a function that
            returns them for a weight (D_out, D) in float64.
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
    squares: list[dict[str, float]] = []
    for weight in weights:
        matrix = weight.parameter.detach().to("cpu", torch.float64)
        check_weight(weight.site, matrix, edit.keys.shape[1])
        if callable(basis) or not systems:
            directions = basis(matrix) if callable(basis) else basis
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
        **drift_report(edit, movements, squares),
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


def squared_norms(
    left: Tensor,
    residuals: Tensor,
    projected: Sequence[Tensor],
    edit: FeatureEdit,
    parameter: Tensor,
) -> dict[str, float]:
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


def drift_report(
    edit: FeatureEdit, movements: Sequence[Movement], squares: Sequence[Mapping[str, float]]
) -> dict[str, Any]:
    """Return the part of a report about residuals and drift, from the `squared_norms` of all weights."""
    sums = {name: sum(square[name] for square in squares) for name in squares[0]}

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
        "preserve_drift": ratio("preserve_moved", "preserve"),
        "empty_prompt_drift": ratio("empty_moved", "empty"),
    }
