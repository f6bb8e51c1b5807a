r"""What the denoiser is told of two pictures: an initial flow, the cost around it, and how far to trust it.

The diffused variable is the flow divided by the side of its grid, so that 1 is a whole picture whatever the size.

Source: Nam et al., 2024 (DiffMatch), https://arxiv.org/abs/2305.19094, sections 4.2 and 4.4.
Deviations: four further channels (`Config.hints`); one convention of the corners (`Config.align_corners`); the finer
stage reads features of a quarter of the picture's size, not of half.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from overpaint.match import correlation
from overpaint.match.flow import resize

__all__ = [
    "Conditions",
    "Config",
    "Features",
    "coarse_conditions",
    "coarse_of",
    "describe",
    "fine_conditions",
    "fine_of",
]


@dataclass(frozen=True)
class Config:
    """A matcher's sizes and switches; the defaults are those of the one that ships.

    Attributes:
        image: Side that both pictures are resized to, whatever their aspect; a multiple of 32.
        grid: Side of the coarse flow; an eighth of `image`.
        channels: Widths of the coarse U-Net's levels; multiples of `groups`.
        layers: ResNet blocks a level.
        attention: The largest side at which the coarse U-Net attends.
        sr_grid: Side of the fine flow.
        sr_channels: Widths of the fine U-Net's levels.
        sr_layers: ResNet blocks a level.
        sr_attention: The largest side at which the fine U-Net attends.
        head_width: Channels of an attention head.
        groups: Of the group normalisation.
        radius: Of the windows of local cost, in cells.
        steps: Noise levels T.
        flow_scale: What the diffused flow is multiplied by. At 1, the paper's, noise drowns the flow at nearly every
            level: flows are a tenth of a picture.
        backbone: `"xfeat"` or `"vgg16"`.
        residual: Whether the network's output is added to the initial flow.
        local: Whether the network sees the local cost.
        hints: Whether it sees four channels more: best cosine, trust, and the place in the picture, x and y.
        diffusion: Whether there is noise at all. Without, the network answers once: a control.
        robust: Whether the loss is a root of the squared error, not the square.
        align_corners: Whether flows are resized as the reference code does, half a cell off at the borders.
    """

    image: int = 256
    grid: int = 32
    channels: tuple[int, ...] = (48, 80, 128)
    layers: int = 1
    attention: int = 16
    sr_grid: int = 64
    sr_channels: tuple[int, ...] = (32, 64, 96)
    sr_layers: int = 1
    sr_attention: int = 16
    head_width: int = 16
    groups: int = 16
    radius: int = 4
    steps: int = 5
    flow_scale: float = 4.0
    backbone: str = "xfeat"
    residual: bool = True
    local: bool = True
    hints: bool = True
    diffusion: bool = True
    robust: bool = True
    align_corners: bool = False

    @classmethod
    def tiny(cls) -> "Config":
        """Return the one that trains on two CPU cores: a flow of 32x32, refined to 64x64."""
        return cls()

    @classmethod
    def smoke(cls) -> "Config":
        """Return the smallest that still has every part, for tests."""
        return cls(image=128, grid=16, channels=(16, 32), sr_grid=32, sr_channels=(16, 32))

    @classmethod
    def base(cls) -> "Config":
        """Return the one for a GPU: a flow of 64x64 from pictures of 512x512, refined to 128x128."""
        return cls(
            image=512, grid=64, channels=(64, 128, 192, 256), layers=2, sr_grid=128,
            sr_attention=32, head_width=32, groups=32,
        )  # fmt: skip

    @classmethod
    def full(cls) -> "Config":
        """Return the paper's: two U-Nets of 121 million parameters on VGG-16, a flow of 256x256."""
        widths = (128, 256, 384, 512)
        return cls(
            image=512, grid=64, channels=widths, layers=3, sr_grid=256, sr_channels=widths,
            sr_layers=3, sr_attention=64, head_width=128, groups=32, flow_scale=1.0,
            backbone="vgg16", hints=False, robust=False, align_corners=True,
        )  # fmt: skip

    @property
    def stacked(self) -> int:
        """Channels of `Conditions.stack`."""
        return (2 * self.radius + 1) ** 2 + 4 * self.hints


@dataclass(frozen=True, eq=False)
class Conditions:
    """What the denoiser is told.

    Attributes:
        initial: The initial flow over the side of its grid, shape (B, 2, g, g).
        stack: Local cost around it, then the hints, shape (B, C, g, g).
    """

    initial: Tensor
    stack: Tensor


@dataclass(frozen=True, eq=False)
class Features:
    """A picture's features, at unit length.

    Attributes:
        coarse: Shape (B, C, grid, grid).
        fine: Shape (B, C, sr_grid, sr_grid).
    """

    coarse: Tensor
    fine: Tensor


def describe(backbone: nn.Module, config: Config, images: Tensor) -> Features:
    """Return the features of pictures (B, 3, image, image), RGB in [0, 1], without gradients.

    XFeat's fine features are the two maps beside each other, each of unit length: a quarter of the size tells where,
    an eighth tells what.
    """
    with torch.no_grad():
        coarse, fine = backbone(images)
        size = (config.sr_grid, config.sr_grid)
        if config.backbone == "xfeat":
            fine = torch.cat(
                [correlation.unit(_at(fine, size)), correlation.unit(_at(coarse, size))], 1
            )
        coarse = correlation.unit(_at(coarse, (config.grid, config.grid)))
        return Features(coarse, correlation.unit(_at(fine, size)))


def coarse_of(
    config: Config, source: Features, target: Features, flow: Tensor | None = None
) -> Conditions:
    """Return what the coarse stage is told.

    Args:
        config: The matcher's.
        source: Of the picture that the flow points into.
        target: Of the picture that the flow is on.
        flow: An initial flow over the side of its grid, (B, 2, grid, grid); without it, each place's most alike one.

    Returns:
        Its hints are the cosine with the most alike place, and :math:`e^{-c / 2}` with the cycle error c in cells.
    """
    with torch.no_grad():
        volume = correlation.global_cost(source.coarse, target.coarse)
        initial = correlation.initial_flow(volume) if flow is None else flow.float() * config.grid
        window = correlation.slice_cost(volume, initial, config.radius)
        trust = torch.exp(-correlation.cycle_error(volume) / 2)
        return _conditions(config, initial, window, correlation.max_cosine(volume), trust)


def fine_of(config: Config, source: Features, target: Features, flow: Tensor) -> Conditions:
    """Return what the fine stage is told.

    Args:
        config: The matcher's.
        source: Of the picture that the flow points into.
        target: Of the picture that the flow is on.
        flow: The coarse stage's, over the side of its grid, any side, shape (B, 2, g, g).

    Returns:
        Its hints are the best cosine of the window, and the cosine where the flow points.
    """
    with torch.no_grad():
        side = config.sr_grid
        cells = flow.float() * flow.shape[-1]
        initial = resize(cells, (side, side), align_corners=config.align_corners)
        window = correlation.local_cost(source.fine, target.fine, initial, config.radius)
        middle = window.shape[1] // 2
        best, here = window.amax(1, keepdim=True), window[:, middle : middle + 1]
        return _conditions(config, initial, window, best, here)


def coarse_conditions(
    backbone: nn.Module, config: Config, source: Tensor, target: Tensor
) -> Conditions:
    """Return what the coarse stage is told of pictures (B, 3, image, image), RGB in [0, 1]."""
    return coarse_of(config, describe(backbone, config, source), describe(backbone, config, target))


def fine_conditions(
    backbone: nn.Module, config: Config, source: Tensor, target: Tensor, flow: Tensor
) -> Conditions:
    """Return what the fine stage is told of pictures (B, 3, image, image) and a coarse flow, over its side."""
    return fine_of(
        config, describe(backbone, config, source), describe(backbone, config, target), flow
    )


def _conditions(
    config: Config, initial: Tensor, window: Tensor, best: Tensor, trust: Tensor
) -> Conditions:
    stack = window if config.local else torch.zeros_like(window)
    if config.hints:
        b, _, h, w = initial.shape
        y = torch.linspace(-1, 1, h, device=initial.device).view(1, 1, h, 1).expand(b, 1, h, w)
        x = torch.linspace(-1, 1, w, device=initial.device).view(1, 1, 1, w).expand(b, 1, h, w)
        stack = torch.cat([stack, best, trust, x, y], 1)
    return Conditions(initial / initial.shape[-1], stack)


def _at(features: Tensor, size: tuple[int, int]) -> Tensor:
    if features.shape[2:] == size:
        return features
    return F.interpolate(features, size, mode="bilinear", align_corners=False)
