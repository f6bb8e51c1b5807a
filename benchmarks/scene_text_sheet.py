"""A sheet of 100 written lines that were drawn at random, with the wanted and the read word below each."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from overpaint import files

__all__ = ["chosen", "sheet"]

_SCALE = 3  # of a line
_GAP, _LABEL, _COLUMNS = 10, 20, 5
_GOOD, _BAD = (0, 90, 40), (190, 20, 20)


def chosen(count: int, *, number: int = 100, seed: int = 0) -> list[int]:
    """Return the rows that are shown: `number` of `count` at random, in ascending order, failures included."""
    rng = np.random.default_rng(seed)
    return sorted(int(i) for i in rng.choice(count, min(number, count), replace=False))


def sheet(
    lines: Sequence[np.ndarray],
    words: Sequence[str],
    readings: Sequence[str],
    path: Path,
    *,
    rows: Sequence[int],
) -> None:
    """Write the sheet as a PNG: each line three times as large, wanted and read word below it, misread ones in red.

    Args:
        lines: Written lines, RGB uint8 (H, W, 3).
        words: Words that were to be written.
        readings: Words that were read.
        path: The file.
        rows: Numbers of the lines that are shown.
    """
    height, width = lines[0].shape[:2]
    tile = (width * _SCALE + _GAP, height * _SCALE + _LABEL + _GAP)
    high = -(-len(rows) // _COLUMNS)
    canvas = Image.new(
        "RGB", (_COLUMNS * tile[0] + _GAP, high * tile[1] + _GAP), (255, 255, 255)
    )  # fmt: skip
    pen = ImageDraw.Draw(canvas)
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    font = ImageFont.truetype(str(folder / "DejaVuSans.ttf"), 15)
    for place, i in enumerate(rows):
        x, y = _GAP + place % _COLUMNS * tile[0], _GAP + place // _COLUMNS * tile[1]
        picture = Image.fromarray(np.ascontiguousarray(lines[i]))
        picture = picture.resize((width * _SCALE, height * _SCALE), Image.Resampling.BICUBIC)
        canvas.paste(picture, (x, y))
        is_right = readings[i].lower() == words[i].lower()
        label = f"{words[i]}" if is_right else f"{words[i]}, read: {readings[i] or 'nothing'}"
        pen.text(
            (x, y + height * _SCALE + 2), label, fill=_GOOD if is_right else _BAD, font=font
        )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.atomic(path) as draft:
        canvas.save(draft, format="PNG", optimize=True)
