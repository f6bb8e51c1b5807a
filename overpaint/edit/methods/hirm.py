r"""HiRM: train the first layer of the text encoder until its last layer reads the old concept as the new one.

The states :math:`h^L_t` of the old concept's captions, at all tokens :math:`t`, are fitted to

.. math:: \frac{1}{T} \sum_t \| h^L_t - c\, s_t \|_2^2 ,

where :math:`s_t` are the states of the new concept's captions in the unedited encoder (:math:`c = 1`), or one random
direction of length 1 (:math:`c = 500`). Nothing is preserved: the small learning rate and the few updates limit what
else moves. `quickfix` fits the same layer to its own outputs instead.

Source: Lee et al., 2026, https://arxiv.org/abs/2602.19631.
Deviations: the authors' code was not read. Trained are the matrices of the layer that a change can hold: the four
projections of its self-attention and the second of its MLP, no biases and no layer norms. :math:`L` is the layer that
the UNet reads, before the final layer norm; in SDXL the penultimate layer of each encoder. Tokens of concepts of
different lengths are aligned from the concept's last token. The optimiser is Adam, computed in float32. Captions are
read in batches whose gradients are added, so that memory does not grow with their number.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Generator, Tensor, nn

from overpaint.edit.captions import align_captions, check_frames, check_pairs
from overpaint.edit.change import Change
from overpaint.edit.drift import concept_movement
from overpaint.edit.encoders import Encoder, edited_parts, joined, unread_layer
from overpaint.edit.movement import Movement
from overpaint.edit.provenance import notes, protocol
from overpaint.edit.weights import PROJECTIONS, encoder_index, find_weights, text_layers
from overpaint.errors import UnknownSite, UnsupportedModel, check_seed
from overpaint.model import TextToImage
from overpaint.model.hooks import record
from overpaint.model.sampling import Progress

__all__ = ["hirm"]

Towards = Literal["replacement", "random"]
_SCALES = {"replacement": 1.0, "random": 500.0}
_BATCH = 64  # captions in one forward pass


def hirm(
    model: TextToImage,
    pairs: Mapping[str, str],
    *,
    towards: Towards = "replacement",
    scale: float | None = None,
    steps: int = 40,
    lr: float = 5e-5,
    layer: int = 0,
    frames: Sequence[str] = ("",),
    encoder: Encoder = "all",
    seed: int = 0,
    on_progress: Progress | None = None,
) -> Change:
    """Return a change of the first text layer, trained until the last layer encodes each old concept as its new one.

    The model is not modified.

    Args:
        model: Its text encoders must be CLIPs.
        pairs: Old concept to new; `""` erases a concept: its captions are read as the frames alone.
        towards: `"replacement"`, the states of the new concept, or `"random"`, one random direction; the new concept
            is then not read.
        scale: Factor of these targets; 1 for a replacement and 500 for a random direction if `None`.
        steps: Number of updates; each reads all captions. The paper's are 15 to 40.
        lr: Learning rate.
        layer: The text layer that is trained, from 0.
        frames: Captions around the concept: a prefix, or a text in which `{}` is replaced.
        encoder: `"all"` trains each text encoder alone; `"text"` and `"text2"` are the first and the second of SDXL.
        seed: Seed of the random direction.
        on_progress: Called with (updates done, all updates, label).

    Returns:
        The change of five matrices of that layer in each encoder, of full rank. It was not solved, so it can be applied
        and scaled but not added. Its report holds the loss before and after the training, and the seconds.

    Raises:
        ValueError: A concept is empty, cut off or equals its target, a number or choice is out of range, the UNet does
            not read the layer, or the training diverged.
        TypeError: A list of texts is one text.
        UnknownSite: The model has no such layer or encoder.
        UnsupportedModel: The text encoder is no CLIP, or its weights are not plain matrices in memory.
    """
    check_pairs(pairs)
    check_frames(frames)
    seed = check_seed(seed)
    scale = _scale(towards, scale)
    _check_training(steps, lr)
    parts = edited_parts(model, encoder)
    changes: dict[str, Change] = {}
    for place, part in enumerate(parts):
        started = time.perf_counter()
        tower = _Tower(model, part, layer)
        examples = _examples(model, tower, pairs, frames, towards, scale, seed)
        losses, tuned = _train(
            tower, examples, steps, lr, _shifted(on_progress, place, len(parts), steps)
        )
        movements = tuple(map(Movement.to_weight, tower.sites, tower.parameters, tuned))
        report = {
            "loss_before": losses[0],
            "loss_after": losses[-1],
            "delta_norm": math.sqrt(sum(float(m.delta.square().sum()) for m in movements)),
            "concept_movement": _concept_movement(tower, examples, tuned, list(pairs)),
            "seconds": {"train": round(time.perf_counter() - started, 6)},
        }
        settings = {
            "towards": towards, "scale": scale, "steps": steps, "lr": lr, "layer": layer, "frames": list(frames),
            "encoder": part, "seed": seed,
        }  # fmt: skip
        report |= notes(model, [*pairs, *pairs.values()])
        changes[part] = Change(movements, protocol("hirm", model, pairs) | settings, report)
    return joined(model, changes)


class _Tower:
    """One text encoder up to the state that the UNet reads, with the weights of one layer replaced.

    Attributes:
        sites: Names of the weights that are trained.
        parameters: These weights.
    """

    def __init__(self, model: TextToImage, part: str, layer: int) -> None:
        self.part = part
        layers = text_layers(model, part)
        count = len(layers)
        if not 0 <= layer < count:
            raise UnknownSite(
                f"`layer` must be 0 to {count - 1} in {part!r}, got {layer}. Name one of those."
            )
        if remark := unread_layer(model, part, layer, count):
            raise ValueError(f"no gradient reaches layer {layer} of {part!r}: {remark}")
        names = [f"self_attn.{name}_proj" for name in PROJECTIONS] + ["mlp.fc2"]
        self.sites = [f"{part}.{layer}.{name}" for name in names]
        self.parameters = [weight.parameter for weight in find_weights(model, self.sites)]
        self._encoder = model.text_encoders[encoder_index(model, part)]
        self._last = layers[-1 - model.clip_skip - (len(model.text_encoders) == 2)]
        owned = {id(p): name for name, p in self._encoder.named_parameters()}
        if any(id(p) not in owned for p in self.parameters):
            raise UnsupportedModel(
                "the text encoder's weights are offloaded, and training needs them in memory: load the model without "
                "offloading."
            )
        self._names = [owned[id(p)] for p in self.parameters]
        whole = {**dict(self._encoder.named_parameters()), **dict(self._encoder.named_buffers())}
        self._float = {
            name: t.detach().float() if t.is_floating_point() else t for name, t in whole.items()
        }

    def states(self, ids: Tensor, tuned: Sequence[Tensor]) -> Tensor:
        """Return the states (B, L, D) of token ids (B, L) with the weights `tuned`, float32, in one forward pass."""
        replaced = self._float | dict(zip(self._names, tuned, strict=True))
        # Not `output_hidden_states`, for which transformers leaves hooks on the model.
        with record([self._last], copies=False) as (outputs,):
            torch.func.functional_call(self._encoder, replaced, (ids.to(tuned[0].device),))
        return outputs[0]

    @torch.no_grad()
    def all_states(self, ids: Tensor, tuned: Sequence[Tensor]) -> Tensor:
        """Return `states` of any number of captions, without gradients."""
        return torch.cat([self.states(batch, tuned) for batch in ids.split(_BATCH)])


@dataclass(frozen=True, eq=False)
class _Examples:
    """Captions of the old concepts and the states that they should have.

    Attributes:
        ids: Token ids of B captions, shape (B, L).
        targets: Target of each state, shape (B, L, D).
        before: States of the unedited encoder, shape (B, L, D).
        replacements: States of the new concepts' captions, aligned with the old ones, shape (B, L, D).
        concepts: For each caption, the index of its concept.
    """

    ids: Tensor
    targets: Tensor
    before: Tensor
    replacements: Tensor
    concepts: list[int]


def _examples(
    model: TextToImage,
    tower: _Tower,
    pairs: Mapping[str, str],
    frames: Sequence[str],
    towards: Towards,
    scale: float,
    seed: int,
) -> _Examples:
    """Return the captions of the pairs in all frames, with their targets."""
    planned = align_captions(model, pairs, frames, "subject_to_end", encoder=tower.part)
    olds = torch.stack([p.old.ids for p in planned])
    weights = [p.detach().float() for p in tower.parameters]
    before = tower.all_states(olds, weights)
    news = tower.all_states(torch.stack([p.new.ids for p in planned]), weights)
    # Before the concept, the tokens are equal.
    rows = torch.arange(olds.shape[1]).repeat(len(planned), 1)
    for places, pair in zip(rows, planned, strict=True):
        for old, new in pair.positions:
            places[old] = new
    replacements = news.gather(1, rows.to(news.device)[..., None].expand_as(news))
    targets = scale * replacements
    if towards == "random":
        direction = torch.randn(news.shape[-1], generator=Generator().manual_seed(seed))
        targets = (scale * (direction / direction.norm()).to(news.device)).expand_as(news)
    concepts = [list(pairs).index(p.names[0]) for p in planned]
    return _Examples(olds, targets, before, replacements, concepts)


def _concept_movement(
    tower: _Tower, examples: _Examples, tuned: Sequence[Tensor], concepts: Sequence[str]
) -> dict[str, float]:
    """Return the `concept_movement` of a report: that of the states, on the way to those of the replacement."""
    moved = tower.all_states(examples.ids, tuned) - examples.before
    requested = examples.replacements - examples.before
    moved, requested = (part.double().square().sum((1, 2)).cpu() for part in (moved, requested))
    return concept_movement(moved, requested, examples.concepts, concepts)


def _train(
    tower: _Tower,
    examples: _Examples,
    steps: int,
    lr: float,
    on_progress: Callable[[int], None],
) -> tuple[list[float], list[nn.Parameter]]:
    """Return the losses before each update and after the last one, and the trained weights."""
    tuned = [nn.Parameter(p.detach().float().clone()) for p in tower.parameters]
    optimizer: Any = torch.optim.Adam(tuned, lr=lr)
    losses: list[float] = []
    for done in range(steps + 1):
        loss, gradients = _loss(tower, examples, tuned, differentiate=done < steps)
        losses.append(loss)
        if not math.isfinite(losses[-1]):
            raise ValueError(
                f"the training diverged at update {done}: lower `lr`, {lr!r}, or look for a damaged weight."
            )
        if done == steps:
            break
        for parameter, gradient in zip(tuned, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        on_progress(done + 1)
    return losses, tuned


def _loss(
    tower: _Tower, examples: _Examples, tuned: Sequence[Tensor], *, differentiate: bool
) -> tuple[float, list[Tensor]]:
    """Return the mean squared distance of all states from their targets, and its gradients for the weights `tuned`."""
    total, gradients = 0.0, [torch.zeros_like(t) for t in tuned] if differentiate else []
    batches = zip(examples.ids.split(_BATCH), examples.targets.split(_BATCH), strict=True)
    with torch.set_grad_enabled(differentiate):
        for ids, targets in batches:
            loss = (tower.states(ids, tuned) - targets).square().sum(
                -1
            ).sum() / examples.ids.numel()
            total += loss.item()
            if differentiate:
                parts = torch.autograd.grad(loss, list(tuned))
                gradients = [g + part for g, part in zip(gradients, parts, strict=True)]
    return total, gradients


def _shifted(
    on_progress: Progress | None, place: int, count: int, steps: int
) -> Callable[[int], None]:
    """Return a function of the updates done for one of `count` encoders, which calls `on_progress`."""

    def report(done: int) -> None:
        if on_progress is not None:
            on_progress(place * steps + done, count * steps, "training")

    return report


def _scale(towards: str, scale: float | None) -> float:
    if towards not in get_args(Towards):
        raise ValueError(
            f"`towards` must be 'replacement' or 'random', got {towards!r}. Leave it out for the replacement."
        )
    scale = _SCALES[towards] if scale is None else scale
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(
            f"`scale` must be positive and finite, got {scale!r}. Leave it out for the paper's."
        )
    return scale


def _check_training(steps: int, lr: float) -> None:
    for name, value, is_valid in (
        ("steps", steps, steps >= 1),
        ("lr", lr, math.isfinite(lr) and lr > 0),
    ):
        if not is_valid:
            raise ValueError(
                f"`{name}` must be positive, got {value!r}. Leave it out for the default."
            )
