"""A picture from anything that holds one: a path, a PIL image, an array, a tensor."""

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

__all__ = ["LIMIT", "SMALLEST", "load_picture"]

LIMIT = 60_000_000  # pixels
SMALLEST = 8  # pixels a side


def load_picture(image: Any, name: str) -> Tensor:
    """Return a picture as RGB in [0, 1], float32, shape (1, 3, H, W).

    Args:
        image: A path; a PIL image, grey or colored, with a palette or not; an array (H, W), (H, W, 1), (H, W, 3) or
            (H, W, 4); or a tensor, which has its channels first, with or without a batch of one. Arrays and tensors
            hold bytes (white is 255), unsigned 16-bit numbers (65535), booleans or floats (1), and nothing else; PIL
            images of integers count as 16-bit ones. Grey is spread over the colors; what is transparent is laid on
            white.
        name: What to call it in errors.

    Raises:
        TypeError: It is none of these.
        ValueError: It cannot be read, is too small or too large, or holds values out of range.
    """
    if isinstance(image, str | os.PathLike):
        found = _from_file(Path(image), name)
    elif isinstance(image, Image.Image):
        found = _from_open(image, name)
    elif isinstance(image, np.ndarray):
        found = _from_array(torch.from_numpy(_native(image)), name, last=True)
    elif isinstance(image, Tensor):
        found = _from_array(image.detach().cpu(), name, last=False)
    else:
        raise TypeError(
            f"`{name}` must be a path, a PIL image, an array or a tensor, got {type(image).__name__}: convert it first."
        )
    if found.shape[1] == 4:
        color, alpha = found[:, :3], found[:, 3:]
        found = color * alpha + (1 - alpha)
    return found.expand(-1, 3, -1, -1).contiguous()


_FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM")  # none that starts another program


def _from_file(path: Path, name: str) -> Tensor:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path, formats=_FORMATS) as image:
                return _from_pil(image, name)
    except FileNotFoundError as error:
        raise ValueError(f"`{name}`: there is no file {str(path)!r}: check the path.") from error
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"`{name}` is larger than {LIMIT // 10**6} megapixels: make it smaller first."
        ) from error
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(
            f"`{name}`: cannot read {str(path)!r} as a picture: save it as PNG or JPEG."
        ) from error


def _from_open(image: Image.Image, name: str) -> Tensor:
    """Read an image that the caller opened: its file is read only now, and may end too early."""
    try:
        return _from_pil(image, name)
    except (OSError, SyntaxError) as error:
        raise ValueError(
            f"`{name}`: the open image cannot be read to its end ({error}): fetch its file again, or save it as PNG."
        ) from error


def _from_pil(image: Image.Image, name: str) -> Tensor:
    _check_size(image.height, image.width, name)
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        return _from_array(torch.from_numpy(np.array(image)), name, last=True)
    if image.mode.startswith("I"):  # 16 bits, whatever the order of their bytes
        values = np.asarray(image).astype(np.float32) / 65535
        return _from_array(torch.from_numpy(values), name, last=True)
    clear = image.has_transparency_data
    mode = "RGBA" if clear else "L" if image.mode in ("1", "L") else "RGB"
    return _from_array(torch.from_numpy(np.array(image.convert(mode))), name, last=True)


def _native(values: np.ndarray) -> np.ndarray:
    """Return the array as torch can take it."""
    if values.dtype.kind not in "buif" or values.dtype.itemsize > 8:
        raise TypeError(
            f"an array must hold numbers of at most 64 bits, got {values.dtype}: convert it first."
        )
    return np.ascontiguousarray(values.astype(values.dtype.newbyteorder("=")))


def _from_array(values: Tensor, name: str, *, last: bool) -> Tensor:
    """Bring an array (channels last) or tensor (channels first) to (1, C, H, W), float32 in [0, 1]."""
    shape = tuple(values.shape)
    if not last and values.ndim == 4 and len(values) == 1:
        values = values[0]
    if values.ndim == 2:
        values = values[None]
    elif last and values.ndim == 3:
        values = values.permute(2, 0, 1)
    if values.ndim != 3 or len(values) not in (1, 3, 4):
        wanted = "(H, W), (H, W, 3) or (H, W, 4)" if last else "(3, H, W), (1, H, W) or (4, H, W)"
        raise ValueError(f"`{name}` must have shape {wanted}, got {shape}: give one picture.")
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
            "make it floats, divided by the number that stands for white."
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
        raise ValueError(
            f"`{name}` is {w}x{h} pixels: it must be at least {SMALLEST} a side to hold something to match."
        )
    if h * w > LIMIT:
        raise ValueError(
            f"`{name}` has {h * w / 1e6:.1f} megapixels, the limit is {LIMIT // 10**6}: make it smaller first."
        )
