r"""Measures of written letters by their pixels: color, stroke width, slant, the background beside them, and the seam.

The letters in a written picture are the pixels inside of the region that changed from the clean background: those above
Otsu's threshold of the CIE76 difference. The core of the letters is the half of them that is deepest inside, and its
median is their color. Opacity is the projection of the change onto the change of the core,
:math:`\langle I - B, c - B \rangle / \|c - B\|^2`, with picture :math:`I`, background :math:`B` and color :math:`c`.
Each measure is also taken of the true pictures, which shows its own error.

Source: Luo et al., 2001 (CIEDE2000), https://doi.org/10.1002/col.1049, by scikit-image; Otsu, 1979.
"""

import math
from dataclasses import dataclass

import cv2
import numpy as np
from skimage import color as colors
from skimage.filters import threshold_otsu

__all__ = [
    "Letters", "background_psnr", "difference", "hue_error", "is_chromatic", "isolated", "lab", "leak", "letters",
    "outside_equal", "seam", "slant", "stroke_width",
]  # fmt: skip

_LEAST_CHANGE = 6.0  # CIE76; a smaller change is no letter
_LEAST_PIXELS = 6
_ANGLES = np.arange(-20, 36, 1.0)  # degrees


@dataclass(frozen=True)
class Letters:
    """Letters in a written picture.

    Attributes:
        opacity: 0 to 1, float32 (H, W).
        pixels: True where a letter is, bool (H, W).
        color: RGB 0 to 255 of their core, or of the region if there are no letters, float64 (3,).
        present: False if too few pixels changed to be letters.
    """

    opacity: np.ndarray
    pixels: np.ndarray
    color: np.ndarray
    present: bool


def lab(values: np.ndarray) -> np.ndarray:
    """Return CIE L*a*b* (D65) of RGB values 0 to 255, float64, in the last axis."""
    return colors.rgb2lab(np.asarray(values, np.float64) / 255)


def difference(first: np.ndarray, second: np.ndarray) -> float:
    """Return CIEDE2000 of two RGB colors 0 to 255."""
    return float(colors.deltaE_ciede2000(lab(first), lab(second)))


def hue_error(first: np.ndarray, second: np.ndarray) -> float:
    """Return the angle between the hues of two RGB colors in CIE L*a*b*, 0 to 180 degrees."""
    angles = [math.atan2(values[2], values[1]) for values in (lab(first), lab(second))]
    turn = math.degrees(abs(angles[0] - angles[1]))
    return min(turn, 360 - turn)


def is_chromatic(value: np.ndarray) -> bool:
    """Return whether a color has a hue: a chroma of at least 15 in CIE L*a*b*."""
    return bool(np.hypot(*lab(value)[1:]) >= 15)


def letters(picture: np.ndarray, clean: np.ndarray, mask: np.ndarray) -> Letters:
    """Return the letters in a region.

    Args:
        picture: The written line, RGB uint8 (H, W, 3).
        clean: The line without the word, RGB uint8 (H, W, 3).
        mask: True in the region, bool (H, W).
    """
    change = np.linalg.norm(lab(picture) - lab(clean), axis=-1) * mask
    inside = change[mask]
    pixels = np.zeros(mask.shape, bool)
    if np.ptp(inside) > 0:
        pixels = change > max(threshold_otsu(inside), _LEAST_CHANGE)
    if pixels.sum() < _LEAST_PIXELS:
        return Letters(
            np.zeros(mask.shape, np.float32), pixels, np.median(picture[mask], 0).astype(float), False
        )  # fmt: skip
    depth = cv2.distanceTransform(pixels.astype(np.uint8), cv2.DIST_L2, 5)
    strength = depth + change / (
        change.max() + 1e-9
    )  # among equally deep pixels those that changed most
    core = pixels & (strength >= np.median(strength[pixels]))
    color = np.median(picture[core], 0).astype(np.float64)
    direction = color - clean.astype(np.float64)
    size = np.maximum((direction**2).sum(-1), 1.0)
    share = ((picture.astype(np.float64) - clean) * direction).sum(-1) / size
    return Letters((np.clip(share, 0, 1) * mask).astype(np.float32), pixels, color, True)


def isolated(picture: np.ndarray, clean: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return the letters of a line in black on white, by their opacity, RGB uint8 (H, W, 3); arguments of `letters`."""
    level = 255 - 255 * letters(picture, clean, mask).opacity
    return np.repeat(level.round().astype(np.uint8)[..., None], 3, axis=-1)


def stroke_width(opacity: np.ndarray) -> float:
    """Return the mean width of strokes in pixels: twice their area divided by the length of their outline.

    The length of the outline is the total variation of the opacity.
    """
    padded = np.pad(opacity.astype(np.float64), 1)
    down, across = np.gradient(padded)
    outline = np.hypot(down, across).sum()
    return float(2 * opacity.sum() / outline) if outline > 0 else 0.0


def slant(opacity: np.ndarray) -> float:
    """Return the slant of letters in degrees, positive to the right: the shear that makes their columns most distinct.

    Of the angles from -20 to 35 degrees it takes the one for which the sum of the squared column sums of the
    un-sheared letters is largest.
    """
    height, width = opacity.shape
    rows = np.flatnonzero(opacity.max(1) > 0.5)
    if len(rows) == 0:
        return 0.0
    middle = (rows[0] + rows[-1]) / 2
    best, chosen = -1.0, 0.0
    for angle in sorted(_ANGLES, key=abs):  # of equal sums the most upright
        shift = math.tan(math.radians(angle))
        matrix = np.array([[1, -shift, shift * middle], [0, 1, 0]], np.float32)
        upright = cv2.warpAffine(
            opacity, matrix, (width, height), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        )
        total = float(np.square(upright.sum(0)).sum())
        if total > best * 1.0005:
            best, chosen = total, float(angle)
    return chosen


def background_psnr(
    picture: np.ndarray, clean: np.ndarray, mask: np.ndarray, cover: np.ndarray
) -> float | None:
    """Return the PSNR in dB of the region's pixels that are 3 pixels or more from the true letters; at most 60.

    Args:
        picture: The written line, RGB uint8 (H, W, 3).
        clean: The line without the word, RGB uint8 (H, W, 3).
        mask: The region, bool (H, W).
        cover: Opacity of the true letters, (H, W).

    Returns:
        `None` if fewer than 30 pixels remain.
    """
    beside = _beside(mask, cover)
    if beside.sum() < 30:
        return None
    error = np.square((picture[beside].astype(float) - clean[beside]) / 255).mean()
    return float(min(60.0, -10 * math.log10(max(error, 1e-12))))


def leak(
    first: np.ndarray, second: np.ndarray, mask: np.ndarray, cover: np.ndarray
) -> float | None:
    """Return the mean difference, 0 to 255, of the background in the region between two written lines.

    The background is that of `background_psnr`; `None` if fewer than 30 pixels remain.
    """
    beside = _beside(mask, cover)
    if beside.sum() < 30:
        return None
    return float(np.abs(first[beside].astype(float) - second[beside]).mean())


def seam(picture: np.ndarray, truth: np.ndarray, mask: np.ndarray) -> float:
    """Return the mean step between neighbouring pixels across the region's border, relative to that of `truth`."""
    steps = []
    for image in (picture, truth):
        values = image.astype(float)
        total, count = 0.0, 0
        for axis in (0, 1):
            across = np.diff(mask.astype(int), axis=axis) != 0
            total += np.abs(np.diff(values, axis=axis)).mean(-1)[across].sum()
            count += int(across.sum())
        steps.append(total / max(count, 1))
    return float(
        (steps[0] + 1) / (steps[1] + 1)
    )  # one level of 255 is added, for plain backgrounds


def outside_equal(picture: np.ndarray, original: np.ndarray, mask: np.ndarray) -> bool:
    """Return whether all pixels outside of the region are equal."""
    return bool((picture[~mask] == original[~mask]).all())


def _beside(mask: np.ndarray, cover: np.ndarray) -> np.ndarray:
    return mask & ~(cv2.dilate((cover > 0.02).astype(np.uint8), np.ones((5, 5), np.uint8)) > 0)
