"""A sheet of the samples of a rewriting, each with its number, seed and reading."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from overpaint.scene_text.rewriting import Rewriting

__all__ = ["draw_sheet"]

_COLUMNS = 4
_WIDTH, _HEIGHT = 240, 180  # pixels of a sample, at most
_LABEL, _GAP = 18, 8  # pixels
_INK, _MARK = "#1f2430", "#b4432f"


def draw_sheet(rewriting: Rewriting) -> Image.Image:
    """Return the original region and all samples on white, each with a label; the chosen one has a frame."""
    row, column = rewriting.corner
    height, width = rewriting.crops.shape[-2:]
    before = rewriting.image[:, row : row + height, column : column + width].cpu()
    cells = [("original", before, False)]
    for index, crop in enumerate(rewriting.crops):
        label = f"seed {rewriting.seeds[index]}"
        if rewriting.readings:
            label += f": {rewriting.readings[index] or 'nothing read'}"
        cells.append((label, crop, index == rewriting.chosen))
    scale = min(_WIDTH / width, _HEIGHT / height)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    step = (max(size[0], 150) + _GAP, size[1] + _LABEL + _GAP)
    columns = min(_COLUMNS, len(cells))
    rows = -(-len(cells) // columns)
    sheet = Image.new("RGB", (columns * step[0] + _GAP, rows * step[1] + _GAP), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for index, (label, crop, is_chosen) in enumerate(cells):
        x = _GAP + index % columns * step[0]
        y = _GAP + index // columns * step[1]
        pixels = (crop.float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
        picture = Image.fromarray(np.ascontiguousarray(pixels)).resize(
            size, Image.Resampling.BICUBIC
        )
        sheet.paste(picture, (x, y))
        if is_chosen:
            pen.rectangle((x - 3, y - 3, x + size[0] + 2, y + size[1] + 2), outline=_MARK, width=2)
        fitted = label
        while pen.textlength(fitted, font=font) > step[0] - _GAP and len(fitted) > 1:
            fitted = fitted[:-1]
        pen.text((x, y + size[1] + 3), fitted, fill=_MARK if is_chosen else _INK, font=font)
    return sheet
