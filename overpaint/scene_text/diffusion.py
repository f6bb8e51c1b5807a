r"""Noise schedule, training loss and sampling of a lettering model.

The schedule is the cosine of Nichol and Dhariwal in 1,000 steps. The network predicts the clean latents
:math:`x_0`, or the velocity :math:`v = \alpha \epsilon - \sigma x_0`. The loss has the weight 5 inside of the mask and
1 outside, as in DiffSTE; for clean latents it is also multiplied by :math:`\min(1 / \sigma^2, 6)`.

Guidance has two scales, of spelling and of style. With equal scales it is DiffSTE's joint guidance of two passes;
otherwise a third pass sees the characters alone:
:math:`p(\varnothing) + s_c\,(p(c) - p(\varnothing)) + s_i\,(p(c, i) - p(c))`.

Source: Ji et al., 2023 (DiffSTE), https://arxiv.org/abs/2304.05568; Nichol and Dhariwal, 2021,
https://arxiv.org/abs/2102.09672, equation 17; Salimans and Ho, 2022, https://arxiv.org/abs/2202.00512; Hang et al.,
2023, https://arxiv.org/abs/2303.09556, for the weight.
Deviations: the two scales and the weight of clean latents are not DiffSTE's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Generator, Tensor

from overpaint.model.sampling import denoise, make_scheduler
from overpaint.scene_text.attention import Conditions
from overpaint.scene_text.layout import Edges, layout_loss
from overpaint.scene_text.network import Inputs, Network, Place, Texts

__all__ = [
    "MASK_WEIGHT",
    "Batch",
    "Guidance",
    "emptied_rows",
    "masked_error",
    "sample",
    "scheduler",
    "training_loss",
]

MASK_WEIGHT = 5.0  # of latents inside of the mask
_LARGEST_WEIGHT = 6.0  # of clean latents at little noise


@dataclass(frozen=True)
class Guidance:
    """Scales of guidance; 1 is the conditional prediction, 0 the unconditional one.

    Attributes:
        spelling: Of the characters.
        style: Of the instruction.
    """

    spelling: float = 1.0
    style: float = 1.0


@dataclass(frozen=True)
class Batch:
    """Lines with known words, for training.

    Attributes:
        images: RGB in [-1, 1], (B, 3, H, W).
        mask: 1 where the word is to be written, (B, 1, H, W).
        texts: Words and instructions.
        place: Where the words stand.
        edges: True edges of the letters.
    """

    images: Tensor
    mask: Tensor
    texts: Texts
    place: Place
    edges: Edges


def scheduler(prediction: str) -> Any:
    """Return the DDIM scheduler of a lettering model.

    Args:
        prediction: `"sample"` or `"v_prediction"`.
    """
    diffusers: Any = import_module("diffusers")
    return diffusers.DDIMScheduler(
        num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2", prediction_type=prediction, clip_sample=False,
        timestep_spacing="trailing",
    )  # fmt: skip


def masked_error(
    predicted: Tensor, target: Tensor, mask: Tensor, weight: float = MASK_WEIGHT
) -> Tensor:
    """Return the squared error, times `weight` where `mask` is 1, as a mean for each row, (B,).

    Args:
        predicted: Prediction, (B, C, h, w).
        target: Target, of the same shape.
        mask: Share of mask under each value, of the same shape.
        weight: Weight inside of the mask; outside it is 1.
    """
    weights = 1 + (weight - 1) * mask
    return (weights * (predicted.float() - target) ** 2).flatten(1).mean(1)


def emptied_rows(rows: int, drops: Sequence[float], generator: Generator) -> tuple[Tensor, Tensor]:
    """Return in which rows the characters are emptied and in which the instruction, each bool (B,).

    Guidance subtracts predictions for empty conditions, which are therefore trained.

    Args:
        rows: Rows of a batch, B.
        drops: Shares of rows in which both conditions, the characters alone or the instruction alone are emptied.
        generator: Source of the draws, on the CPU.
    """
    drawn = torch.rand(rows, generator=generator)
    both, first, second = (sum(drops[: n + 1]) for n in range(3))
    return drawn < first, (drawn < both) | ((drawn >= first) & (drawn < second))


def training_loss(
    network: Network,
    batch: Batch,
    alphas: Tensor,
    generator: Generator,
    *,
    drops: Sequence[float] = (0.1, 0.05, 0.05),
) -> Tensor:
    """Return the loss of a batch: of the prediction, and of the letter widths if there is a layout.

    Timesteps are stratified over the batch.

    Args:
        network: The network.
        batch: Lines.
        alphas: `alphas_cumprod` of the scheduler, (1000,).
        generator: Draws timesteps, noise and emptied conditions, on the CPU.
        drops: Shares of emptied rows, as in `emptied_rows`.
    """
    rows, device = len(batch.images), batch.images.device
    clean = network.codec.encode(batch.images)
    strata = (
        torch.randperm(rows, generator=generator) + torch.rand(rows, generator=generator)
    ) / rows
    t = (strata * len(alphas)).long().clamp(max=len(alphas) - 1)
    noise = torch.randn(clean.shape, generator=generator).to(device)
    no_characters, no_instructions = (
        row.to(device) for row in emptied_rows(rows, drops, generator)
    )
    inputs = network.inputs(
        batch.images, batch.mask, batch.texts.dropped(no_characters, no_instructions), batch.place, edges=batch.edges
    )  # fmt: skip
    signal = alphas[t].view(-1, 1, 1, 1).sqrt().to(clean)
    sigma = (1 - alphas[t]).view(-1, 1, 1, 1).sqrt().to(clean)
    predicted = network(signal * clean + sigma * noise, t.to(device), inputs)
    mask = network.codec.weights(batch.mask)
    if network.config.prediction == "sample":
        weight = (1 / sigma.view(-1) ** 2).clamp(max=_LARGEST_WEIGHT)
        loss = (weight * masked_error(predicted, clean, mask)).mean()
    else:
        loss = masked_error(predicted, signal * noise - sigma * clean, mask).mean()
    if inputs.logits is not None:
        with_text = (~no_characters).float()
        divergence, difference = layout_loss(
            inputs.logits, batch.edges, batch.place.baseline - batch.place.capital
        )  # fmt: skip
        loss = loss + ((divergence + 0.1 * difference) * with_text).sum() / with_text.sum().clamp(
            min=1
        )
    return loss


@torch.no_grad()
def sample(
    network: Network,
    images: Tensor,
    mask: Tensor,
    texts: Texts,
    place: Place,
    *,
    steps: int,
    guidance: Guidance,
    noise: Tensor,
    solver: str = "ddim",
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """Return lines with the words written under the mask, RGB in [-1, 1], (B, 3, H, W).

    What is beside the mask is redrawn roughly and belongs to the caller's picture.

    Args:
        network: The network, in evaluation mode.
        images: Lines, RGB in [-1, 1], (B, 3, H, W).
        mask: 1 where the word is to be written, (B, 1, H, W).
        texts: Words and instructions.
        place: Where the words stand.
        steps: Denoising steps.
        guidance: Scales.
        noise: Initial latents, (B, C, h, w).
        solver: `"ddim"` or `"dpm"`, see `overpaint.model.sampling`.
        on_step: Called after each step with the number of finished steps.
    """
    model = _Guided(network, images, mask, texts, place, guidance)
    empty = noise.new_zeros(len(noise), 1, 1)
    latents = denoise(
        model, noise, empty, empty, steps=steps, guidance_scale=1.0, scheduler=make_scheduler(model, solver),
        on_step=None if on_step is None else lambda done, _: on_step(done),
    )  # fmt: skip
    return network.codec.decode(latents).clamp(-1, 1)


class _Guided:
    """A network with fixed inputs, as `overpaint.model.sampling.denoise` needs it; it applies the guidance itself."""

    def __init__(
        self,
        network: Network,
        images: Tensor,
        mask: Tensor,
        texts: Texts,
        place: Place,
        guidance: Guidance,
    ) -> None:
        self.network, self.guidance = network, guidance
        self.scheduler = scheduler(network.config.prediction)
        off = torch.zeros(len(images), dtype=torch.bool, device=images.device)
        self.is_split = guidance.spelling != guidance.style
        is_guided = self.is_split or guidance.spelling != 1
        kinds = [(off, off)] + [(~off, ~off)] * is_guided + [(off, ~off)] * self.is_split
        passes = [network.inputs(images, mask, texts.dropped(*kind), place) for kind in kinds]
        self.inputs, self.passes = _joined(passes), len(passes)

    def noise_pred(self, latents: Tensor, t: Tensor, prompt_embeds: Tensor) -> Tensor:
        """Return the guided prediction, shape of `latents`; `prompt_embeds` is not used."""
        repeated = latents.repeat(self.passes, 1, 1, 1)
        predictions = self.network(repeated, t, self.inputs).float().chunk(self.passes)
        if self.passes == 1:
            return predictions[0]
        full, empty = predictions[:2]
        spelt = predictions[2] if self.is_split else full
        return (
            empty + self.guidance.spelling * (spelt - empty) + self.guidance.style * (full - spelt)
        )


def _joined(passes: Sequence[Inputs]) -> Inputs:
    """Return the inputs of several passes as one batch."""

    def join(parts: Sequence[Tensor | None]) -> Tensor | None:
        tensors = [part for part in parts if part is not None]
        return torch.cat(tensors) if tensors else None

    first = passes[0].conditions
    conditions = Conditions(
        join([p.conditions.instructions for p in passes]),
        join([p.conditions.characters for p in passes]),
        {n: torch.cat([p.conditions.bias[n] for p in passes]) for n in first.bias},
        first.aspect,
    )
    return Inputs(torch.cat([p.fixed for p in passes]), conditions, None, None)
