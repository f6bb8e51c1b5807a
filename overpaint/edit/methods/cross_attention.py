r"""The key and value projections of the UNet's cross-attention, solved all at once: what UCE, TIME and LocoEdit share.

Every layer reads the same text features and none of the projections has a bias. So an edit is said in features alone:
of the keys :math:`K` make what is made of the sources :math:`S` today. The targets of a weight :math:`W` are
:math:`S W^\top`, its residuals :math:`(S - K) W^\top`, and one factorisation of :math:`K` serves all 32 weights.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal

import torch
from torch import Tensor

from overpaint.edit.captions import captions, layer_inputs
from overpaint.edit.change import Change, Movement
from overpaint.edit.least_squares import Factors, Solution, contradiction, factorise
from overpaint.edit.methods.quickfix import preserve_gram
from overpaint.edit.weights import encoder_index, weights_at
from overpaint.errors import UnknownSite, UnsupportedModel
from overpaint.model import TextToImage, text_features
from overpaint.model.sites import Site, find_unet
from overpaint.model.token_spans import end_of_text

__all__ = [
    "Layer",
    "Projection",
    "Wanted",
    "preserved_keys",
    "projections",
    "read",
    "rewrite",
    "spot",
    "spots",
]

_READ_WHOLE = ("quickfix", "random_site")
_READ_LAST = ("uce", "debias")

Layer = int | str | Site
Projection = Literal["k", "v"]
_BATCH = 64


@dataclass(frozen=True, eq=False)
class Wanted:
    """An edit in text features.

    Attributes:
        keys: What will be read, shape (N, D), float32.
        sources: What it should be read as, shape (N, D), float32.
        owners: Of each key, its concept: the place among the pairs.
        labels: Of each key, the caption and pair to name where something is wrong with it.
        preserved: What should be read as before, shape (M, D), float32.
        kept: The prompt of each preserved key.
        empty: Features of the empty prompt, shape (L, D), to measure how far it drifts.
        started: `time.perf_counter()` before the first caption was read.
    """

    keys: Tensor
    sources: Tensor
    owners: tuple[int, ...]
    labels: tuple[str, ...]
    preserved: Tensor
    kept: tuple[str, ...]
    empty: Tensor
    started: float


def projections(
    model: TextToImage, layers: Sequence[Layer] | None, matrices: Sequence[Projection]
) -> list[str]:
    """Return the names of the weights: keys and values of `layers`, in execution order.

    Args:
        model: Its UNet is walked.
        layers: Numbers of cross-attention layers, their names, or the sites that `trace.pick_window` returned; all of
            them if `None`.
        matrices: `"k"`, `"v"` or both.

    Raises:
        UnknownSite: A layer that the UNet does not have.
        ValueError: No layer, or another matrix.
    """
    count = sum(site.kind == "cross_attn" for site in find_unet(model.unet))
    chosen = range(count) if layers is None else sorted({_index(layer) for layer in layers})
    wrong = [index for index in chosen if not 0 <= index < count]
    if wrong:
        raise UnknownSite(
            f"unknown layer {wrong[0]}: this model has unet.cross_attn 0 to {count - 1}. Name one of those."
        )
    unknown = [name for name in matrices if name not in ("k", "v")]
    if unknown or not matrices or not chosen:
        told = f"got {unknown[0]!r}" if unknown else "got none"
        raise ValueError(
            f"an edit of cross-attention moves 'k', 'v' or both, in at least one layer, {told}: leave the argument out "
            "for the usual ones."
        )
    return [f"unet.cross_attn.{i}.to_{name}" for i in chosen for name in ("k", "v") if name in matrices]  # fmt: skip


def spot(model: TextToImage, concept: str, frame: str = "") -> tuple[str, int]:
    """Return `concept` in `frame` and its last token; for no concept the last token of the frame, or begin-of-text.

    Raises:
        ValueError: The token limit cuts the concept off.
    """
    return spots(model, [(concept, frame)])[0]


def spots(model: TextToImage, asked: Sequence[tuple[str, str]]) -> list[tuple[str, int]]:
    """Return `spot` of each concept and frame, tokenised in one call.

    Raises:
        ValueError: As `spot`.
    """
    placed = iter(captions(model, [(c, frame) for c, frame in asked if c.strip()]))
    found: list[tuple[str, int]] = []
    for concept, frame in asked:
        if concept.strip():
            one = next(placed)
            found.append((one.text, one.last))
        else:
            text = frame.replace("{}", "").strip()
            ids = model.tokenize([text])[0]
            found.append((text, end_of_text(model.tokenizer, ids) - 1))
    return found


@torch.no_grad()
def read(
    model: TextToImage, texts: Sequence[str], *, length: int | None = None
) -> dict[str, Tensor]:
    """Return what cross-attention reads of each text, float32 on the CPU, shape (L, D) each.

    Args:
        model: Its text encoders are causal, so that a token's features do not depend on those after it.
        texts: Read in batches, equal ones once.
        length: Leave out the tokens from here on, which saves most of the time where only short captions count.
    """
    distinct = list(dict.fromkeys(texts))
    ids = [model.tokenize(distinct, encoder=i)[:, :length] for i in range(len(model.text_encoders))]
    parts: list[Tensor] = []
    for start in range(0, len(distinct), _BATCH):
        rows = [part[start : start + _BATCH].to(model.device) for part in ids]
        parts.append(text_features(model.text_encoders, rows).cpu().float())
    features = torch.cat(parts)
    if len(ids) == 2:
        features = features[:, :-1]  # the last row is pooled, and no layer reads it
        if "" in distinct and model.pipe.config.get("force_zeros_for_empty_prompt", True):
            features[distinct.index("")] = 0
    return dict(zip(distinct, features, strict=True))


def rewrite(
    model: TextToImage,
    sites: Sequence[str],
    wanted: Wanted,
    *,
    ridge: float,
    preserve_weight: float = 0.0,
    protocol: Mapping[str, Any],
) -> Change:
    """Return the change of all `sites` that does what is `wanted`; the model is not touched.

    Args:
        model: Whose weights are to move.
        sites: From `projections`.
        wanted: Keys and sources.
        ridge: Pull towards the old weights, in units of a key's squared norm. Positive.
        preserve_weight: What one preserved key counts against one edited key.
        protocol: The method and its arguments; model, ridge and versions are added.

    Raises:
        ValueError: Two pairs contradict one another, a preserved prompt is edited, or a weight is not finite.
        UnsupportedModel: The projections do not read the text features, or are not plain matrices in memory.
    """
    _check_contradictions(wanted)
    parameters = weights_at(model, sites)
    gram = preserve_gram(wanted.preserved, preserve_weight)
    begun = time.perf_counter()
    factors = factorise(wanted.keys, ridge=ridge, gram=gram, method="auto")
    shift = wanted.sources.double() - wanted.keys.double()
    read_by = (wanted.keys, wanted.preserved, wanted.empty)
    turned = [rows.double() @ factors.right.T for rows in read_by]  # all weights share these
    movements: list[Movement] = []
    squares: list[dict[str, float]] = []
    for site, parameter in zip(sites, parameters, strict=True):
        weight = parameter.detach().to("cpu", torch.float64)
        _check_weight(site, weight, wanted.keys.shape[1])
        residuals = shift @ weight.T
        solution = factors.solve(residuals)
        movements.append(
            Movement.of(site, parameter, solution, wanted.keys, residuals, wanted.owners, gram)
        )
        squares.append(_squares(solution, residuals, turned, wanted, parameter))
    done = time.perf_counter()
    report = {
        "seconds": {
            "keys": round(begun - wanted.started, 6),
            "solve": round(done - begun, 6),
        },
        **_report(factors, wanted, movements, squares),
    }
    full = {
        **protocol,
        "model": model.name,
        "ridge": ridge,
        "sites": list(sites),
        "versions": {name: version(name) for name in ("torch", "transformers", "diffusers")},
    }
    return Change(tuple(movements), full, report)


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


def _check_contradictions(wanted: Wanted) -> None:
    found = contradiction(
        torch.cat([wanted.keys, wanted.preserved]), torch.cat([wanted.sources, wanted.preserved])
    )
    if found is None:
        return
    first, second = found
    if second >= len(wanted.keys):
        prompt = wanted.kept[second - len(wanted.keys)]
        raise ValueError(
            f"the preserved prompt {prompt!r} is read as {wanted.labels[first]} is, which is edited: take it off the "
            "`preserve` list."
        )
    raise ValueError(
        f"contradictory pairs: {wanted.labels[first]} and {wanted.labels[second]} give one key two targets. Keep one "
        "of them."
    )


def _check_weight(site: str, weight: Tensor, width: int) -> None:
    if weight.shape[1] != width:
        raise UnsupportedModel(
            f"{site} reads {weight.shape[1]} numbers a token, the text features have {width}: this UNet changes them "
            "on the way, so there is nothing to solve. Use a plain Stable Diffusion pipeline."
        )
    if not bool(torch.isfinite(weight).all()):
        raise ValueError(f"the weight at {site} holds NaN or infinity: load an undamaged model.")


def _squares(
    solution: Solution,
    residuals: Tensor,
    turned: Sequence[Tensor],
    wanted: Wanted,
    parameter: Tensor,
) -> dict[str, float]:
    """Return squared norms that add up over weights.

    `turned` holds keys, preserved keys and the empty prompt times the right factor that all weights share.
    """
    square = lambda t: float(t.norm()) ** 2  # noqa: E731
    left, weight = solution.left, parameter.detach().cpu().float()
    moved = [rows @ left.T for rows in turned]
    return {
        "delta": square(left),  # the rows of the right factor are orthonormal
        "weight": square(weight),
        "before": square(residuals),
        "after": square(residuals - moved[0]),
        "target": square(wanted.sources @ weight.T),
        "kept": square(moved[1]),
        "read": square(wanted.preserved @ weight.T),
        "empty": square(moved[2]),
        "spoken": square(wanted.empty @ weight.T),
    }


def _report(
    factors: Factors,
    wanted: Wanted,
    movements: Sequence[Movement],
    squares: Sequence[Mapping[str, float]],
) -> dict[str, Any]:
    sums = {name: sum(square[name] for square in squares) for name in squares[0]}

    def ratio(part: str, whole: str) -> float:
        return (sums[part] / sums[whole]) ** 0.5 if sums[whole] > 0 else 0.0

    return {
        "weights": len(movements),
        "keys": len(wanted.keys),
        "preserved_keys": len(wanted.preserved),
        "condition_number": factors.condition_number,
        "effective_rank": factors.effective_rank,
        "rank": max(m.left.shape[1] for m in movements),
        "delta_norm": max(sums["delta"], 0.0) ** 0.5,
        "relative_delta_norm": ratio("delta", "weight"),
        "residual_before": ratio("before", "target"),
        "residual_after": ratio("after", "target"),
        "preserve_drift": ratio("kept", "read"),
        "empty_prompt_drift": ratio("empty", "spoken"),
    }


def preserved_keys(model: TextToImage, method: Any, site: str, prompts: Sequence[str]) -> Tensor:
    """Return the keys (M, D_in) that a change by `method` preserves of `prompts` at a weight.

    Raises:
        ValueError: They cannot be read again.
    """
    if method in _READ_WHOLE:
        ids = model.tokenize(prompts, encoder=encoder_index(model, site.partition(".")[0]))
        return layer_inputs(model, site, ids).flatten(0, 1)
    if method in _READ_LAST:
        places = spots(model, [(prompt, "") for prompt in prompts])
        features = read(model, [text for text, _ in places])
        return torch.stack([features[text][place] for text, place in places])
    raise ValueError(
        f"the preserve terms of a change made by {method!r} cannot be read again: save it with `gram=True`, or make "
        "one change of all concepts."
    )
