"""Rewrite the text in a region of a picture: rectify it, write on the fixed line, warp back, blend inside the region.

Source: Ji et al., 2023 (DiffSTE), https://arxiv.org/abs/2304.05568.
Deviations: DiffSTE edits a square crop and returns it whole; here pixels outside of the region do not change.
"""

import difflib
from typing import Any

import torch
from torch import Tensor

from overpaint.errors import listed
from overpaint.scene_text import alphabet
from overpaint.scene_text.diffusion import Guidance
from overpaint.scene_text.geometry import Region, blend, line_box, read_region, rectify, restore
from overpaint.scene_text.instructions import compose, font_name, is_mix
from overpaint.scene_text.lettering import Lettering
from overpaint.scene_text.network import Place

__all__ = ["rewrite"]

_WIDEST = (
    1.6  # width that letters may be spread to, in natural widths; the rest of a region is filled
)


def rewrite(
    image: Tensor,
    region: Any,
    text: str,
    *,
    font: str | None = None,
    color: str | None = None,
    instruction: str | None = None,
    model: Lettering | str = "lettering",
    steps: int = 20,
    guidance: Guidance | None = None,
    seed: int = 0,
    feather: float = 2.0,
) -> Tensor:
    """Return the picture with `text` written in the region; all pixels outside of it are unchanged, bit for bit.

    Without font, color and instruction the style of the letters beside the region is taken.

    Args:
        image: RGB in [0, 1], float (3, H, W).
        region: Box (x, y, width, height) in pixels, points (x, y) of a polygon, or a bool mask (H, W).
        text: One word or short line of printable ASCII.
        font: Name of a font that the model knows, such as `Courgette` or `Lato-Bold`, or two as `A and B`.
        color: Name of a color, such as `red`.
        instruction: Instruction in free words, instead of `font` and `color`.
        model: A model, the name of one in the zoo, or its folder.
        steps: Denoising steps, at least 1.
        guidance: Scales of guidance; by default none.
        seed: Seed of the noise.
        feather: Pixels inside of the region over which old and new picture mix.

    Returns:
        The picture, dtype and shape of `image`.

    Raises:
        ValueError: Text, region, font or picture cannot be used.

    Source: Ji et al., 2023 (DiffSTE), https://arxiv.org/abs/2304.05568.
    """
    if image.ndim != 3 or image.shape[0] != 3 or not image.is_floating_point():
        raise ValueError(
            f"`image` must be RGB floats of shape (3, H, W), got {image.dtype} {tuple(image.shape)}: convert it."
        )
    if instruction is not None and (font or color):
        raise ValueError("`instruction` replaces `font` and `color`: leave those out.")
    loaded = model if isinstance(model, Lettering) else Lettering.load(model)
    alphabet.check(text, loaded.config.text_length)
    area = read_region(region, (image.shape[1], image.shape[2]))
    if instruction is None:
        instruction = compose(text, _known_font(font, loaded), color)
    line, device = loaded.config.line, image.device
    natural = _natural_width(loaded, text, instruction)
    box = line_box(line, area.size, natural)
    rectified = rectify(image.cpu(), area, line, box)
    selected = _line_mask(area, loaded, box)
    place = _place(loaded, box, natural)
    written = loaded.write(
        rectified, selected, [text], [instruction], place, steps=steps, guidance=guidance, seed=seed
    )
    back = restore(written, area, line, box, (image.shape[1], image.shape[2]))
    return blend(image, back.to(device), area.mask, feather)


def _known_font(font: str | None, model: Lettering) -> str | None:
    """Return the name of a font as the model knows it.

    Raises:
        ValueError: It knows no such font.
    """
    if font is None or is_mix(font):
        return font
    name = font_name(font).replace(" ", "")
    known = {entry.lower(): entry for entry in model.config.fonts}
    if name.lower() in known:
        return known[name.lower()]
    family = name.partition("-")[0]
    if family.lower() in known and name.lower() != family.lower():
        return known[family.lower()] + name[len(family) :]  # a variant that the model never saw
    near = difflib.get_close_matches(name.lower(), known, 5, 0.4)
    names = listed([known[entry] for entry in near] or model.config.fonts)
    raise ValueError(f"unknown font {font!r}: choose one of the model's fonts, such as {names}.")


def _natural_width(model: Lettering, text: str, instruction: str) -> float | None:
    """Return the natural width of the text on the line in pixels; `None` without a layout head."""
    if model.network.layout_head is None:
        return None
    line = model.config.line
    with torch.no_grad():
        heights = float(model.network.natural_width(model.network.texts([text], [instruction])))
    return min(max(heights * (line.baseline - line.capital), 4.0), line.width - 2.0 * line.margin)


def _line_mask(area: Region, model: Lettering, box: tuple[float, float]) -> Tensor:
    """Return the region on the line, bool (1, H, W)."""
    line = model.config.line
    mask = rectify(area.mask[None].float().expand(3, -1, -1), area, line, box)[:, 0] > 0.5
    rows, columns = torch.arange(line.height) + 0.5, torch.arange(line.width) + 0.5
    inside = ((rows > line.top) & (rows < line.bottom))[:, None] & (
        (columns > box[0]) & (columns < box[1])
    )
    return mask & inside


def _place(model: Lettering, box: tuple[float, float], natural: float | None) -> Place:
    """Return where the word stands: the whole region, or its centre if it is much wider than the word."""
    line = model.config.line
    start, end = box[0] + 2, box[1] - 2
    if end - start < 4:
        start, end = box
    if natural is not None and end - start > _WIDEST * natural:
        middle = (start + end) / 2
        start, end = middle - _WIDEST * natural / 2, middle + _WIDEST * natural / 2
    return Place(*(torch.tensor([float(v)]) for v in (start, end, line.capital, line.baseline)))
