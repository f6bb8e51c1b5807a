r"""Diff-QuickFix: a closed-form edit of one projection in the text encoder's self-attention.

The layer's inputs at the old concept are the keys :math:`k`, what it makes of the new concept are the targets
:math:`v = W h_{new}`; the weight then moves by the ridge solution of `solve`.

Source: Basu et al., 2024, https://arxiv.org/abs/2310.13730, equations 8 and 9.
Deviations: targets come from the layer's inputs in float64, so the bias is never met (the release fits the weight to
outputs that include it; `subtract_bias=False` does the same). The forward stops where the keys are known, all captions
in one batch. `preserve` is ours, in UCE's form; the paper has none.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any, Literal

import torch
from torch import Tensor

from overpaint.edit.change import PROJECTIONS, Change, fingerprint, text_layers, weight_at
from overpaint.edit.solve import Method, Solution, compress, contradiction, solve
from overpaint.errors import UnknownSite, UnsupportedModel
from overpaint.hooks import record_inputs
from overpaint.model import TextToImage
from overpaint.spans import end_of_text, span_at

__all__ = ["FRAMES", "quickfix", "stack"]

Positions = Literal["from_subject_to_end", "last_subject", "last_subject+eos"]
Projection = Literal["q", "k", "v", "out"]
FRAMES = ("", "a photo of ", "an image of ", "a picture of ")
_POSITIONS = ("from_subject_to_end", "last_subject", "last_subject+eos")


@dataclasses.dataclass(frozen=True)
class _Caption:
    """A concept in a frame: its padded ids, shape (L,), and where the concept and the text end."""

    text: str
    ids: Tensor
    last: int
    eos: int


@dataclasses.dataclass(frozen=True)
class _Pair:
    """One concept pair in one frame, and the positions of its keys and values."""

    names: tuple[str, str]
    old: _Caption
    new: _Caption
    positions: list[tuple[int, int]]


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
    solver: Method = "dual",
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
            the last token alone (the paper's text), or it and the end of text. Keys and values are aligned by their
            distance from the concept's last token; where the new prompt is longer its last value is repeated.
        frames: Captions around the concept: put before it, or filled in where they hold `{}`.
        subtract_bias: `False` reproduces the release, whose targets include the bias.
        layer: Text layer, from 0.
        projection: Which matrix of its self-attention; `q`, `k`, `v` are solved on the layer's own inputs.
        solver: `"dual"`, or `"primal"` as in the paper.

    Returns:
        The change of one weight, with condition number, effective rank and residuals in its report.

    Raises:
        ValueError: A concept is empty or cut off, two targets claim one key, a number is out of range or not finite.
        TypeError: A list of texts is one text.
        UnknownSite: The model has no such layer.
        UnsupportedModel: The text encoder's attention does not run through the projection.
    """
    _check_texts(pairs, preserve, frames)
    _check_choices(positions, projection)
    clock = _Clock()
    site = f"text.{layer}.self_attn.{projection}_proj"
    linear = _linear(model, layer, projection, site)
    plan = [
        _pair(model, old, new, frame, positions) for old, new in pairs.items() for frame in frames
    ]
    ids = torch.cat(
        [*(torch.stack([p.old.ids, p.new.ids]) for p in plan), model.tokenize(["", *preserve])]
    )
    _check_preserve(plan, preserve, ids[2 * len(plan) + 1 :])
    inputs = _inputs(
        model, linear, ids, site
    )  # (2 P + 1 + M, L, D_in), the empty prompt for its drift
    keys, sources = _gather(inputs, plan)
    kept = inputs[2 * len(plan) + 1 :].flatten(0, 1)
    clock.tick("keys")
    weight = linear.weight.detach().to("cpu", torch.float64)
    targets = sources.double() @ weight.T
    if not subtract_bias and linear.bias is not None:
        targets += linear.bias.detach().to("cpu", torch.float64)
    _check_targets(plan, keys, targets)
    clock.tick("values")
    solution = solve(
        keys,
        targets,
        weight=weight,
        ridge=ridge,
        preserve=kept,
        preserve_weight=preserve_weight,
        method=solver,
    )
    left, right = compress(solution.left, solution.right)
    clock.tick("solve")
    delta = left @ right
    report = _report(solution, delta, keys=keys, targets=targets, kept=kept, weight=weight)
    empty = inputs[2 * len(plan)]
    report |= {"rank": left.shape[1], "empty_prompt_drift": _drift(empty, delta, weight)}
    protocol = {
        "method": "quickfix", "model": model.name, "pairs": dict(pairs), "preserve": list(preserve),
        "preserve_weight": preserve_weight, "ridge": ridge, "positions": positions, "frames": list(frames),
        "subtract_bias": subtract_bias, "layer": layer, "projection": projection, "solver": solver,
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }  # fmt: skip
    base_hash = fingerprint(linear.weight)
    clock.tick("report")
    report |= {"seconds": clock.seconds}
    return Change(site, base_hash, left, right, keys, targets.float(), protocol, report)


def stack(model: TextToImage, changes: Sequence[Change]) -> Change:
    """One change of several: their pairs and preserved prompts, solved jointly. The order does not matter.

    Applying one change after another is another, worse solution: the second forgets what the first was fitted to.

    Args:
        model: The unedited model that all of them were made for.
        changes: Made by `quickfix` with the same settings, apart from pairs and preserved prompts.

    Raises:
        ValueError: Settings or base weights differ, one concept has two new ones, or there is nothing to stack.
    """
    if not changes:
        raise ValueError("nothing to stack: give at least one change.")
    settings = [_settings(change) for change in changes]
    if any(found != settings[0] for found in settings):
        names = sorted(k for k in settings[0] if any(s.get(k) != settings[0][k] for s in settings))
        raise ValueError(
            f"these changes differ in {', '.join(names)}: make them again with the same settings."
        )
    base = fingerprint(weight_at(model, changes[0].site))
    if any(change.base_hash != base for change in changes):
        raise ValueError(
            f"wrong base hash: {changes[0].site} of {model.name!r} is {base[:12]}, not the weight that these changes "
            "were made for. Revert what is applied, or stack them on the model they were made for."
        )
    pairs: dict[str, str] = {}
    for old, new in sorted(item for change in changes for item in change.pairs.items()):
        if pairs.setdefault(old, new) != new:
            raise ValueError(
                f"contradictory pairs: {old!r} → {pairs[old]!r} and {old!r} → {new!r}. Keep one of them."
            )
    preserve = sorted({prompt for change in changes for prompt in change.protocol["preserve"]})
    return quickfix(model, pairs, preserve=preserve, **settings[0])


def _settings(change: Change) -> dict[str, Any]:
    names = (
        "preserve_weight",
        "ridge",
        "positions",
        "frames",
        "subtract_bias",
        "layer",
        "projection",
        "solver",
    )
    if change.protocol.get("method") != "quickfix":
        raise ValueError(
            f"only changes made by `quickfix` can be stacked, this one is by {change.protocol.get('method')!r}: apply "
            "it on its own."
        )
    return {name: change.protocol[name] for name in names}


class _Clock:
    """Seconds of each stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def tick(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] = round(now - self._last, 6)
        self._last = now


def _linear(model: TextToImage, layer: int, projection: str, site: str) -> Any:
    if layer < 0:
        raise UnknownSite(f"`layer` must be 0 to {len(text_layers(model)) - 1}, got {layer}.")
    if not bool(torch.isfinite(weight_at(model, site)).all()):
        raise ValueError(f"the weight at {site} holds NaN or infinity: load an undamaged model.")
    return getattr(text_layers(model)[layer].self_attn, f"{projection}_proj")


def _pair(model: TextToImage, old: str, new: str, frame: str, positions: Positions) -> _Pair:
    first, second = _caption(model, old, frame), _caption(model, new, frame)
    if positions == "from_subject_to_end":
        end = len(first.ids) - 1
        places = [(p, min(p - first.last + second.last, end)) for p in range(first.last, end + 1)]
    elif positions == "last_subject":
        places = [(first.last, second.last)]
    else:
        places = [(first.last, second.last), (first.eos, second.eos)]
    return _Pair((old, new), first, second, places)


def _caption(model: TextToImage, concept: str, frame: str) -> _Caption:
    concept = concept.strip()
    before, _, after = frame.partition("{}")
    text = f"{before}{concept}{after}"
    span = span_at(model.tokenizer, text, len(before), len(before) + len(concept))
    ids = model.tokenize([text])[0]
    return _Caption(text, ids, span.last, end_of_text(model.tokenizer, ids))


def _inputs(model: TextToImage, linear: Any, ids: Tensor, site: str) -> Tensor:
    """Return what reaches `linear` for `ids` (B, L), on the CPU in float32, shape (B, L, D_in)."""
    distinct, rows = torch.unique(ids, dim=0, return_inverse=True)
    with torch.no_grad(), record_inputs(linear, stop=True) as inputs:
        model.text_encoder(distinct.to(linear.weight.device))
    if len(inputs) != 1 or inputs[0].shape[:2] != distinct.shape:
        raise UnsupportedModel(
            f"the text encoder did not call {site} once on the whole batch, so there is nothing to fit: use a plain "
            "`CLIPTextModel`, neither compiled nor fused."
        )
    return inputs[0].cpu()[rows]


def _gather(inputs: Tensor, plan: Sequence[_Pair]) -> tuple[Tensor, Tensor]:
    """Return the keys (N, D_in) and, aligned with them, the inputs that the values are made of."""
    keys = [inputs[2 * i, [key for key, _ in pair.positions]] for i, pair in enumerate(plan)]
    sources = [
        inputs[2 * i + 1, [value for _, value in pair.positions]] for i, pair in enumerate(plan)
    ]
    return torch.cat(keys), torch.cat(sources)


def _report(
    solution: Solution,
    delta: Tensor,
    *,
    keys: Tensor,
    targets: Tensor,
    kept: Tensor,
    weight: Tensor,
) -> dict[str, Any]:
    k = keys.double()
    residual = targets - k @ weight.T
    norm: Callable[[Tensor], float] = lambda t: float(torch.linalg.norm(t))  # noqa: E731
    return {
        "keys": len(keys),
        "preserved_keys": len(kept),
        "condition_number": solution.condition_number,
        "effective_rank": solution.effective_rank,
        "delta_norm": norm(delta),
        "relative_delta_norm": norm(delta) / norm(weight),
        "residual_before": norm(residual) / norm(targets),
        "residual_after": norm(residual - k @ delta.T) / norm(targets),
        "preserve_drift": _drift(kept, delta, weight) if len(kept) else 0.0,
    }


def _drift(inputs: Tensor, delta: Tensor, weight: Tensor) -> float:
    """Return how far the layer's outputs at `inputs` (M, D_in) move, relative to their norm without bias."""
    exact = inputs.double()
    return float((exact @ delta.T).norm() / (exact @ weight.T).norm())


def _check_texts(pairs: Mapping[str, str], preserve: Sequence[str], frames: Sequence[str]) -> None:
    if isinstance(preserve, str) or isinstance(frames, str):
        raise TypeError(
            "`preserve` and `frames` are lists of texts: write ['...'] around a single one."
        )
    if not pairs:
        raise ValueError(
            "`pairs` is empty: name at least one concept and its replacement, {'van gogh': 'painting'}."
        )
    if not frames:
        raise ValueError("`frames` is empty: give at least one caption; '' is the bare concept.")
    for old, new in pairs.items():
        for role, concept in (("old", old), ("new", new)):
            if not concept.strip():
                raise ValueError(
                    f"the {role} concept of the pair {old!r} → {new!r} is empty: name it in words."
                )
    many = [frame for frame in frames if frame.count("{}") > 1]
    if many:
        raise ValueError(f"the frame {many[0]!r} holds the concept twice: leave one '{{}}'.")


def _check_choices(positions: str, projection: str) -> None:
    if positions not in _POSITIONS:
        raise ValueError(
            f"`positions` must be one of {', '.join(map(repr, _POSITIONS))}, got {positions!r}."
        )
    if projection not in PROJECTIONS:
        raise ValueError(
            f"`projection` must be one of {', '.join(map(repr, PROJECTIONS))}, got {projection!r}."
        )


def _check_preserve(plan: Sequence[_Pair], preserve: Sequence[str], ids: Tensor) -> None:
    """Refuse a preserved prompt that begins as an edited caption does, up to the concept's last token.

    A causal encoder gives both the same key there.
    """
    for pair in plan:
        begins = (ids[:, : pair.old.last + 1] == pair.old.ids[: pair.old.last + 1]).all(1)
        if pair.names[0].split() != pair.names[1].split() and bool(begins.any()):
            prompt = preserve[int(begins.nonzero()[0, 0])]
            raise ValueError(
                f"the preserved prompt {prompt!r} begins with {pair.old.text!r}, which is edited: take it off the "
                "`preserve` list."
            )


def _check_targets(plan: Sequence[_Pair], keys: Tensor, targets: Tensor) -> None:
    found = contradiction(keys, targets)
    if found is None:
        return
    owners = [(pair, place) for pair in plan for place, _ in pair.positions]
    (first, place), (second, _) = owners[found[0]], owners[found[1]]
    raise ValueError(
        f"contradictory pairs: {first.names[0]!r} → {first.names[1]!r} and {second.names[0]!r} → {second.names[1]!r} "
        f"give one key (token {place} of {first.old.text!r}) two targets. Keep one of them, or edit fewer `positions`."
    )
