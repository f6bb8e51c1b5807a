r"""Latents of a line of lettering: a quarter of its height and width, in one of three forms.

- `"luma"`: 16 channels of luma by pixel unshuffle, and 4 + 4 of the two chroma planes at half size (JPEG's YCbCr).
  Luma is kept without loss; letters are read by it.
- `"rgb"`: 48 channels of all pixels by pixel unshuffle.
- `"autoencoder"`: latents of a small trained autoencoder.

Source: ITU-T T.871 for :math:`Y, C_b, C_r`.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Autoencoder", "LumaCodec", "RgbCodec", "make_codec"]

_LUMA = (0.299, 0.587, 0.114)


class LumaCodec(nn.Module):
    """Luma and half-size chroma."""

    def encode(self, images: Tensor) -> Tensor:
        """Return latents (B, 24, H / 4, W / 4) of RGB images (B, 3, H, W) in [-1, 1]."""
        red, green, blue = images.unbind(1)
        luma = _LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue
        chroma = torch.stack([(blue - luma) * 0.564, (red - luma) * 0.713], 1)
        small = F.pixel_unshuffle(F.avg_pool2d(chroma, 2), 2)
        return torch.cat([F.pixel_unshuffle(luma[:, None], 4), small], 1)

    def decode(self, latents: Tensor) -> Tensor:
        """Return RGB images of latents, the inverse of `encode` up to the resolution of chroma."""
        luma = F.pixel_shuffle(latents[:, :16], 4)[:, 0]
        small = F.pixel_shuffle(latents[:, 16:], 2)
        chroma = F.interpolate(small, scale_factor=2, mode="bilinear", align_corners=False)
        blue, red = luma + chroma[:, 0] / 0.564, luma + chroma[:, 1] / 0.713
        green = (luma - _LUMA[0] * red - _LUMA[2] * blue) / _LUMA[1]
        return torch.stack([red, green, blue], 1)

    def weights(self, mask: Tensor) -> Tensor:
        """Return the share of mask under each latent, (B, 24, H / 4, W / 4), of a mask (B, 1, H, W)."""
        small = F.pixel_unshuffle(F.avg_pool2d(mask, 2), 2)
        return torch.cat([F.pixel_unshuffle(mask, 4), small, small], 1)


class RgbCodec(nn.Module):
    """All pixels."""

    def encode(self, images: Tensor) -> Tensor:
        """Return latents (B, 48, H / 4, W / 4) of RGB images (B, 3, H, W) in [-1, 1]."""
        return F.pixel_unshuffle(images, 4)

    def decode(self, latents: Tensor) -> Tensor:
        """Return RGB images of latents, the inverse of `encode`."""
        return F.pixel_shuffle(latents, 4)

    def weights(self, mask: Tensor) -> Tensor:
        """Return the share of mask under each latent, (B, 48, H / 4, W / 4), of a mask (B, 1, H, W)."""
        return F.pixel_unshuffle(mask, 4).repeat(1, 3, 1, 1)


class Autoencoder(nn.Module):
    """A small convolutional autoencoder, trained before the rest and then frozen."""

    def __init__(self, channels: int, width: int = 48) -> None:
        super().__init__()
        self.channels = channels
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(2), nn.Conv2d(12, width, 3, padding=1), _Residual(width),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1), _Residual(2 * width), _Residual(2 * width),
            nn.Conv2d(2 * width, channels, 1),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.Conv2d(channels, 2 * width, 3, padding=1), _Residual(2 * width), _Residual(2 * width),
            nn.Conv2d(2 * width, 4 * width, 3, padding=1), nn.PixelShuffle(2), _Residual(width),
            nn.Conv2d(width, 12, 3, padding=1), nn.PixelShuffle(2),
        )  # fmt: skip
        self.register_buffer("scale", torch.ones(channels))
        self.register_buffer("shift", torch.zeros(channels))

    scale: Tensor
    shift: Tensor

    def encode(self, images: Tensor) -> Tensor:
        """Return latents (B, C, H / 4, W / 4) of RGB images (B, 3, H, W) in [-1, 1], with mean 0 and deviation 1/2."""
        return (self.encoder(images) - self.shift.view(1, -1, 1, 1)) * self.scale.view(1, -1, 1, 1)

    def decode(self, latents: Tensor) -> Tensor:
        """Return RGB images of latents."""
        return self.decoder(latents / self.scale.view(1, -1, 1, 1) + self.shift.view(1, -1, 1, 1))

    def weights(self, mask: Tensor) -> Tensor:
        """Return the share of mask under each latent, (B, C, H / 4, W / 4), of a mask (B, 1, H, W)."""
        return F.avg_pool2d(mask, 4).repeat(1, self.channels, 1, 1)

    @torch.no_grad()
    def normalise(self, images: Tensor) -> None:
        """Set scale and shift so that the latents of `images` have mean 0 and standard deviation 1/2."""
        latents = self.encoder(images)
        self.shift.copy_(latents.mean((0, 2, 3)))
        self.scale.copy_(0.5 / latents.std((0, 2, 3)).clamp(min=1e-3))


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Return the input plus two convolutions of it."""
        return x + self.net(x)


def make_codec(name: str, latent_channels: int) -> Any:
    """Return the codec `name`, one of `config.CODECS`."""
    if name == "autoencoder":
        return Autoencoder(latent_channels)
    return LumaCodec() if name == "luma" else RgbCodec()
