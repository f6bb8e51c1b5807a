"""Convert a path, PIL image, array or tensor to a picture tensor."""

import os
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from overpaint.files import user_path

__all__ = ["LIMIT", "SMALLEST", "load_picture"]

LIMIT = 60_000_000  # pixels
SMALLEST = 8  # pixels of a side


def load_picture(image: Any, name: str) -> Tensor:
    """Return a picture as RGB in [0, 1], float32, shape (1, 3, H, W).

    Args:
        image: A path; a PIL image, grey or colored, with or without a palette; an array (H, W), (H, W, 1), (H, W, 3)
            or (H, W, 4); or a tensor with channels first, with or without a batch dimension of 1. The dtype of arrays
            and tensors is uint8 (white is 255), uint16 (white is 65535), bool or floating point (white is 1). PIL
            images of integers are read as 16-bit ones. Grey is copied to all channels; transparent pixels are blended
            with white.
        name: Name of the picture in error messages.

    Raises:
        TypeError: `image` has another type.
        ValueError: The picture cannot be read, is too small or too large, or has values out of range.
    """
    if isinstance(image, str | os.PathLike):
        pixels = _from_file(user_path(image, name), name)
    elif isinstance(image, Image.Image):
        pixels = _from_open(image, name)
    elif isinstance(image, np.ndarray):
        pixels = _from_array(torch.from_numpy(_native(image)), name, last=True)
    elif isinstance(image, Tensor):
        pixels = _from_array(image.detach().cpu(), name, last=False)
    else:
        raise TypeError(
            f"`{name}` must be a path, a PIL image, an array or a tensor, got {type(image).__name__}: convert it first."
        )
    if pixels.shape[1] == 4:
        color, alpha = pixels[:, :3], pixels[:, 3:]
        pixels = color * alpha + (1 - alpha)
    return pixels.expand(-1, 3, -1, -1).contiguous()


_DAMAGED = (
    ArithmeticError, AttributeError, EOFError, LookupError, RuntimeError, TypeError, ValueError, struct.error,
    zlib.error,
)  # fmt: skip
_FORMATS = (
    "PNG",
    "JPEG",
    "WEBP",
    "TIFF",
    "BMP",
    "GIF",
    "PPM",
)  # Pillow's readers of these formats start no other program


def _from_file(path: Path, name: str) -> Tensor:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with _damage_as_os_error():
                opened = Image.open(path, formats=_FORMATS)
            with opened as image:
                return _from_pil(image, name)
    except FileNotFoundError as error:
        raise ValueError(f"`{name}`: there is no file {str(path)!r}: check the path.") from error
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"`{name}` is larger than {LIMIT // 10**6} megapixels: make it smaller first."
        ) from error
    except (OSError, SyntaxError) as error:
        raise ValueError(
            f"`{name}`: cannot read {str(path)!r} as a picture: save it as PNG or JPEG."
        ) from error


def _from_open(image: Image.Image, name: str) -> Tensor:
    """Return the pixels of an image that the caller opened; its file is read only now and may be truncated."""
    try:
        return _from_pil(image, name)
    except (OSError, SyntaxError) as error:
        raise ValueError(
            f"`{name}`: the open image cannot be read to its end ({error}): get its file again, or save it as PNG."
        ) from error


def _from_pil(image: Image.Image, name: str) -> Tensor:
    _check_size(image.height, image.width, name)
    with _damage_as_os_error():
        values = _decode(image)
    return _from_array(torch.from_numpy(values), name, last=True)


def _decode(image: Image.Image) -> np.ndarray:
    """Return the pixels of an image: floats, or bytes in one, three or four channels."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        return np.array(image)
    if image.mode.startswith("I"):  # 16 bits, in any byte order
        return np.asarray(image).astype(np.float32) / 65535
    mode = "RGBA" if image.has_transparency_data else "L" if image.mode in ("1", "L") else "RGB"
    return np.array(image.convert(mode))


@contextmanager
def _damage_as_os_error() -> Iterator[None]:
    """Raise an `OSError` for each of the errors that Pillow raises for damaged files."""
    try:
        yield
    except _DAMAGED as error:
        raise OSError(str(error) or type(error).__name__) from error


def _native(values: np.ndarray) -> np.ndarray:
    """Return the array in native byte order and contiguous, as torch requires."""
    if values.dtype.kind not in "buif" or values.dtype.itemsize > 8:
        raise TypeError(
            f"an array must hold numbers of at most 64 bits, got {values.dtype}: convert it first."
        )
    return np.ascontiguousarray(values.astype(values.dtype.newbyteorder("=")))


def _from_array(values: Tensor, name: str, *, last: bool) -> Tensor:
    """Return an array (channels last) or tensor (channels first) as float32 in [0, 1], shape (1, C, H, W)."""
    shape = tuple(values.shape)
    if not last and values.ndim == 4 and len(values) == 1:
        values = values[0]
    if values.ndim == 2:
        values = values[None]
    elif last and values.ndim == 3:
        values = values.permute(2, 0, 1)
    if values.ndim != 3 or len(values) not in (1, 3, 4):
        shapes = "(H, W), (H, W, 3) or (H, W, 4)" if last else "(3, H, W), (1, H, W) or (4, H, W)"
        raise ValueError(f"`{name}` must have shape {shapes}, got {shape}: give one picture.")
    _check_size(values.shape[1], values.shape[2], name)
    if values.dtype == torch.uint8:
        return values[None].float().div_(255)
    if values.dtype == torch.uint16:
        return values[None].float().div_(65535)
    if values.dtype == torch.bool:
        return values[None].float()
    if not values.is_floating_point():
        raise ValueError(
            f"`{name}` must be bytes, unsigned 16-bit numbers or floats in [0, 1], got {values.dtype}: "
            "convert it to floats, divided by the value of white."
        )
    values = values[None].float()
    low, high = values.amin().item(), values.amax().item()
    if not np.isfinite([low, high]).all():
        raise ValueError(f"`{name}` holds values that are not finite: replace or crop them first.")
    if low < -1e-3 or high > 1 + 1e-3:
        raise ValueError(
            f"`{name}` must be in [0, 1], got {low:.4g} to {high:.4g}: divide by 255, or give bytes."
        )
    return values.clamp(0, 1)


def _check_size(h: int, w: int, name: str) -> None:
    if min(h, w) < SMALLEST:
        raise ValueError(f"`{name}` is {w}x{h} pixels: each side must be at least {SMALLEST}.")
    if h * w > LIMIT:
        raise ValueError(
            f"`{name}` has {h * w / 1e6:.1f} megapixels, the limit is {LIMIT // 10**6}: make it smaller first."
        )
