r"""Inputs of the denoiser: an initial flow, the cost around it, and channels with its reliability.

The diffused variable is the flow divided by the side of its grid, so that 1 is the whole picture at any size.

Source: Nam et al., 2024 (DiffMatch), https://arxiv.org/abs/2305.19094, sections 4.2 and 4.4.
Deviations: four further channels (`Config.hints`); one convention of the corners (`Config.align_corners`); the fine
stage reads features of a quarter of the picture's size, not of half.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from overpaint.match import correlation
from overpaint.match.config import Config
from overpaint.match.flow import resize

__all__ = ["Conditions", "Features", "coarse_conditions", "extract_features", "fine_conditions"]


@dataclass(frozen=True, eq=False)
class Conditions:
    """Inputs of the denoiser beside the noisy flow.

    Attributes:
        initial: The initial flow over the side of its grid, shape (B, 2, g, g).
        stack: Local cost around it, then the four hints, shape (B, C, g, g).
    """

    initial: Tensor
    stack: Tensor


@dataclass(frozen=True, eq=False)
class Features:
    """Features of pictures, at unit length over the channels.

    Attributes:
        coarse: Shape (B, C, grid, grid).
        fine: Shape (B, C, sr_grid, sr_grid).
    """

    coarse: Tensor
    fine: Tensor


def extract_features(backbone: nn.Module, config: Config, images: Tensor) -> Features:
    """Return the features of pictures (B, 3, image, image), RGB in [0, 1], without gradients.

    For XFeat the fine features are two maps concatenated, each at unit length: the map at a quarter of the size
    localises, the map at an eighth discriminates.
    """
    with torch.no_grad():
        coarse, fine = backbone(images)
        size = (config.sr_grid, config.sr_grid)
        if config.backbone == "xfeat":
            maps = (correlation.normalise(_resized(x, size)) for x in (fine, coarse))
            fine = torch.cat(list(maps), 1)
        coarse = correlation.normalise(_resized(coarse, (config.grid, config.grid)))
        return Features(coarse, correlation.normalise(_resized(fine, size)))


def coarse_conditions(
    config: Config, source: Features, target: Features, flow: Tensor | None = None
) -> Conditions:
    """Return the inputs of the coarse stage.

    Args:
        config: The matcher's configuration.
        source: Features of the picture that the flow points into.
        target: Features of the picture whose grid the flow is on.
        flow: An initial flow over the side of its grid, (B, 2, grid, grid); by default each cell points to the most
            similar cell of the source.

    Returns:
        The hints are the cosine with the most similar cell, and :math:`e^{-c / 2}` with the cycle error c in cells.
    """
    with torch.no_grad():
        volume = correlation.global_cost(source.coarse, target.coarse)
        initial = correlation.initial_flow(volume) if flow is None else flow.float() * config.grid
        window = correlation.slice_cost(volume, initial, config.radius)
        trust = torch.exp(-correlation.cycle_error(volume) / 2)
        return _conditions(config, initial, window, correlation.max_cosine(volume), trust)


def fine_conditions(config: Config, source: Features, target: Features, flow: Tensor) -> Conditions:
    """Return the inputs of the fine stage.

    Args:
        config: The matcher's configuration.
        source: Features of the picture that the flow points into.
        target: Features of the picture whose grid the flow is on.
        flow: The coarse stage's flow over the side of its grid, any side, shape (B, 2, g, g).

    Returns:
        The hints are the best cosine of the window, and the cosine at the cell that the flow points to.
    """
    with torch.no_grad():
        side = config.sr_grid
        cells = flow.float() * flow.shape[-1]
        initial = resize(cells, (side, side), align_corners=config.align_corners)
        window = correlation.local_cost(source.fine, target.fine, initial, config.radius)
        middle = window.shape[1] // 2
        best, centre = window.amax(1, keepdim=True), window[:, middle : middle + 1]
        return _conditions(config, initial, window, best, centre)


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


def _resized(features: Tensor, size: tuple[int, int]) -> Tensor:
    if features.shape[2:] == size:
        return features
    return F.interpolate(features, size, mode="bilinear", align_corners=False)
