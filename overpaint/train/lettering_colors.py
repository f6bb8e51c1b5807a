"""Named colors of lettering: eleven basic ones and those of the XKCD survey.

Source: R. Munroe's color survey, public domain (CC0), in matplotlib's table.
"""

import functools
import re
from dataclasses import dataclass

import numpy as np

__all__ = ["BASIC", "Palette", "contrast", "luminance", "palette"]

BASIC = {
    "black": (20, 20, 20), "white": (240, 240, 240), "grey": (128, 128, 128), "red": (220, 30, 30),
    "green": (30, 150, 50), "blue": (30, 60, 220), "yellow": (240, 220, 40), "orange": (245, 140, 20),
    "purple": (130, 40, 160), "pink": (250, 130, 190), "brown": (120, 70, 30), "cyan": (30, 210, 220),
}  # fmt: skip
_COARSE = re.compile(r"shit|poo\b|poop|puke|vomit|barf|snot|piss|booger|bile|diarrhea|baby")


@dataclass(frozen=True)
class Palette:
    """Names of colors with their values."""

    names: tuple[str, ...]
    values: np.ndarray  # RGB 0 to 255, float32 (N, 3)
    luminances: np.ndarray  # relative luminance 0 to 1, (N,)
    basic: np.ndarray  # bool (N,)


@functools.cache
def palette() -> Palette:
    """Return the basic colors and those of the XKCD survey under other names, without names in bad taste."""
    from matplotlib.colors import XKCD_COLORS, to_rgb

    colors = {name: np.array(value, np.float32) for name, value in BASIC.items()}
    for full, code in XKCD_COLORS.items():
        name = full.removeprefix("xkcd:")
        if name not in colors and name != "gray" and not _COARSE.search(name):
            colors[name] = np.array(to_rgb(code), np.float32) * 255
    values = np.stack(list(colors.values()))
    basic = np.array([name in BASIC for name in colors])
    return Palette(tuple(colors), values, luminance(values), basic)


def luminance(values: np.ndarray) -> np.ndarray:
    """Return the relative luminance, 0 to 1, of RGB values 0 to 255 in the last axis.

    Source: WCAG 2.2, https://www.w3.org/TR/WCAG22/#dfn-relative-luminance.
    """
    share = np.asarray(values, np.float32) / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    return linear @ np.array([0.2126, 0.7152, 0.0722], np.float32)


def contrast(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the contrast ratio, 1 to 21, of two relative luminances.

    Source: WCAG 2.2, https://www.w3.org/TR/WCAG22/#dfn-contrast-ratio.
    """
    high, low = np.maximum(first, second), np.minimum(first, second)
    return (high + 0.05) / (low + 0.05)
