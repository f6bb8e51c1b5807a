"""Latents of pictures, without the noise of the encoder's distribution."""

from typing import Any

import torch
from torch import Tensor

__all__ = ["encode"]


@torch.no_grad()
def encode(model: Any, images: Tensor) -> Tensor:
    """Return the latents of pictures: the mean of the encoder's distribution, as `TextToImage.decode` reads them.

    Args:
        model: A `TextToImage`.
        images: RGB in [0, 1], shape (R, 3, H, W); sides are multiples of the autoencoder's factor.

    Returns:
        float32 or float64, shape (R, C, h, w), on the model's device. SDXL's encoder is cast to float32 for this call
        if its weights are float16, as its decoder is.
    """
    vae, config = model.vae, model.vae.config
    shift = getattr(config, "shift_factor", None) or 0.0
    upcast = len(model.text_encoders) == 2 and vae.dtype == torch.float16 and config.force_upcast
    try:
        if upcast:
            vae.to(torch.float32)
        pixels = (images * 2 - 1).to(model.device, vae.dtype)
        mean = vae.encode(pixels).latent_dist.mean
    finally:
        if upcast:
            vae.to(torch.float16)
    return (mean.to(torch.promote_types(mean.dtype, torch.float32)) - shift) * config.scaling_factor
