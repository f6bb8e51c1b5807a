r"""Diff-QuickFix: a closed-form edit of one projection in the text encoder's self-attention.

The layer's inputs at the old concept are the keys :math:`k`; the weight's outputs at the new concept are the targets
:math:`v = W h_{new}`. The weight then moves by the ridge solution of `least_squares`.

Source: Basu et al., 2024, https://arxiv.org/abs/2310.13730, equations 8 and 9.
Deviations: targets are computed from the layer's inputs in float64, without the bias (the release fits the weight to
outputs that include the bias; `subtract_bias=False` does the same). The forward pass stops at the layer, and all
captions are read in batches. The paper has no preserve list: `preserve` is the term of UCE, and 0.1 its default weight;
`preserve_weight="exact"` is the projection of `null_space`.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from overpaint.edit.captions import (
    POSITIONS,
    Pair,
    Positions,
    align_captions,
    aligned_rows,
    check_frames,
    check_pairs,
    read_layer,
)
from overpaint.edit.change import Change
from overpaint.edit.concept_words import check_special
from overpaint.edit.drift import concept_movement, weight_drift
from overpaint.edit.encoders import Encoder, edited_parts, joined, unread_layer
from overpaint.edit.least_squares import (
    Factors,
    Method,
    Solution,
    contradiction,
    factorise,
    product,
)
from overpaint.edit.movement import Movement, Targets
from overpaint.edit.null_space import EXACT, PreserveWeight, check_room, outside, span
from overpaint.edit.provenance import notes, protocol
from overpaint.edit.weights import PROJECTIONS, Weight, find_weight, text_layers
from overpaint.errors import UnknownSite, check_texts
from overpaint.model import TextToImage

__all__ = ["FRAMES", "preserve_gram", "quickfix"]

Projection = Literal["q", "k", "v", "out"]
_ROWS = 4096  # keys summed at a time
_MEASURED = 8  # keys of each concept whose movement is reported
FRAMES = ("", "a photo of ", "an image of ", "a picture of ")


def quickfix(
    model: TextToImage,
    pairs: Mapping[str, str],
    *,
    preserve: Sequence[str] = (),
    preserve_weight: PreserveWeight = 0.1,
    ridge: float = 0.01,
    positions: Positions = "from_subject_to_end",
    frames: Sequence[str] = FRAMES,
    subtract_bias: bool = True,
    layer: int = 0,
    projection: Projection = "out",
    encoder: Encoder = "all",
    solver: Method = "auto",
) -> Change:
    """Return the change that makes the text encoders encode each old concept as its new one.

    The model is not modified.

    Args:
        model: Its text encoders must be CLIPs.
        pairs: Old concept to new, as `{"van gogh": "painting"}`; several are solved jointly. `""` erases a concept: its
            captions are read as the frames alone.
        preserve: Whole prompts whose outputs should not change, at every position from begin-of-text to the last pad:
            SD-1.x reads pads too, and begin-of-text is the same in every prompt. `""` is allowed; guidance reads it.
        preserve_weight: Weight of one preserved key against one edited key; 0 leaves the preserve term out. `"exact"`,
            the limit of a growing weight: the keys are projected onto the complement of the preserved keys' span, so
            that no output of the layer at a preserved prompt moves. A prompt takes up to L of the D_in directions.
        ridge: Pull towards the old weight, in units of a key's squared norm. Positive.
        positions: Which tokens become keys: from the concept's last token to the end of the padding (the release),
            the last token alone (the paper's text), the last token and the end of text, all tokens of the concept
            (`"subject"`), or these and everything after (`"subject_to_end"`). Keys and targets are aligned by their
            distance from the concept's last token. Where the new concept has no such token, its first token or the
            last pad is repeated.
        frames: Captions around the concept: a prefix, or a text in which `{}` is replaced.
        subtract_bias: `False` reproduces the release, whose targets include the bias.
        layer: Text layer, from 0.
        projection: Which matrix of its self-attention; `q`, `k` and `v` read the layer's own inputs.
        encoder: `"all"` edits each text encoder, solved on its own keys; `"text"` and `"text2"` are the first and the
            second one of SDXL. An edit of one encoder does not change the other.
        solver: `"dual"`, `"primal"` (the paper's inverse), or `"auto"` for the one with the smaller system.

    Returns:
        The change of one weight in each encoder, not rounded, with condition number, effective rank and residuals in
        its report. `unedited_encoders` names the other encoders; `notes` holds remarks, such as on unknown words.

    Raises:
        ValueError: A concept is empty, cut off or its own target, two targets claim one key, a number is out of range
            or not finite, or exactly preserved prompts leave no direction for a concept.
        TypeError: A list of texts is one text.
        UnknownSite: The model has no such layer or encoder.
        UnsupportedModel: The text encoder's attention does not run through the projection, or its weight is not a plain
            matrix in memory.
    """
    _check_texts(pairs, preserve, frames)
    _check_choices(positions, projection)
    for tokenizer in model.tokenizers:
        check_special(tokenizer, preserve)
    request = _Request(
        model, pairs, tuple(preserve), preserve_weight, ridge, positions, tuple(frames), subtract_bias, layer,
        projection, solver,
    )  # fmt: skip
    return joined(model, {part: _edit(request, part) for part in edited_parts(model, encoder)})


@dataclass(frozen=True)
class _Request:
    """Arguments of `quickfix`, checked."""

    model: TextToImage
    pairs: Mapping[str, str]
    preserve: tuple[str, ...]
    preserve_weight: PreserveWeight
    ridge: float
    positions: Positions
    frames: tuple[str, ...]
    subtract_bias: bool
    layer: int
    projection: Projection
    solver: Method


def _edit(request: _Request, encoder: str) -> Change:
    """Return the change of one text encoder."""
    model, pairs, preserve = request.model, request.pairs, request.preserve
    clock = _Clock()
    layer = request.layer
    site = f"{encoder}.{layer}.self_attn.{request.projection}_proj"
    weight = _finite_weight(model, encoder, layer, site)
    planned = align_captions(model, pairs, request.frames, request.positions, encoder=encoder)
    ids = torch.cat([torch.stack([p.old.ids, p.new.ids]) for p in planned])
    others = model.tokenize(["", *preserve], encoder=weight.encoder or 0)
    _check_preserve(planned, preserve, others[1:])
    features, rows = read_layer(model, site, torch.cat([ids, others]))
    key_rows, source_rows = aligned_rows(planned, rows, ids.shape[1])
    targets = _targets(weight, features, key_rows, source_rows, bias=not request.subtract_bias)
    empty = features[rows[len(ids)]]
    preserved = features[rows[len(ids) + 1 :]].flatten(0, 1)
    clock.record("keys")
    _check_targets(planned, targets)
    clock.record("values")
    owners = _owners(pairs, planned)
    if request.preserve_weight == EXACT:
        gram, keys = None, outside(targets.keys, span(preserved))
        check_room(targets.keys, keys, owners, list(pairs))
    else:
        gram, keys = preserve_gram(preserved, request.preserve_weight), targets.keys
    factors = factorise(keys, ridge=request.ridge, gram=gram, method=request.solver)
    fit = _fit(targets, factors) if keys is targets.keys else _fit_rows(targets, factors)
    movement = Movement.from_solution(
        site, weight.parameter, fit.solution, keys, fit.residual_data, owners, gram
    )
    clock.record("solve")
    report = _report(movement, fit, preserved=preserved, empty=empty, weight=targets.weight)
    report |= {
        "concept_movement": _concept_movement(targets, movement, owners, list(pairs)),
        "condition_number": fit.solution.condition_number,
        "effective_rank": fit.solution.effective_rank,
    }
    remark = unread_layer(model, encoder, layer, len(text_layers(model, encoder)))
    report |= notes(model, [*pairs, *pairs.values()], remark)
    settings = {
        "preserve": list(preserve), "preserve_weight": request.preserve_weight, "ridge": request.ridge,
        "positions": request.positions, "frames": list(request.frames), "subtract_bias": request.subtract_bias,
        "encoder": encoder, "layer": layer, "projection": request.projection, "solver": request.solver,
    }  # fmt: skip
    clock.record("report")
    head = protocol("quickfix", model, pairs)
    return Change((movement,), head | settings, report | {"seconds": clock.seconds})


def preserve_gram(keys: Tensor, preserve_weight: PreserveWeight) -> Tensor | None:
    r"""Return :math:`a P^\top P` of preserved keys, float64, (D_in, D_in); `None` without keys or at weight 0.

    Args:
        keys: :math:`P`, shape (M, D_in).
        preserve_weight: :math:`a`.

    Raises:
        ValueError: The weight is negative or not finite.
    """
    if isinstance(preserve_weight, str) or not (
        math.isfinite(preserve_weight) and preserve_weight >= 0
    ):
        raise ValueError(
            f"`preserve_weight` must be 0 or more and finite, got {preserve_weight!r}. 0.1 is the usual choice."
        )
    if not len(keys) or preserve_weight == 0:
        return None
    return product(keys) * preserve_weight


@dataclass(frozen=True, eq=False)
class _Fit:
    """Solution for one weight, and the norms of its residuals before and after, and of the targets."""

    solution: Solution
    residual_data: Tensor | Targets
    before: float
    after: float
    target: float


def _targets(
    weight: Weight, features: Tensor, key_rows: Tensor, source_rows: Tensor, *, bias: bool
) -> Targets:
    """Return keys and targets: the rows `key_rows` and `source_rows` of `features`, token after token."""
    exact = weight.parameter.detach().to("cpu", torch.float64)
    added = weight.bias if bias else None
    added = torch.zeros(len(exact)) if added is None else added.detach().cpu()
    flat = features.flatten(0, 1)
    return Targets(flat.index_select(0, key_rows), flat, source_rows, exact, added.double())


def _fit(targets: Targets, factors: Factors) -> _Fit:
    """Return the movement by the factors of the keys."""
    if factors.gram is None:
        return _fit_rows(targets, factors)
    return _fit_sums(targets, factors.gram, factors)


def _fit_rows(targets: Targets, factors: Factors) -> _Fit:
    residuals = targets.residuals()
    solution = factors.solve(residuals)
    after = residuals - targets.keys.double() @ solution.right.T @ solution.left.T
    every_target = targets.at(torch.arange(len(targets.keys)))
    return _Fit(solution, residuals, _norm(residuals), _norm(after), _norm(every_target))


def _fit_sums(targets: Targets, gram: Tensor, factors: Factors) -> _Fit:
    """Solve from sums over the keys, which also give all norms; residuals are computed only when they are read."""
    distinct, group = torch.unique(targets.rows, return_inverse=True)
    counts = torch.bincount(group)
    sources, weight, bias = targets.inputs[distinct].double(), targets.weight, targets.bias
    sums = _sums(targets.keys, group)
    mixed = sources.T @ sums  # S^T K
    shifted = mixed - gram  # (S - K)^T K
    if float(shifted.norm()) <= 1e-13 * float(gram.norm()):
        shifted.zero_()  # old and new inputs are equal, so this is the rounding error of the sums
    cross = weight @ shifted + torch.outer(bias, sums.sum(0))  # R^T K
    solution = factors.solve_sums(cross)
    delta = solution.delta
    shift = counts.double() @ sources - sums.sum(0)
    moved = product(sources * counts.sqrt()[:, None]) - mixed - mixed.T + gram
    before = _quadratic(weight, moved) + float(2 * bias @ weight @ shift + len(group) * bias @ bias)
    after = before - 2 * float((cross * delta).sum()) + _quadratic(delta, gram)
    target = before + 2 * float((cross * weight).sum()) + _quadratic(weight, gram)
    norms = (max(square, 0.0) ** 0.5 for square in (before, after, target))
    return _Fit(solution, targets, *norms)


def _sums(rows: Tensor, group: Tensor) -> Tensor:
    """Return the sum of the rows of each group, float64."""
    order = group.argsort(stable=True)
    sizes = torch.bincount(group)
    total = torch.zeros(len(sizes), rows.shape[1], dtype=torch.float64)
    for first in range(0, len(rows), _ROWS):
        chosen = order[first : first + _ROWS]
        groups, counts = torch.unique_consecutive(group[chosen], return_counts=True)
        part = rows.index_select(0, chosen).double()
        total[groups] += embedding_bag(
            torch.arange(len(chosen)), part, counts.cumsum(0) - counts, mode="sum"
        )
    return total


def _quadratic(rows: Tensor, gram: Tensor) -> float:
    """Return the trace of `rows @ gram @ rows.T`."""
    return float((rows @ gram * rows).sum())


class _Clock:
    """Measures the seconds of each stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def record(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] = round(now - self._last, 6)
        self._last = now


def _finite_weight(model: TextToImage, encoder: str, layer: int, site: str) -> Weight:
    layers = len(text_layers(model, encoder))
    if not 0 <= layer < layers:
        raise UnknownSite(
            f"`layer` must be 0 to {layers - 1} in {encoder!r}, got {layer}. Name one of those."
        )
    weight = find_weight(model, site)
    if not bool(torch.isfinite(weight.parameter).all()):
        raise ValueError(f"the weight at {site} holds NaN or infinity: load an undamaged model.")
    return weight


def _owners(pairs: Mapping[str, str], planned: Sequence[Pair]) -> list[int]:
    """Return, for each key, the index of its concept among the pairs."""
    indices = {old: i for i, old in enumerate(pairs)}
    return [indices[p.names[0]] for p in planned for _ in p.positions]


def _report(
    movement: Movement, fit: _Fit, *, preserved: Tensor, empty: Tensor, weight: Tensor
) -> dict[str, Any]:
    """Return residuals at the keys, and the drift of preserved prompts and of the empty prompt."""
    delta = movement.delta
    return {
        "keys": len(movement.keys),
        "preserved_keys": len(preserved),
        "rank": movement.left.shape[1],
        "delta_norm": weight_drift(delta),
        "relative_delta_norm": weight_drift(delta, relative_to=weight),
        "residual_before": fit.before / fit.target,
        "residual_after": fit.after / fit.target,
        "preserve_drift": weight_drift(delta, inputs=preserved.double(), relative_to=weight),
        "empty_prompt_drift": weight_drift(delta, inputs=empty.double(), relative_to=weight),
    }


def _concept_movement(
    targets: Targets, movement: Movement, owners: Sequence[int], concepts: Sequence[str]
) -> dict[str, float]:
    """Return the `concept_movement` of a report, measured at evenly spaced keys of each concept."""
    index = torch.tensor(owners)
    rows = [(index == i).nonzero().flatten() for i in range(len(concepts))]
    places = torch.cat([part[:: -(-len(part) // _MEASURED)] for part in rows])
    keys = targets.keys[places].double()
    shift = targets.inputs[targets.rows[places]].double() - keys
    requested = shift @ targets.weight.T + targets.bias
    moved = keys @ movement.delta.T
    moved, requested = (part.square().sum(1) for part in (moved, requested))
    return concept_movement(moved, requested, index[places].tolist(), concepts)


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.norm(tensor))


def _check_texts(pairs: Mapping[str, str], preserve: Sequence[str], frames: Sequence[str]) -> None:
    check_pairs(pairs)
    check_texts(preserve, "preserve")
    check_frames(frames)
    double = [frame for frame in frames if frame.count("{}") > 1]
    if double:
        raise ValueError(f"the frame {double[0]!r} holds the concept twice: leave one '{{}}'.")


def _check_choices(positions: str, projection: str) -> None:
    if positions not in POSITIONS:
        raise ValueError(
            f"`positions` must be one of {', '.join(map(repr, POSITIONS))}, got {positions!r}."
        )
    if projection not in PROJECTIONS:
        raise ValueError(
            f"`projection` must be one of {', '.join(map(repr, PROJECTIONS))}, got {projection!r}."
        )


def _check_preserve(planned: Sequence[Pair], preserve: Sequence[str], ids: Tensor) -> None:
    """Raise if a preserved prompt begins like an edited caption, up to the concept's last token.

    In a causal encoder both have the same key there.
    """
    for pair in planned:
        begins = (ids[:, : pair.old.last + 1] == pair.old.ids[: pair.old.last + 1]).all(1)
        if bool(begins.any()):
            prompt = preserve[int(begins.nonzero()[0, 0])]
            raise ValueError(
                f"the preserved prompt {prompt!r} begins with {pair.old.text!r}, which is edited: take it off the "
                "`preserve` list."
            )


def _check_targets(planned: Sequence[Pair], targets: Targets) -> None:
    rows = contradiction(targets.keys, targets.at)
    if rows is None:
        return
    owners = [(pair, place) for pair in planned for place, _ in pair.positions]
    (first, place), (second, _) = owners[rows[0]], owners[rows[1]]
    raise ValueError(
        f"contradictory pairs: {first.names[0]!r} → {first.names[1]!r} and {second.names[0]!r} → {second.names[1]!r} "
        f"give one key (token {place} of {first.old.text!r}) two targets. Keep one of them, or edit fewer `positions`."
    )
