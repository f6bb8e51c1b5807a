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

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear

from overpaint.edit.captions import Pair, aligned_rows
from overpaint.edit.movement import Movement
from overpaint.edit.weights import encoder_index, find_weight, text_layers
from overpaint.errors import UnsupportedModel
from overpaint.model import TextToImage
from overpaint.model.hooks import record_inputs

__all__ = ["repair"]

_CHUNK = 128  # captions in one forward pass


@dataclass(frozen=True, eq=False)
class _Sums:
    """Weighted sums over captions, from the inputs K (N, D_in) and the residuals R (N, D_out).

    Attributes:
        gram: K^T K, shape (D_in, D_in).
        cross: R^T K, shape (D_out, D_in).
        energy: Squared norm of R.
        target_energy: Squared norm of the target movement: the residuals before the first step.
    """

    gram: Tensor
    cross: Tensor
    energy: float
    target_energy: float = 0.0

    def residual_energy(self, delta: Tensor) -> float:
        """Return the squared norm of the residuals that remain after the movement `delta`."""
        quadratic = float((delta @ self.gram * delta).sum() - 2 * (delta * self.cross).sum())
        return quadratic + self.energy


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

    def read(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return three tensors for token ids (B, L); old and new mean before and after the movement of `out_proj`.

        Returns:
            The old output of the layer (B, L, D), the new input of `fc2` (B, L, 4 D) and the new output (B, L, D).
        """
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
        new_state = old_state + projection_inputs[0].cpu() @ self.delta.T
        return self._output(old_state)[1], *self._output(new_state)

    def _output(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return the input of `fc2` and the output of the layer for the state behind the attention, in float32."""
        norm, mlp = self.block.layer_norm2, self.block.mlp

        def weight_and_bias(module: Any) -> tuple[Tensor, Tensor]:
            return module.weight.detach().float().cpu(), module.bias.detach().float().cpu()

        scaled = layer_norm(state, norm.normalized_shape, *weight_and_bias(norm), norm.eps)
        hidden = mlp.activation_fn(linear(scaled, *weight_and_bias(mlp.fc1)))
        return hidden, state + linear(hidden, *weight_and_bias(mlp.fc2))


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
    parts = [_pair_sums(block, group) for group in pairs]
    parts += [_caption_sums(block, captions, weight) for captions, weight in preserve if weight]
    gram = sum((p.gram for p in parts[1:]), parts[0].gram)
    cross = sum((p.cross for p in parts[1:]), parts[0].cross)
    system = gram + ridge * torch.eye(len(gram), dtype=torch.float64)
    delta = torch.linalg.solve(system, cross.T).T
    factors = torch.eye(len(delta), dtype=torch.float64), delta
    repaired = Movement.of_weight(site, parameter, *factors, gram)
    return repaired, _report(block, delta, test_pairs, test_captions)


def _report(
    block: _Layer, delta: Tensor, test_pairs: Sequence[Sequence[Pair]], test_captions: Sequence[str]
) -> dict[str, float]:
    pair_sums = [_pair_sums(block, pairs) for pairs in test_pairs]
    target = sum(part.target_energy for part in pair_sums) / len(pair_sums)
    caption_sums = _caption_sums(block, test_captions, 1.0)
    report: dict[str, float] = {}
    for suffix, movement in (("_before_repair", torch.zeros_like(delta)), ("", delta)):
        missed = sum(part.residual_energy(movement) for part in pair_sums) / len(pair_sums)
        report[f"layer_missed{suffix}"] = missed / target
        report[f"layer_drift{suffix}"] = caption_sums.residual_energy(movement) / target
    return report


def _pair_sums(block: _Layer, pairs: Sequence[Pair]) -> _Sums:
    """Return the sums over pairs of captions, divided by the number of pairs."""
    parts: list[_Sums] = []
    for start in range(0, len(pairs), _CHUNK):
        old, key_rows, new, source_rows = _rows(block, pairs[start : start + _CHUNK])
        target = float((new[0][source_rows] - old[0][key_rows]).square().sum()) / len(pairs)
        residual = new[0][source_rows] - old[2][key_rows]
        parts.append(_weighted(old[1][key_rows], residual, 1 / len(pairs), target))
    return _total(parts)


def _caption_sums(block: _Layer, captions: Sequence[str], weight: float) -> _Sums:
    """Return the sums over captions whose output should not change, times `weight` and divided by their number."""
    parts: list[_Sums] = []
    for start in range(0, len(captions), _CHUNK):
        ids = block.model.tokenize(captions[start : start + _CHUNK], encoder=block.encoder)
        before, hidden, after = block.read(ids)
        rows = hidden.flatten(0, 1), (before - after).flatten(0, 1)
        parts.append(_weighted(*rows, weight / len(captions)))
    return _total(parts)


def _rows(
    block: _Layer, pairs: Sequence[Pair]
) -> tuple[tuple[Tensor, ...], Tensor, tuple[Tensor, ...], Tensor]:
    """Return the outputs of `_Layer.read` and the rows to use, for the old captions and then for the new ones.

    The rows of the old captions are keys; those of the new captions are their targets.
    """
    length = len(pairs[0].old.ids)
    key_rows, source_rows = aligned_rows(pairs, torch.arange(2 * len(pairs)), length)
    old, new = (
        block.read(torch.stack(ids))
        for ids in zip(*((p.old.ids, p.new.ids) for p in pairs), strict=True)
    )
    # `aligned_rows` numbers old and new captions alternately; here they are two separate batches
    key_rows, source_rows = (
        (rows // (2 * length)) * length + rows % length for rows in (key_rows, source_rows)
    )
    flat = [tuple(t.flatten(0, 1) for t in states) for states in (old, new)]
    return flat[0], key_rows, flat[1], source_rows


def _weighted(keys: Tensor, residual: Tensor, weight: float, target_energy: float = 0.0) -> _Sums:
    keys, residual = keys.double(), residual.double()
    energy = weight * float(residual.square().sum())
    return _Sums(weight * keys.T @ keys, weight * residual.T @ keys, energy, target_energy)


def _total(parts: Sequence[_Sums]) -> _Sums:
    gram, cross = parts[0].gram, parts[0].cross
    for part in parts[1:]:
        gram, cross = gram + part.gram, cross + part.cross
    return _Sums(gram, cross, sum(p.energy for p in parts), sum(p.target_energy for p in parts))
