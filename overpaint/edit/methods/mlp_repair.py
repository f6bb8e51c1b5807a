r"""What the projection of a text layer leaves to do, taken up by the MLP behind it.

An attention's `out_proj` reads mixtures of tokens in as many directions as the model is wide: it cannot tell every
concept from every other one. The MLP of the same layer reads four times as many, after a nonlinearity. With the first
movement in place, its second matrix is fitted so that the layer as a whole gives

- on captions of an edited concept, what the unedited layer gives on the captions of its replacement;
- on all other captions, what it gave before.

Both are one regularised least squares: with inputs :math:`k` of `fc2` under the first movement and :math:`r` what the
layer's output lacks, minimise :math:`\sum \|\Delta k - r\|^2 + \lambda \|\Delta\|_F^2`, a term a caption.

The inputs depend on the first movement and so on all its concepts: such a change is not added to another one but made
anew for the pairs of both (`stack`).

Source: ours; that the MLPs of a transformer can be read as keys and values, and edited so, is in Meng et al., 2022
(ROME), https://arxiv.org/abs/2202.05262, section 3.1.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear

from overpaint.edit.captions import Pair, places
from overpaint.edit.movement import Movement
from overpaint.edit.weights import find_weight, fingerprint, text_layers
from overpaint.errors import UnsupportedModel
from overpaint.model import TextToImage
from overpaint.model.hooks import record_inputs

__all__ = ["repair"]

_CHUNK = 128  # captions read at once


@dataclass(frozen=True, eq=False)
class _Sums:
    """What the fit reads of inputs K (N, D_in) and wanted movements R (N, D_out), as weighted sums over captions.

    `gram` is K^T K, `cross` R^T K, `energy` the squared norm of R, `asked` that of the whole movement before any edit.
    """

    gram: Tensor
    cross: Tensor
    energy: float
    asked: float = 0.0

    def left(self, delta: Tensor) -> float:
        """Return the squared norm of what `delta` leaves of R."""
        return (
            float((delta @ self.gram * delta).sum() - 2 * (delta * self.cross).sum()) + self.energy
        )


@dataclass(frozen=True, eq=False)
class _Layer:
    """One text layer from its attention on, with and without a movement of `out_proj`."""

    model: TextToImage
    block: Any
    delta: Tensor

    @classmethod
    def of(cls, model: TextToImage, layer: int, delta: Tensor) -> "_Layer":
        block = text_layers(model)[layer]
        parts = ("layer_norm2", "mlp.activation_fn", "mlp.fc1", "mlp.fc2")
        modules = dict(block.named_modules())
        if missing := [name for name in parts if name not in modules]:
            raise UnsupportedModel(
                f"text layer {layer} has no {missing[0]}, so there is nothing to repair with: say `repair=False`."
            )
        return cls(model, block, delta.float())

    def read(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return, for token ids (B, L): the layer's old output, what its MLP's `fc2` then reads, and its new output."""
        device = self.block.mlp.fc2.weight.device
        attention, norm = self.block.self_attn.out_proj, self.block.layer_norm2
        with (
            torch.no_grad(),
            record_inputs(norm, stop=True) as after,
            record_inputs(attention) as before,
        ):
            self.model.text_encoder(ids.to(device))
        if len(before) != 1 or len(after) != 1:
            raise UnsupportedModel(
                "the text encoder did not call its attention and norm once each: use a plain `CLIPTextModel`, neither "
                "compiled nor fused."
            )
        mixed, state = before[0].cpu(), after[0].cpu()
        moved = state + mixed @ self.delta.T
        return self._output(state)[1], *self._output(moved)

    def _output(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return what `fc2` reads and the layer's output, of the state after the attention; float32."""
        norm, mlp = self.block.layer_norm2, self.block.mlp

        def numbers(module: Any) -> tuple[Tensor, Tensor]:
            return module.weight.detach().float().cpu(), module.bias.detach().float().cpu()

        scaled = layer_norm(state, norm.normalized_shape, *numbers(norm), norm.eps)
        hidden = mlp.activation_fn(linear(scaled, *numbers(mlp.fc1)))
        return hidden, state + linear(hidden, *numbers(mlp.fc2))


def repair(
    model: TextToImage,
    movement: Movement,
    *,
    layer: int,
    wanted: Sequence[Sequence[Pair]],
    kept: Sequence[tuple[Sequence[str], float]],
    fresh: Sequence[Sequence[Pair]],
    unseen: Sequence[str],
    ridge: float,
) -> tuple[Movement, dict[str, float]]:
    """Return the movement of a layer's `mlp.fc2` that completes one of its `out_proj`; the model is not touched.

    Args:
        model: Unedited.
        movement: Of `text.<layer>.self_attn.out_proj`.
        layer: Of the first text encoder, from 0.
        wanted: Of each concept, its captions paired with those of the replacement; a concept weighs 1.
        kept: Captions whose output should stay, in groups, each with its weight.
        fresh: As `wanted`, to measure with; not fitted.
        unseen: As `kept`, to measure with.
        ridge: As in `auto`.

    Returns:
        The movement, whose `gram` is that of the whole system and which has no keys of its own; and what the layer's
        output misses and how far other captions drift, both as shares of the movement asked for, before and after.

    Raises:
        UnsupportedModel: The layer has no such MLP, or the encoder is compiled or fused.
    """
    read = _Layer.of(model, layer, movement.delta)
    site = f"text.{layer}.mlp.fc2"
    parameter = find_weight(model, site).parameter
    parts = [_of_pairs(read, pairs) for pairs in wanted]
    parts += [_of_captions(read, captions, weight) for captions, weight in kept if weight]
    gram = sum((p.gram for p in parts[1:]), parts[0].gram)
    cross = sum((p.cross for p in parts[1:]), parts[0].cross)
    system = gram + ridge * torch.eye(len(gram), dtype=torch.float64)
    delta = torch.linalg.solve(system, cross.T).T
    factors = torch.eye(len(delta), dtype=torch.float64), delta
    none = torch.zeros(0, delta.shape[1]), torch.zeros(0, len(delta))
    made = Movement(site, fingerprint(parameter), *factors, *none, (), gram)
    return made, _report(read, delta, fresh, unseen)


def _report(
    read: _Layer, delta: Tensor, fresh: Sequence[Sequence[Pair]], unseen: Sequence[str]
) -> dict[str, float]:
    missed = [_of_pairs(read, pairs) for pairs in fresh]
    asked = sum(part.asked for part in missed) / len(missed)
    drift = _of_captions(read, unseen, 1.0)
    still = torch.zeros_like(delta)
    told: dict[str, float] = {}
    for name, movement in (("_before_repair", still), ("", delta)):
        left = sum(part.left(movement) for part in missed) / len(missed)
        told[f"layer_missed{name}"] = left / asked
        told[f"layer_drift{name}"] = drift.left(movement) / asked
    return told


def _of_pairs(read: _Layer, pairs: Sequence[Pair]) -> _Sums:
    parts: list[_Sums] = []
    for found in _chunks(pairs):
        old, at, new, of = _rows(read, found)
        asked = float((new[0][of] - old[0][at]).square().sum()) / len(pairs)
        parts.append(_summed(old[1][at], new[0][of] - old[2][at], 1 / len(pairs), asked))
    return _total(parts)


def _of_captions(read: _Layer, captions: Sequence[str], weight: float) -> _Sums:
    parts: list[_Sums] = []
    for start in range(0, len(captions), _CHUNK):
        before, hidden, after = read.read(read.model.tokenize(captions[start : start + _CHUNK]))
        rows = hidden.flatten(0, 1), (before - after).flatten(0, 1)
        parts.append(_summed(*rows, weight / len(captions)))
    return _total(parts)


def _rows(
    read: _Layer, found: Sequence[Pair]
) -> tuple[tuple[Tensor, ...], Tensor, tuple[Tensor, ...], Tensor]:
    """Return what the layer reads and gives for old and for new captions, flat, and the rows that are aligned."""
    length = len(found[0].old.ids)
    at, of = places(found, torch.arange(2 * len(found)), length)
    old, new = (
        read.read(torch.stack(ids))
        for ids in zip(*((p.old.ids, p.new.ids) for p in found), strict=True)
    )
    half = [(rows // (2 * length)) * length + rows % length for rows in (at, of)]
    flat = [tuple(t.flatten(0, 1) for t in states) for states in (old, new)]
    return flat[0], half[0], flat[1], half[1]


def _chunks(pairs: Sequence[Pair]) -> Iterator[Sequence[Pair]]:
    return (pairs[start : start + _CHUNK] for start in range(0, len(pairs), _CHUNK))


def _summed(keys: Tensor, residual: Tensor, weight: float, asked: float = 0.0) -> _Sums:
    keys, residual = keys.double(), residual.double()
    energy = weight * float(residual.square().sum())
    return _Sums(weight * keys.T @ keys, weight * residual.T @ keys, energy, asked)


def _total(parts: Sequence[_Sums]) -> _Sums:
    gram, cross = parts[0].gram, parts[0].cross
    for part in parts[1:]:
        gram, cross = gram + part.gram, cross + part.cross
    return _Sums(gram, cross, sum(p.energy for p in parts), sum(p.asked for p in parts))
