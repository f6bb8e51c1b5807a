"""The strip below a view: its words, its scale of colors, on light or on dark paper."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from overpaint.images.charts import Theme

__all__ = ["PAD", "Scale", "Sheet", "nice", "pixels"]

PAD = 18
_STRIP = 116  # height
_NARROW = 640  # a strip needs so much to hold its words
_BAR = 250
_TEXT, _SMALL = 16, 14


def nice(value: float) -> float:
    """Return the next round number that is not below `value`; of nothing, 1."""
    if not value > 0:
        return 1.0
    unit = 10.0 ** math.floor(math.log10(value))
    steps = (1, 1.5, 2, 3, 4, 5, 6, 8, 10)
    return next(unit * s for s in steps if unit * s >= value * (1 - 1e-6))


def pixels(value: float) -> str:
    """Return a length in words."""
    return f"{value:g} pixel" if value == 1 else f"{value:g} pixels"


@dataclass(frozen=True)
class Scale:
    """A logarithmic scale of standard deviations, in pixels, from `low` to `high`; empty where all are 0."""

    low: float
    high: float
    empty: bool = False

    @classmethod
    def of(cls, std: NDArray[np.float32]) -> "Scale":
        """Return the scale that holds most of `std`: all but two per cent at either end."""
        if not (std > 0).any():
            return cls(1.0, 10.0, empty=True)
        low, high = (float(v) for v in np.percentile(std, [2, 98]))
        high = nice(max(high, 1e-3))
        return cls(max(_floor(max(low, high / 1000)), 1e-6) if low < high / 2 else high / 10, high)

    def colors(self, std: NDArray[np.float32], theme: Theme) -> NDArray[np.float32]:
        """Return the color of each deviation, RGB in [0, 1], shape (..., 3): viridis, bright where it is small."""
        from matplotlib import colormaps
        from matplotlib.colors import to_rgb

        if self.empty:
            return np.broadcast_to(
                np.array(to_rgb(theme.control), dtype=np.float32), (*std.shape, 3)
            )
        span = math.log(self.high / self.low)
        share = np.log(np.maximum(std, self.low) / self.low) / span
        return colormaps["viridis"](1 - np.clip(share, 0, 1))[..., :3].astype(np.float32)

    def ticks(self) -> list[float]:
        """Return the round numbers to write at the scale, some eight at most."""
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for steps in ((1, 2, 5), (1,)):
            found = [10.0**e * s for e in powers for s in steps]
            found = [v for v in found if self.low * 0.999 <= v <= self.high * 1.001]
            if len(found) <= 8:
                break
        return found


class Sheet:
    """A picture over a strip of paper.

    Attributes:
        image: Both, drawn upon by the methods.
        height: Of the strip.
    """

    def __init__(self, shown: Image.Image, theme: Theme) -> None:
        self.theme = theme
        self.height = _STRIP
        width = max(shown.width, _NARROW)
        self.image = Image.new("RGB", (width, shown.height + _STRIP), theme.background)
        self.image.paste(shown, ((width - shown.width) // 2, 0))
        self._top = shown.height
        self._pen = ImageDraw.Draw(self.image)

    def paste(self, patch: Image.Image, place: tuple[int, int], mask: Image.Image) -> None:
        """Put a patch at a place of the strip, its margin left out."""
        self.image.paste(patch, (PAD + place[0], self._top + PAD + place[1]), mask)

    def text(self, lines: Sequence[str], left: int) -> None:
        """Write lines, the first in ink and those that follow fainter, centred upwards and downwards."""
        step = 25
        y = self._top + (_STRIP - step * len(lines)) / 2 + step / 2
        for i, line in enumerate(lines):
            color = self.theme.text if i == 0 else _between(self.theme)
            self._pen.text(
                (PAD + left, y + i * step), line, font=_font(_TEXT), fill=color, anchor="lm"
            )

    def bar(self, scale: Scale, left: str, right: str) -> None:
        """Draw the scale at the right end of the strip, its ends named; nothing for an empty one."""
        if scale.empty:
            return
        x, y = self.image.width - PAD - _BAR, self._top + 46
        values = np.geomspace(scale.low, scale.high, _BAR, dtype=np.float32)[None]
        row = (scale.colors(values, self.theme) * 255).round().astype(np.uint8)
        self.image.paste(Image.fromarray(row).resize((_BAR, 18)), (x, y))
        faint = _between(self.theme)
        for words, place, anchor in ((left, x, "ls"), (right, x + _BAR, "rs")):
            self._pen.text(
                (place, y - 8), words, font=_font(_SMALL), fill=self.theme.text, anchor=anchor
            )
        span = math.log(scale.high / scale.low)
        ticks = scale.ticks()
        for value in ticks:
            at = x + _BAR * math.log(value / scale.low) / span
            self._pen.line([(at, y + 18), (at, y + 23)], fill=faint, width=1)
            words = f"{value:g} px" if value == ticks[-1] else f"{value:g}"
            anchor = "rt" if at > x + _BAR - 12 else "lt" if at < x + 4 else "mt"
            self._pen.text((at, y + 27), words, font=_font(_SMALL), fill=faint, anchor=anchor)


def _floor(value: float) -> float:
    unit = 10.0 ** math.floor(math.log10(value))
    return next(unit * s for s in (5, 2, 1) if unit * s <= value * (1 + 1e-6))


def _between(theme: Theme) -> str:
    """Return a color between ink and paper that is still easy to read."""
    ink, paper = (Image.new("RGB", (1, 1), c) for c in (theme.text, theme.background))
    r, g, b = Image.blend(ink, paper, 0.28).getpixel((0, 0))  # type: ignore[misc]
    return f"#{r:02x}{g:02x}{b:02x}"


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
