r"""Second step of an edit: fit the layer's `mlp.fc2` to the residual that its `out_proj` cannot remove.

The inputs of an attention's `out_proj` are mixtures of tokens in D dimensions, too few to separate every concept from
every other one. The second matrix of the same layer's MLP reads four times as many, after a nonlinearity. With the
first movement in place it is fitted so that the output of the layer is

- on captions of an edited concept, the output of the unedited layer on the captions of its replacement;
- on all other captions, the output before the edit.

Both are one regularised least squares: with inputs :math:`k` of `fc2` under the first movement and residuals :math:`r`
of the layer's output, minimise :math:`\sum \|\Delta k - r\|^2 + \lambda \|\Delta\|_F^2`, each caption with its weight.

The inputs depend on the first movement, and so on all its concepts: such a change cannot be added to another one, and
`edit.stack` makes it again for the pairs of both.

Source: ours; reading and editing the MLPs of a transformer as keys and values is from Meng et al., 2022 (ROME),
https://arxiv.org/abs/2202.05262, section 3.1.
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

_CHUNK = 128  # captions read at once


@dataclass(frozen=True, eq=False)
class _Sums:
    """Weighted sums over captions of inputs K (N, D_in) and residuals R (N, D_out).

    Attributes:
        gram: K^T K, shape (D_in, D_in).
        cross: R^T K, shape (D_out, D_in).
        energy: Squared norm of R.
        target_energy: Squared norm of the whole target movement, before any edit.
    """

    gram: Tensor
    cross: Tensor
    energy: float
    target_energy: float = 0.0

    def residual_energy(self, delta: Tensor) -> float:
        """Return the squared norm of R after the movement `delta`."""
        quadratic = float((delta @ self.gram * delta).sum() - 2 * (delta * self.cross).sum())
        return quadratic + self.energy


@dataclass(frozen=True, eq=False)
class _Layer:
    """One text layer after its attention, with and without a movement of `out_proj`."""

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
        """Return, for token ids (B, L): the old output of the layer, the new input of its `fc2`, and its new output."""
        device = self.block.mlp.fc2.weight.device
        attention, norm = self.block.self_attn.out_proj, self.block.layer_norm2
        with (
            torch.no_grad(),
            record_inputs(norm, stop=True) as after,
            record_inputs(attention) as before,
        ):
            self.model.text_encoders[self.encoder](ids.to(device))
        if len(before) != 1 or len(after) != 1:
            raise UnsupportedModel(
                "the text encoder did not call its attention and norm once each: use a plain `CLIPTextModel`, neither "
                "compiled nor fused."
            )
        mixed, state = before[0].cpu(), after[0].cpu()
        moved = state + mixed @ self.delta.T
        return self._output(state)[1], *self._output(moved)

    def _output(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return the input of `fc2` and the output of the layer, from the state after the attention; float32."""
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
    fresh: Sequence[Sequence[Pair]],
    unseen: Sequence[str],
    ridge: float,
) -> tuple[Movement, dict[str, float]]:
    """Return the movement of a layer's `mlp.fc2` that completes one of its `out_proj`; the model is not modified.

    Args:
        model: The unedited model.
        movement: Movement of `<part>.<layer>.self_attn.out_proj`, where the part is `text` or `text2`.
        layer: Layer of that text encoder, from 0.
        pairs: For each concept, its captions paired with those of the replacement; a concept has weight 1.
        preserve: Groups of captions whose output should not change, each with its weight.
        fresh: As `pairs`, to measure with; not fitted.
        unseen: Captions whose output should not change, to measure with; not fitted.
        ridge: As in `auto`.

    Returns:
        The movement, whose `gram` is that of the whole system and which has no keys; and the report: missed target
        movement and drift of unseen captions at the layer's output, both relative to the target movement, before and
        after.

    Raises:
        UnsupportedModel: The layer has no such MLP, or the encoder is compiled or fused.
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
    return repaired, _report(block, delta, fresh, unseen)


def _report(
    block: _Layer, delta: Tensor, fresh: Sequence[Sequence[Pair]], unseen: Sequence[str]
) -> dict[str, float]:
    fresh_sums = [_pair_sums(block, pairs) for pairs in fresh]
    target = sum(part.target_energy for part in fresh_sums) / len(fresh_sums)
    unseen_sums = _caption_sums(block, unseen, 1.0)
    report: dict[str, float] = {}
    for suffix, movement in (("_before_repair", torch.zeros_like(delta)), ("", delta)):
        missed = sum(part.residual_energy(movement) for part in fresh_sums) / len(fresh_sums)
        report[f"layer_missed{suffix}"] = missed / target
        report[f"layer_drift{suffix}"] = unseen_sums.residual_energy(movement) / target
    return report


def _pair_sums(block: _Layer, pairs: Sequence[Pair]) -> _Sums:
    """Return the sums over pairs of captions, as a mean."""
    parts: list[_Sums] = []
    for start in range(0, len(pairs), _CHUNK):
        old, key_rows, new, source_rows = _rows(block, pairs[start : start + _CHUNK])
        target = float((new[0][source_rows] - old[0][key_rows]).square().sum()) / len(pairs)
        residual = new[0][source_rows] - old[2][key_rows]
        parts.append(_weighted(old[1][key_rows], residual, 1 / len(pairs), target))
    return _total(parts)


def _caption_sums(block: _Layer, captions: Sequence[str], weight: float) -> _Sums:
    """Return the sums over captions whose output should not change, as a mean times `weight`."""
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
    """Return `_Layer.read` of old captions with the rows of their keys, and of new captions with those of targets."""
    length = len(pairs[0].old.ids)
    key_rows, source_rows = aligned_rows(pairs, torch.arange(2 * len(pairs)), length)
    old, new = (
        block.read(torch.stack(ids))
        for ids in zip(*((p.old.ids, p.new.ids) for p in pairs), strict=True)
    )
    # `places` counts rows of old and new captions in turn; here each kind is a batch of its own
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
