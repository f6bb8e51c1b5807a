r"""Second step of an edit: fit the layer's `mlp.fc2` to the residual that its `out_proj` cannot remove.

The `out_proj` of an attention reads mixtures of token states with D dimensions. A linear map with so few inputs cannot
separate all concepts. The second matrix of the MLP in the same layer, `mlp.fc2`, reads 4 D dimensions after a
nonlinearity. It is fitted while the first movement is applied. The fit has two aims for the output of the layer:

- for captions of an edited concept, it equals the unedited layer's output for the captions of the replacement;
- for all other captions, it equals the output before the edit.

One regularised least-squares problem has both aims. Let :math:`k` be the inputs of `fc2` under the first movement and
:math:`r` the residuals of the layer's output. The fit minimises
:math:`\sum w \|\Delta k - r\|^2 + \lambda \|\Delta\|_F^2`, where :math:`w` is the weight of the caption.

The inputs :math:`k` depend on the first movement, and therefore on all its concepts. For this reason two such changes
cannot be added; `edit.stack` computes them again for the pairs of both.

Source: ours; Meng et al., 2022 (ROME), https://arxiv.org/abs/2202.05262, section 3.1, treat the MLP of a transformer as
keys and values.
Deviations: none, the method is ours.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear

from overpaint.edit.captions import Pair, aligned_rows
from overpaint.edit.least_squares import product
from overpaint.edit.movement import Movement
from overpaint.edit.weights import encoder_index, find_weight, text_layers
from overpaint.errors import UnsupportedModel
from overpaint.model import TextToImage
from overpaint.model.hooks import record_inputs

__all__ = ["repair"]

_CHUNK = 128  # captions in one forward pass


class _Rows(NamedTuple):
    """Keys and residuals of a batch of captions.

    Attributes:
        keys: Inputs of `fc2` under the first movement, shape (N, D_in), float32.
        residuals: Residuals of the layer's output, shape (N, D_out), float32.
    """

    keys: Tensor
    residuals: Tensor


@dataclass(frozen=True, eq=False)
class _Layer:
    """The part of a text layer behind its attention, with and without a movement of `out_proj`."""

    model: TextToImage
    encoder: int
    block: Any
    delta: Tensor

    @classmethod
    def find(cls, model: TextToImage, part: str, layer: int, delta: Tensor) -> "_Layer":
        block = text_layers(model, part)[layer]
        parts = ("layer_norm2", "mlp.activation_fn", "mlp.fc1", "mlp.fc2")
        modules = dict(block.named_modules())
        if missing := [name for name in parts if name not in modules]:
            raise UnsupportedModel(
                f"{part} layer {layer} has no {missing[0]}, so its MLP cannot be edited: pass `repair=False`."
            )
        return cls(model, encoder_index(model, part), block, delta.float())

    def states(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the states behind the attention (B, L, D) for token ids (B, L), before and after the movement."""
        device = self.block.mlp.fc2.weight.device
        attention, norm = self.block.self_attn.out_proj, self.block.layer_norm2
        with (
            torch.no_grad(),
            record_inputs(norm, stop=True) as norm_inputs,
            record_inputs(attention) as projection_inputs,
        ):
            self.model.text_encoders[self.encoder](ids.to(device))
        if len(projection_inputs) != 1 or len(norm_inputs) != 1:
            raise UnsupportedModel(
                "the text encoder did not call `out_proj` and `layer_norm2` of the layer once each: use a plain "
                "`CLIPTextModel` that is not compiled and not fused."
            )
        old_state = norm_inputs[0].cpu()
        return old_state, old_state + projection_inputs[0].cpu() @ self.delta.T

    def hidden(self, state: Tensor) -> Tensor:
        """Return the input of `fc2` (..., 4 D) for a state behind the attention (..., D), in float32."""
        norm, mlp = self.block.layer_norm2, self.block.mlp
        scaled = layer_norm(state, norm.normalized_shape, *_weight_and_bias(norm), norm.eps)
        return mlp.activation_fn(linear(scaled, *_weight_and_bias(mlp.fc1)))

    def output(self, state: Tensor, hidden: Tensor) -> Tensor:
        """Return the output of the layer (..., D) for a state behind the attention and its `hidden`."""
        return state + linear(hidden, *_weight_and_bias(self.block.mlp.fc2))

    def moved(self, state: Tensor, hidden: Tensor) -> Tensor:
        """Return the movement of the output (..., D) that belongs to movements of the state and of `hidden`."""
        return state + linear(hidden, _weight_and_bias(self.block.mlp.fc2)[0])


def _weight_and_bias(module: Any) -> tuple[Tensor, Tensor]:
    return module.weight.detach().float().cpu(), module.bias.detach().float().cpu()


def repair(
    model: TextToImage,
    movement: Movement,
    *,
    layer: int,
    pairs: Sequence[Sequence[Pair]],
    preserve: Sequence[tuple[Sequence[str], float]],
    test_pairs: Sequence[Sequence[Pair]],
    test_captions: Sequence[str],
    ridge: float,
) -> tuple[Movement, dict[str, float]]:
    """Return the movement of `mlp.fc2` that completes a movement of the same layer's `out_proj`.

    The model is not modified.

    Args:
        model: The unedited model.
        movement: Movement of `<part>.<layer>.self_attn.out_proj`, where the part is `text` or `text2`.
        layer: Layer of that text encoder, from 0.
        pairs: For each concept, its captions, each with the caption of the replacement. Each concept has weight 1.
        preserve: Groups of captions whose output should not change, each with its weight.
        test_pairs: Other captions in the form of `pairs`. They are not fitted; the report measures on them.
        test_captions: Other captions whose output should not change. They are not fitted; the report measures on them.
        ridge: Pull towards the old weight, as in `auto`.

    Returns:
        The movement and a report. The movement has no keys, and its `gram` is the Gram matrix of the whole system. The
        report holds the missed target movement and the drift of `test_captions` at the output of the layer. Both are
        relative to the target movement, and given before and after this step.

    Raises:
        UnsupportedModel: The layer has no MLP with this layout, or the encoder is compiled or fused.
    """
    part = movement.site.partition(".")[0]
    block = _Layer.find(model, part, layer, movement.delta)
    site = f"{part}.{layer}.mlp.fc2"
    parameter = find_weight(model, site).parameter
    groups: list[tuple[Iterator[_Rows], float]] = [
        (
            (_pair_rows(block, after, new)[0] for _, after, new in _pair_states(block, group)),
            1 / len(group),
        )
        for group in pairs
    ]
    groups += [
        (_caption_rows(block, captions), weight / len(captions))
        for captions, weight in preserve
        if weight
    ]
    out, width = parameter.shape
    gram = torch.zeros(width, width, dtype=torch.float64)
    cross = torch.zeros(out, width, dtype=torch.float64)
    for batches, weight in groups:
        for rows in batches:
            gram += weight * product(rows.keys)
            cross += weight * product(rows.residuals, rows.keys)
    system = gram + ridge * torch.eye(len(gram), dtype=torch.float64)
    delta = torch.linalg.solve(system, cross.T).T
    factors = torch.eye(len(delta), dtype=torch.float64), delta
    repaired = Movement.of_weight(site, parameter, *factors, gram)
    return repaired, _report(block, delta, test_pairs, test_captions)


def _report(
    block: _Layer, delta: Tensor, test_pairs: Sequence[Sequence[Pair]], test_captions: Sequence[str]
) -> dict[str, float]:
    """Return missed target movement and drift, with and without the movement `delta` of `fc2`."""
    target = 0.0
    missed, drift = torch.zeros(2, 2, dtype=torch.float64)
    for pairs in test_pairs:
        share = 1 / len(pairs) / len(test_pairs)
        for before, after, new in _pair_states(block, pairs):
            rows, output = _pair_rows(block, after, new)
            moved = output - block.output(before, block.hidden(before))
            target += share * float(moved.double().square().sum())
            missed += share * _energies(rows, delta)
    for rows in _caption_rows(block, test_captions):
        drift += _energies(rows, delta) / len(test_captions)
    report: dict[str, float] = {}
    for i, suffix in enumerate(("_before_repair", "")):
        report[f"layer_missed{suffix}"] = float(missed[i]) / target
        report[f"layer_drift{suffix}"] = float(drift[i]) / target
    return report


def _energies(rows: _Rows, delta: Tensor) -> Tensor:
    """Return the squared norms of the residuals without and with the movement `delta`, shape (2,), float64."""
    residuals = rows.residuals.double()
    after = residuals - rows.keys.double() @ delta.T
    return torch.stack([residuals.square().sum(), after.square().sum()])


def _pair_states(block: _Layer, pairs: Sequence[Pair]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield states behind the attention (N, D), a row for each key.

    They are those of the old captions, before and after the first movement, and of the new captions, before it.
    """
    for start in range(0, len(pairs), _CHUNK):
        chunk = pairs[start : start + _CHUNK]
        old, new = (torch.stack([getattr(p, side).ids for p in chunk]) for side in ("old", "new"))
        key_rows, source_rows = _aligned(chunk)
        before, after = (state.flatten(0, 1)[key_rows] for state in block.states(old))
        yield before, after, block.states(new)[0].flatten(0, 1)[source_rows]


def _pair_rows(block: _Layer, state: Tensor, target: Tensor) -> tuple[_Rows, Tensor]:
    """Return keys and residuals of states whose outputs should be those of the states `target`, and these outputs."""
    keys, output = block.hidden(state), block.output(target, block.hidden(target))
    return _Rows(keys, output - block.output(state, keys)), output


def _caption_rows(block: _Layer, captions: Sequence[str]) -> Iterator[_Rows]:
    """Yield the rows of captions whose outputs should be those before the movement."""
    for start in range(0, len(captions), _CHUNK):
        ids = block.model.tokenize(captions[start : start + _CHUNK], encoder=block.encoder)
        old, new = (state.flatten(0, 1) for state in block.states(ids))
        keys = block.hidden(new)
        yield _Rows(keys, block.moved(old - new, block.hidden(old) - keys))


def _aligned(pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
    """Return the rows of the keys in the flattened old captions, and those of their targets in the new ones."""
    length = len(pairs[0].old.ids)
    key_rows, source_rows = aligned_rows(pairs, torch.arange(2 * len(pairs)), length)
    # `aligned_rows` numbers old and new captions alternately; here they are two separate batches
    first, second = (
        (rows // (2 * length)) * length + rows % length for rows in (key_rows, source_rows)
    )
    return first, second
