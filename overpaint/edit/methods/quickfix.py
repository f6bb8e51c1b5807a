r"""Diff-QuickFix: a closed-form edit of one projection in the text encoder's self-attention.

The layer's inputs at the old concept are the keys :math:`k`, what it makes of the new concept are the targets
:math:`v = W h_{new}`; the weight then moves by the ridge solution of `solve`.

Source: Basu et al., 2024, https://arxiv.org/abs/2310.13730, equations 8 and 9.
Deviations: targets come from the layer's inputs in float64, so the bias is never met (the release fits the weight to
outputs that include it; `subtract_bias=False` does the same). The forward stops where the keys are known, all captions
in one batch. `preserve` is ours, in UCE's form; the paper has none.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from overpaint.edit.captions import (
    POSITIONS,
    Pair,
    Positions,
    check_pairs,
    places,
    plan,
    read_layer,
)
from overpaint.edit.change import Change
from overpaint.edit.least_squares import (
    Factors,
    Method,
    Solution,
    contradiction,
    factorise,
    product,
)
from overpaint.edit.movement import Movement, Targets
from overpaint.edit.weights import PROJECTIONS, Weight, find_weight, text_layers
from overpaint.errors import UnknownSite
from overpaint.model import TextToImage

__all__ = ["FRAMES", "preserve_gram", "quickfix"]

Projection = Literal["q", "k", "v", "out"]
_ROWS = 4096  # of keys at a time
FRAMES = ("", "a photo of ", "an image of ", "a picture of ")


def quickfix(
    model: TextToImage,
    pairs: Mapping[str, str],
    *,
    preserve: Sequence[str] = (),
    preserve_weight: float = 0.1,
    ridge: float = 0.01,
    positions: Positions = "from_subject_to_end",
    frames: Sequence[str] = FRAMES,
    subtract_bias: bool = True,
    layer: int = 0,
    projection: Projection = "out",
    encoder: Literal["text", "text2"] = "text",
    solver: Method = "auto",
) -> Change:
    """Change that makes the text encoder read each old concept as its new one; the model is not touched.

    Args:
        model: Its text encoder must be a CLIP.
        pairs: Old concept to new, as `{"van gogh": "painting"}`; several are solved jointly.
        preserve: Whole prompts that should be read as before, at every position from begin-of-text to the last pad:
            SD-1.x reads pads too, and begin-of-text, the same in every prompt, must not move. `""` is allowed and
            stands for guidance.
        preserve_weight: What one preserved key counts against one edited key; 0 is the paper's edit.
        ridge: Pull towards the old weight, in units of a key's squared norm. Positive.
        positions: Which tokens become keys: from the concept's last token to the end of the padding (the release),
            the last token alone (the paper's text), it and the end of text, all tokens of the concept (`"subject"`),
            or these and everything after (`"subject_to_end"`). Keys and values are aligned by their distance from the
            concept's last token; where one runs over the new concept's first token or the last pad, that value is
            repeated.
        frames: Captions around the concept: put before it, or filled in where they hold `{}`.
        subtract_bias: `False` reproduces the release, whose targets include the bias.
        layer: Text layer, from 0.
        projection: Which matrix of its self-attention; `q`, `k`, `v` are solved on the layer's own inputs.
        encoder: `"text2"` is the second text encoder of SDXL; an edit of one leaves the other alone.
        solver: `"dual"`, `"primal"` as in the paper, or `"auto"`, the one that solves the smaller system.

    Returns:
        The change of one weight, not rounded, with condition number, effective rank and residuals in its report.

    Raises:
        ValueError: A concept is empty, cut off or its own target, two targets claim one key, a number is out of range
            or not finite.
        TypeError: A list of texts is one text.
        UnknownSite: The model has no such layer or encoder.
        UnsupportedModel: The text encoder's attention does not run through the projection, or its weight is not a plain
            matrix in memory.
    """
    _check_texts(pairs, preserve, frames)
    _check_choices(positions, projection)
    clock = _Clock()
    site = f"{encoder}.{layer}.self_attn.{projection}_proj"
    weight = _weight(model, encoder, layer, site)
    planned = plan(model, pairs, frames, positions, encoder=encoder)
    ids = torch.cat([torch.stack([p.old.ids, p.new.ids]) for p in planned])
    others = model.tokenize(["", *preserve], encoder=weight.encoder or 0)
    _check_preserve(planned, preserve, others[1:])
    features, rows = read_layer(model, site, torch.cat([ids, others]))
    key_rows, source_rows = places(planned, rows, ids.shape[1])
    targets = _targets(weight, features, key_rows, source_rows, bias=not subtract_bias)
    empty, kept = features[rows[len(ids)]], features[rows[len(ids) + 1 :]].flatten(0, 1)
    clock.tick("keys")
    _check_targets(planned, targets)
    clock.tick("values")
    gram = preserve_gram(kept, preserve_weight)
    factors = factorise(targets.keys, ridge=ridge, gram=gram, method=solver)
    fit = _fit(targets, factors)
    movement = Movement.from_solution(
        site, weight.parameter, fit.solution, targets.keys, fit.residual_data, _owners(pairs, planned), gram
    )  # fmt: skip
    clock.tick("solve")
    report = _report(movement, fit, kept=kept, empty=empty, weight=targets.weight)
    report |= {
        "condition_number": fit.solution.condition_number,
        "effective_rank": fit.solution.effective_rank,
    }
    protocol = {
        "method": "quickfix", "model": model.name, "pairs": dict(pairs), "preserve": list(preserve),
        "preserve_weight": preserve_weight, "ridge": ridge, "positions": positions, "frames": list(frames),
        "subtract_bias": subtract_bias, "encoder": encoder, "layer": layer, "projection": projection, "solver": solver,
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }  # fmt: skip
    clock.tick("report")
    return Change((movement,), protocol, report | {"seconds": clock.seconds})


def preserve_gram(kept: Tensor, preserve_weight: float) -> Tensor | None:
    r"""Return :math:`a P^\top P` of the preserved keys, float64, (D_in, D_in); `None` where there is nothing to keep.

    Args:
        kept: :math:`P`, shape (M, D_in).
        preserve_weight: :math:`a`.

    Raises:
        ValueError: The weight is negative or not finite.
    """
    if not (math.isfinite(preserve_weight) and preserve_weight >= 0):
        raise ValueError(
            f"`preserve_weight` must be 0 or more and finite, got {preserve_weight!r}. 0.1 is the usual choice."
        )
    if not len(kept) or preserve_weight == 0:
        return None
    return product(kept) * preserve_weight


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
    """Solve by sums over the keys, which give all norms too; the residuals are computed only when they are read."""
    distinct, group = torch.unique(targets.rows, return_inverse=True)
    counts = torch.bincount(group)
    sources, weight, bias = targets.inputs[distinct].double(), targets.weight, targets.bias
    sums = _sums(targets.keys, group)
    mixed = sources.T @ sums  # S^T K
    shifted = mixed - gram  # (S - K)^T K
    if float(shifted.norm()) <= 1e-13 * float(gram.norm()):
        shifted.zero_()  # old and new inputs are equal, this is the rounding error of the sums
    cross = weight @ shifted + torch.outer(bias, sums.sum(0))  # R^T K
    solution = factors.solve_sums(cross)
    delta = solution.delta
    shift = counts.double() @ sources - sums.sum(0)
    moved = product(sources * counts.sqrt()[:, None]) - mixed - mixed.T + gram
    before = _within(weight, moved) + float(2 * bias @ weight @ shift + len(group) * bias @ bias)
    after = before - 2 * float((cross * delta).sum()) + _within(delta, gram)
    target = before + 2 * float((cross * weight).sum()) + _within(weight, gram)
    norms = (max(square, 0.0) ** 0.5 for square in (before, after, target))
    return _Fit(solution, targets, *norms)


def _sums(rows: Tensor, group: Tensor) -> Tensor:
    """Return the sum of the rows of each group, in double."""
    order = group.argsort(stable=True)
    sizes = torch.bincount(group)
    total = torch.zeros(len(sizes), rows.shape[1], dtype=torch.float64)
    for first in range(0, len(rows), _ROWS):
        chosen = order[first : first + _ROWS]
        own, counts = torch.unique_consecutive(group[chosen], return_counts=True)
        part = rows.index_select(0, chosen).double()
        total[own] += embedding_bag(
            torch.arange(len(chosen)), part, counts.cumsum(0) - counts, mode="sum"
        )
    return total


def _within(rows: Tensor, gram: Tensor) -> float:
    return float((rows @ gram * rows).sum())


class _Clock:
    """Seconds of each stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def tick(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] = round(now - self._last, 6)
        self._last = now


def _weight(model: TextToImage, encoder: str, layer: int, site: str) -> Weight:
    layers = len(text_layers(model, encoder))
    if not 0 <= layer < layers:
        raise UnknownSite(f"`layer` must be 0 to {layers - 1}, got {layer}. Name one of those.")
    weight = find_weight(model, site)
    if not bool(torch.isfinite(weight.parameter).all()):
        raise ValueError(f"the weight at {site} holds NaN or infinity: load an undamaged model.")
    return weight


def _owners(pairs: Mapping[str, str], planned: Sequence[Pair]) -> list[int]:
    places = {old: i for i, old in enumerate(pairs)}
    return [places[p.names[0]] for p in planned for _ in p.positions]


def _report(
    movement: Movement, fit: _Fit, *, kept: Tensor, empty: Tensor, weight: Tensor
) -> dict[str, Any]:
    """Return how well the movement does what was asked, and what it does besides."""
    delta = movement.delta
    return {
        "keys": len(movement.keys),
        "preserved_keys": len(kept),
        "rank": movement.left.shape[1],
        "delta_norm": _norm(delta),
        "relative_delta_norm": _norm(delta) / _norm(weight),
        "residual_before": fit.before / fit.target,
        "residual_after": fit.after / fit.target,
        "preserve_drift": _drift(kept, delta, weight) if len(kept) else 0.0,
        "empty_prompt_drift": _drift(empty, delta, weight),
    }


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.norm(tensor))


def _drift(inputs: Tensor, delta: Tensor, weight: Tensor) -> float:
    """Return how far the layer's outputs at `inputs` (M, D_in) move, relative to their norm without bias."""
    exact = inputs.double()
    return float((exact @ delta.T).norm() / (exact @ weight.T).norm())


def _check_texts(pairs: Mapping[str, str], preserve: Sequence[str], frames: Sequence[str]) -> None:
    if isinstance(preserve, str) or isinstance(frames, str):
        raise TypeError(
            "`preserve` and `frames` are lists of texts: write ['...'] around a single one."
        )
    check_pairs(pairs)
    if not frames:
        raise ValueError("`frames` is empty: give at least one caption; '' is the bare concept.")
    many = [frame for frame in frames if frame.count("{}") > 1]
    if many:
        raise ValueError(f"the frame {many[0]!r} holds the concept twice: leave one '{{}}'.")


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
    """Refuse a preserved prompt that begins as an edited caption does, up to the concept's last token.

    A causal encoder gives both the same key there.
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
