"""Put a rewritten region into the picture of a file, whose other pixels, transparency and color profile stay."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from overpaint import files
from overpaint.scene_text.rewriting import Rewriting

__all__ = ["paste", "save_png"]


def paste(original: Image.Image, rewriting: Rewriting, index: int | None = None) -> Image.Image:
    """Return the picture with a sample of a rewriting, RGB or RGBA; pixels outside of the region are equal.

    Inside of the region the picture becomes opaque.

    Args:
        original: The picture that was rewritten, in any mode.
        rewriting: The samples.
        index: Which sample; by default the chosen one.
    """
    turned = ImageOps.exif_transpose(original)
    pixels = np.array(turned.convert("RGBA" if turned.has_transparency_data else "RGB"))
    row, column = rewriting.corner
    crop = rewriting.crops[rewriting.chosen if index is None else index]
    values = (crop.float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    height, width = values.shape[:2]
    inside = rewriting.plan.area.mask[row : row + height, column : column + width].numpy()
    part = pixels[row : row + height, column : column + width]
    part[inside, :3] = values[inside]
    part[inside, 3:] = 255
    result = Image.fromarray(pixels)
    profile = turned.info.get("icc_profile")
    if profile:
        result.info["icc_profile"] = profile
    return result


def save_png(picture: Image.Image, path: Path) -> Path:
    """Write a picture as PNG with its color profile, atomically, and return the path."""
    with files.atomic(path) as draft:
        picture.save(draft, format="PNG", icc_profile=picture.info.get("icc_profile"))
    return path
