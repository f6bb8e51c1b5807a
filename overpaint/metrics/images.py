r"""Distances between pictures drawn from one prompt and seed, before and after: PSNR, SSIM, and one on deep features.

All take pairs of pictures, RGB in [0, 1], shape (B, 3, H, W), and return one number for each pair, float64, shape (B,).

Source: Wang et al., 2004 (SSIM), https://doi.org/10.1109/TIP.2003.819861, computed by torchmetrics; Zhang et al., 2018
(LPIPS), https://arxiv.org/abs/1801.03924, equation 1.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from overpaint.errors import MissingExtra

__all__ = ["perceptual", "psnr", "ssim"]


def psnr(images_a: Tensor, images_b: Tensor) -> Tensor:
    r"""Return the peak signal-to-noise ratio of each pair in dB, :math:`-10 \log_{10}` of the mean squared error.

    Infinite for equal pictures.

    Raises:
        ValueError: The shapes differ.
    """
    a, b = _pairs(images_a, images_b)
    return -10 * torch.log10(((a - b) ** 2).mean((1, 2, 3)))


def ssim(images_a: Tensor, images_b: Tensor) -> Tensor:
    """Return the structural similarity of each pair, in [-1, 1]: 1 for equal pictures.

    Computed for each channel with a Gaussian window of standard deviation 1.5 and 11x11 pixels, population covariances
    and the constants 0.01 and 0.03, and averaged over the positions where the whole window lies inside the picture, as
    in scikit-image. By default torchmetrics also averages over mirrored borders, which changes the mean by up to 0.1
    on 64x64 pixels.

    Raises:
        ValueError: The shapes differ, or a side is shorter than the window.
        MissingExtra: torchmetrics is not installed.
    """
    a, b = _pairs(images_a, images_b)
    if min(a.shape[2:]) < 11:
        raise ValueError(
            f"SSIM has a window of 11x11 pixels, got pictures of {a.shape[2]}x{a.shape[3]}: give larger ones."
        )
    try:
        from torchmetrics.functional import image
    except ImportError as error:
        raise MissingExtra(
            "SSIM needs torchmetrics. Install it with: pip install torchmetrics."
        ) from error
    measure: Any = image.structural_similarity_index_measure
    _, local = measure(a, b, data_range=1.0, reduction="none", return_full_image=True)
    return local[..., 5:-5, 5:-5].mean((1, 2, 3))


def perceptual(layers_a: Sequence[Tensor], layers_b: Sequence[Tensor]) -> Tensor:
    r"""Return the unweighted LPIPS distance of each pair on the layers of any network; 0 for equal pictures.

    :math:`\sum_l \frac{1}{P_l} \sum_p |\hat f_{lp} - \hat g_{lp}|^2` with unit features :math:`\hat f_{lp}` of layer
    :math:`l` at position :math:`p`; each layer adds between 0 and 4.

    Args:
        layers_a: Features of the first pictures at each layer, shape (B, P, D), for P positions.
        layers_b: Features of the second pictures.

    Raises:
        ValueError: The shapes differ.

    Deviations: no learned weights for the channels, so that any network can be used. Values do not compare with
    published LPIPS.
    """
    shapes_a, shapes_b = ([tuple(x.shape) for x in layers] for layers in (layers_a, layers_b))
    if not shapes_a or shapes_a != shapes_b or any(len(s) != 3 for s in shapes_a):
        raise ValueError(
            f"layers must have the same shapes (B, P, D), got {shapes_a} and {shapes_b}: "
            "pass both pictures through one network."
        )
    total = torch.zeros(shapes_a[0][0], dtype=torch.float64)
    for a, b in zip(layers_a, layers_b, strict=True):
        difference = F.normalize(a.double(), dim=2) - F.normalize(b.double(), dim=2)
        total += (difference**2).sum(2).mean(1).cpu()
    return total


def _pairs(images_a: Tensor, images_b: Tensor) -> tuple[Tensor, Tensor]:
    if images_a.ndim != 4 or images_a.shape != images_b.shape:
        raise ValueError(
            f"pictures must have the same shape (B, 3, H, W), got {tuple(images_a.shape)} and "
            f"{tuple(images_b.shape)}: draw both from the same prompts and seeds."
        )
    return images_a.double(), images_b.double()
