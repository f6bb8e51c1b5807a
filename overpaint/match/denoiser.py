r"""The flow as the denoised variable: noise a flow, learn to give the flow back, and draw flows from noise.

At level t of T the flow :math:`x_0` (over the side of its grid, times `Config.flow_scale`) is seen as
:math:`x_t = \sqrt{\bar\alpha_t} x_0 + \sqrt{1 - \bar\alpha_t} \epsilon`. A U-Net sees it beside the conditions and
answers with the flow itself, as what to add to the initial flow. Several draws differ where the pictures leave room
for doubt: their mean is the estimate, their spread its uncertainty.

Source: Nam et al., 2024 (DiffMatch), https://arxiv.org/abs/2305.19094, section 4; Nichol and Dhariwal, 2021,
https://arxiv.org/abs/2102.09672, equation 17 (noise levels); Song et al., 2021 (DDIM),
https://arxiv.org/abs/2010.02502, equation 12, with eta 0.
Deviations: flow scale 4, a robust loss, a weight of 0.1 for places without a match, hints among the conditions; all
but the third are switches of `Config`. Fewer steps than T start from the noisiest level.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from overpaint.match.conditioning import (
    Conditions,
    Config,
    Features,
    coarse_conditions,
    coarse_of,
    describe,
    fine_conditions,
    fine_of,
)

__all__ = [
    "Conditions",
    "Config",
    "Denoiser",
    "Features",
    "alpha_bar",
    "coarse_conditions",
    "coarse_of",
    "describe",
    "fine_conditions",
    "fine_of",
    "sample",
    "training_loss",
]


_CELLS = (
    2**15
)  # of flow at a time, all draws and pairs together, so that large ones fit into memory


def alpha_bar(steps: int) -> Tensor:
    """Return the share of signal left at each of `steps` noise levels, float64: a cosine, betas at most 0.999."""
    share = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)]
    betas = [min(1 - b / a, 0.999) for a, b in zip(share, share[1:], strict=False)]
    return torch.cumprod(1 - torch.tensor(betas, dtype=torch.float64), 0)


class Denoiser(nn.Module):
    """A U-Net that answers with a flow. Untrained, it answers with the initial flow.

    Args:
        config: The matcher's.
        stage: `"coarse"` or `"fine"`: whose sizes to take.
    """

    def __init__(self, config: Config, stage: Literal["coarse", "fine"] = "coarse") -> None:
        super().__init__()
        self.config = config
        self.stage = stage
        coarse = stage == "coarse"
        self.side = config.grid if coarse else config.sr_grid
        self.unet = _unet(
            config,
            self.side,
            config.channels if coarse else config.sr_channels,
            config.layers if coarse else config.sr_layers,
            config.attention if coarse else config.sr_attention,
        )
        for parameter in self.unet.get_submodule("conv_out").parameters():
            nn.init.zeros_(parameter)

    def forward(self, noisy: Tensor, level: Tensor | int, conditions: Conditions) -> Tensor:
        """Return the flow without its noise, times `flow_scale`, shape (B, 2, g, g).

        Args:
            noisy: The noisy flow, times `flow_scale`, shape (B, 2, g, g).
            level: The noise level t, 0 to T - 1, one or of each in the batch (B,).
            conditions: What the pictures say.
        """
        initial = conditions.initial * self.config.flow_scale
        if not self.config.diffusion:
            noisy = torch.zeros_like(noisy)
        seen = torch.cat([noisy, initial, conditions.stack], 1)
        time = torch.as_tensor(level, device=noisy.device) * (1000 / self.config.steps)
        answer = self.unet(seen, time.expand(len(seen))).sample
        return answer + initial if self.config.residual else answer


def training_loss(
    denoiser: Denoiser,
    conditions: Conditions,
    truth: Tensor,
    valid: Tensor,
    generator: torch.Generator,
    *,
    invalid: float = 0.1,
) -> Tensor:
    r"""Return how far the flow that is given back is from the truth, at a random noise level a pair.

    The mean of :math:`\sqrt{e^2 + 10^{-4}}` over the places and the two channels, or of :math:`e^2` where the
    configuration asks for it; e is in units of the diffused variable.

    Args:
        denoiser: The network, with gradients.
        conditions: Of B pairs.
        truth: The flow over the side of its grid, shape (B, 2, g, g).
        valid: Where there is a match, shape (B, 1, g, g), bool.
        generator: Of levels and noise, on the CPU.
        invalid: What a place without a match weighs; a little lets the field go on smoothly there.
    """
    config = denoiser.config
    flow = truth * config.flow_scale
    last = config.steps - 1
    level = torch.randint(config.steps, (len(flow),), generator=generator).to(flow.device)
    noise = torch.randn(flow.shape, generator=generator).to(flow)
    if not config.diffusion:
        level = torch.full_like(level, last)
    share = alpha_bar(config.steps).to(flow)[level].view(-1, 1, 1, 1)
    answer = denoiser(share.sqrt() * flow + (1 - share).sqrt() * noise, level, conditions)
    error = (answer - flow) ** 2
    if config.robust:
        error = (error + 1e-4).sqrt()
    weight = torch.where(valid.bool(), 1.0, invalid).expand_as(error)
    return (error * weight).sum() / weight.sum().clamp(min=1e-6)


def sample(
    denoiser: Denoiser,
    conditions: Conditions,
    *,
    samples: int = 8,
    steps: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw flows, by DDIM without noise on the way.

    Args:
        denoiser: The network.
        conditions: Of B pairs.
        samples: How many flows a pair. The first ones do not depend on how many follow,
            but for rounding.
        steps: From the noisiest level down to the flow, 1 to T; without it T.
        generator: Of the noise, on the CPU; without it one of seed 0.

    Returns:
        Flows over the side of their grid, shape (samples, B, 2, g, g), each value in [-1, 1].

    Raises:
        ValueError: `samples` or `steps` is out of range.
    """
    config = denoiser.config
    steps = config.steps if steps is None else steps
    if samples < 1:
        raise ValueError(f"`samples` must be at least 1, got {samples}.")
    if not 1 <= steps <= config.steps:
        raise ValueError(
            f"`steps` must be 1 to {config.steps}, got {steps}: the matcher knows {config.steps} levels of noise."
        )
    generator = generator or torch.Generator().manual_seed(0)
    initial = conditions.initial
    with torch.no_grad():
        if not config.diffusion:
            answer = denoiser(torch.zeros_like(initial), config.steps - 1, conditions)
            return (answer / config.flow_scale).clamp(-1, 1).expand(samples, *answer.shape).clone()
        noise = [
            torch.randn(initial.shape, generator=generator).to(initial) for _ in range(samples)
        ]
        draws = []
        for some in _parts(noise, max(1, _CELLS // initial[:, 0].numel())):
            repeated = Conditions(
                initial.repeat(len(some), 1, 1, 1), conditions.stack.repeat(len(some), 1, 1, 1)
            )
            drawn = _descend(denoiser, torch.cat(some), repeated, steps)
            draws += drawn.split(len(initial))
        return (torch.stack(draws) / config.flow_scale).clamp(-1, 1)


def _parts(noise: list[Tensor], size: int) -> list[list[Tensor]]:
    return [noise[i : i + size] for i in range(0, len(noise), size)]


def levels(total: int, steps: int) -> list[int]:
    """Return the levels that `steps` steps visit, noisiest first: evenly spaced from the last of `total`."""
    return [math.ceil(total - i * total / steps) - 1 for i in range(steps)]


def _descend(denoiser: Denoiser, noisy: Tensor, conditions: Conditions, steps: int) -> Tensor:
    """Take one draw from noise to a flow, times `flow_scale`."""
    share = alpha_bar(denoiser.config.steps).tolist()
    visited = levels(denoiser.config.steps, steps)
    flow = noisy
    for level, following in zip(visited, [*visited[1:], None], strict=True):
        flow = denoiser(noisy, level, conditions)
        if following is not None:
            noise = (noisy - math.sqrt(share[level]) * flow) / math.sqrt(1 - share[level])
            after = share[following]
            noisy = math.sqrt(after) * flow + math.sqrt(1 - after) * noise
    return flow


def _unet(
    config: Config, side: int, widths: tuple[int, ...], layers: int, attention: int
) -> nn.Module:
    from diffusers import UNet2DModel

    attends = [side >> i <= attention for i in range(len(widths))]
    return UNet2DModel(
        sample_size=side,
        in_channels=4 + config.stacked,
        out_channels=2,
        layers_per_block=layers,
        block_out_channels=widths,
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
        attention_head_dim=config.head_width,
        norm_num_groups=config.groups,
        resnet_time_scale_shift="scale_shift",
    )
