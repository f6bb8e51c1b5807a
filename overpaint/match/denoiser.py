r"""Diffusion of flows: the denoiser, its training loss and its sampler.

At level t of T the flow :math:`x_0` (over the side of its grid, times `Config.flow_scale`) becomes
:math:`x_t = \sqrt{\bar\alpha_t} x_0 + \sqrt{1 - \bar\alpha_t} \epsilon`. A U-Net reads it beside the conditions and
predicts :math:`x_0` as a residual to the initial flow. Several samples differ where the pictures are ambiguous: their
mean is the estimate, their spread its uncertainty.

Source: Nam et al., 2024 (DiffMatch), https://arxiv.org/abs/2305.19094, section 4; Nichol and Dhariwal, 2021,
https://arxiv.org/abs/2102.09672, equation 17 (noise levels); Song et al., 2021 (DDIM),
https://arxiv.org/abs/2010.02502, equation 12, with eta 0.
Deviations: flow scale 4, a robust loss, a weight of 0.1 for pixels without a match, hints among the conditions; all
but the third are switches of `Config`. Sampling with fewer steps than T starts from the noisiest level.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from overpaint.match.conditioning import Conditions
from overpaint.match.config import Config

__all__ = ["Denoiser", "alpha_bar", "sample", "training_loss", "visited_levels"]

_CELLS = 2**15  # cells of all flows in a batch, so that large flows fit into memory


def alpha_bar(steps: int) -> Tensor:
    """Return the signal variance at each of `steps` noise levels, float64: a cosine, betas at most 0.999."""
    share = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)]
    betas = [min(1 - b / a, 0.999) for a, b in zip(share, share[1:], strict=False)]
    return torch.cumprod(1 - torch.tensor(betas, dtype=torch.float64), 0)


class Denoiser(nn.Module):
    """A U-Net that predicts a flow. Untrained, it predicts the initial flow.

    Args:
        config: The matcher's configuration.
        stage: `"coarse"` or `"fine"`: selects the sizes.
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
        """Return the predicted flow without noise, times `flow_scale`, shape (B, 2, g, g).

        Args:
            noisy: The noisy flow, times `flow_scale`, shape (B, 2, g, g).
            level: The noise level t, 0 to T - 1: one for the batch, or one for each row, (B,).
            conditions: Inputs computed from the pictures.
        """
        initial = conditions.initial * self.config.flow_scale
        if not self.config.diffusion:
            noisy = torch.zeros_like(noisy)
        inputs = torch.cat([noisy, initial, conditions.stack], 1)
        time = torch.as_tensor(level, device=noisy.device) * (1000 / self.config.steps)
        output = self.unet(inputs, time.expand(len(inputs))).sample
        return output + initial if self.config.residual else output


def training_loss(
    denoiser: Denoiser,
    conditions: Conditions,
    truth: Tensor,
    valid: Tensor,
    generator: torch.Generator,
    *,
    invalid: float = 0.1,
) -> Tensor:
    r"""Return the error of the predicted flow, at a random noise level for each pair.

    The mean of :math:`\sqrt{e^2 + 10^{-4}}` over cells and channels, or of :math:`e^2` if `config.robust` is off; e is
    in units of the diffused variable.

    Args:
        denoiser: The network, with gradients.
        conditions: Inputs for B pairs.
        truth: The flow over the side of its grid, shape (B, 2, g, g).
        valid: Mask of the cells that have a match, shape (B, 1, g, g), bool.
        generator: Draws levels and noise, on the CPU.
        invalid: Weight of a cell without a match; a small weight makes the field continue smoothly there.
    """
    config = denoiser.config
    flow = truth * config.flow_scale
    last = config.steps - 1
    level = torch.randint(config.steps, (len(flow),), generator=generator).to(flow.device)
    noise = torch.randn(flow.shape, generator=generator).to(flow)
    if not config.diffusion:
        level = torch.full_like(level, last)
    share = alpha_bar(config.steps).to(flow)[level].view(-1, 1, 1, 1)
    predicted = denoiser(share.sqrt() * flow + (1 - share).sqrt() * noise, level, conditions)
    error = (predicted - flow) ** 2
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
    """Return sampled flows, drawn by deterministic DDIM.

    Args:
        denoiser: The network.
        conditions: Inputs for B pairs.
        samples: Number of flows for each pair. The first ones do not depend on `samples`, except for rounding.
        steps: Denoising steps, starting at the noisiest level, 1 to T; T by default.
        generator: Draws the noise, on the CPU; by default one with seed 0.

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
            f"`steps` must be 1 to {config.steps}, got {steps}: "
            f"the matcher was trained with {config.steps} noise levels."
        )
    generator = generator or torch.Generator().manual_seed(0)
    initial = conditions.initial
    with torch.no_grad():
        if not config.diffusion:
            flow = denoiser(torch.zeros_like(initial), config.steps - 1, conditions)
            return (flow / config.flow_scale).clamp(-1, 1).expand(samples, *flow.shape).clone()
        noise = [
            torch.randn(initial.shape, generator=generator).to(initial) for _ in range(samples)
        ]
        flows = []
        size = max(1, _CELLS // initial[:, 0].numel())
        for batch in (noise[i : i + size] for i in range(0, samples, size)):
            repeated = Conditions(
                initial.repeat(len(batch), 1, 1, 1), conditions.stack.repeat(len(batch), 1, 1, 1)
            )
            drawn = _denoise(denoiser, torch.cat(batch), repeated, steps)
            flows += drawn.split(len(initial))
        return (torch.stack(flows) / config.flow_scale).clamp(-1, 1)


def visited_levels(total: int, steps: int) -> list[int]:
    """Return the noise levels of `steps` steps, noisiest first: evenly spaced from the last of `total`."""
    return [math.ceil(total - i * total / steps) - 1 for i in range(steps)]


def _denoise(denoiser: Denoiser, noisy: Tensor, conditions: Conditions, steps: int) -> Tensor:
    """Return the flows that DDIM reaches from `noisy`, times `flow_scale`."""
    share = alpha_bar(denoiser.config.steps).tolist()
    visited = visited_levels(denoiser.config.steps, steps)
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

    has_attention = [side >> i <= attention for i in range(len(widths))]
    return UNet2DModel(
        sample_size=side,
        in_channels=4 + config.stack_channels,
        out_channels=2,
        layers_per_block=layers,
        block_out_channels=widths,
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in has_attention),
        up_block_types=tuple(
            "AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(has_attention)
        ),
        attention_head_dim=config.head_width,
        norm_num_groups=config.groups,
        resnet_time_scale_shift="scale_shift",
    )
