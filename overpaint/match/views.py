r"""A match to look at: its flow as colors, its flow as arrows, its confidence; and all of it on disk.

Each view is the picture enlarged or reduced to a size that suits a screen, over a strip that says what its colors mean.

Source: Baker et al., 2011 (Middlebury), https://doi.org/10.1007/s11263-010-0390-2, for the wheel of colors: white where
nothing moves, a hue for each direction, stronger the farther.
Deviations: the farthest one per cent of the places share the strongest color; what lies outside of the source is
hatched, not black.
"""

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from overpaint.images.charts import LIGHT, Theme
from overpaint.images.read import load_picture
from overpaint.match import flow as fields
from overpaint.match.legend import (
    PAD,
    Scale,
    Sheet,
    nice,
    pixels,
)
from overpaint.match.matching import Match

__all__ = ["arrows", "colors", "confidence", "save", "wheel"]

_LONG, _SHORT = 1120, 640  # of a view's longer side, in pixels: at most, at least
_RUNS = ((15, 0), (6, 1), (4, 2), (11, 3), (13, 4), (6, 5))  # steps from one corner to the next
_CORNERS = ((1, 0, 0), (1, 1, 0), (0, 1, 0), (0, 1, 1), (0, 0, 1), (1, 0, 1), (1, 0, 0))

Floats = NDArray[np.float32]


def colors(flow: Any, most: float) -> Floats:
    """Return the color of each vector of a flow on Middlebury's wheel.

    Args:
        flow: (x, y), shape (2, H, W).
        most: The length that has the strongest color; beyond it there is no other.

    Returns:
        RGB in [0, 1], shape (H, W, 3), float32: white for 0, red to the right, yellow downwards and to the right.
    """
    x, y = np.asarray(flow, dtype=np.float32)
    share = np.minimum(np.hypot(x, y) / max(most, 1e-9), 1)[..., None]
    ring = _ring()
    place = (np.arctan2(-y, -x) / math.pi + 1) / 2 * (len(ring) - 1)
    low = np.floor(place).astype(int)
    part = (place - low)[..., None]
    hue = ring[low] * (1 - part) + ring[(low + 1) % len(ring)] * part
    return (1 - share * (1 - hue)).astype(np.float32)


def wheel(match: Match, *, theme: Theme = LIGHT) -> Image.Image:
    """Return the flow as colors, with the wheel that explains them.

    Args:
        match: What to show.
        theme: Colors of the strip below.
    """
    flow, inside = _shown(match)
    lengths = np.hypot(*flow)
    most = nice(float(np.percentile(lengths[inside] if inside.any() else lengths, 99)))
    painted = _hatched(colors(flow, most), inside, theme)
    sheet = Sheet(_image(painted), theme)
    side = sheet.height - 2 * PAD
    axis = np.linspace(-1, 1, 4 * side, dtype=np.float32)
    disc = Image.fromarray(_bytes(colors(np.stack(np.meshgrid(axis, axis)), 1.0)))
    round_ = Image.fromarray(_bytes(np.hypot(*np.meshgrid(axis, axis)) <= 1))
    sheet.paste(disc.resize((side, side)), (0, 0), round_.resize((side, side)))
    lines = [
        "Which way, and how far, a place lies in the other picture:",
        f"the wheel's rim is {pixels(most)}, its white centre 0.",
    ]
    outside = not inside.all()
    sheet.text(lines + ["Hatched: outside of the other picture."] * outside, side + PAD)
    return sheet.image


def arrows(match: Match, target: Any, *, theme: Theme = LIGHT) -> Image.Image:
    """Return the flow as arrows over the picture it is on, colored by how sure each is.

    Args:
        match: What to show.
        target: `image_b` of the match, anything that `dense` takes.
        theme: Colors of the strip below.

    Raises:
        ValueError: The target cannot be read, or has another size than the flow.
    """
    backdrop = _faded(_small(match, target), theme)
    flow, inside = _shown(match)
    scale = Scale.of(match.std.numpy())
    tints = scale.colors(_fitted(match.std.numpy(), flow.shape[1:]), theme)
    height, width = flow.shape[1:]
    zoom = width / match.flow.shape[2]
    gap = max(height, width) / 24
    factor = _factor(flow * zoom, inside, gap)
    board = backdrop.resize((2 * width, 2 * height))  # drawn twice as large, for smooth edges
    pen = ImageDraw.Draw(board)
    places = np.stack(np.meshgrid(_spaced(width, gap), _spaced(height, gap)), -1).reshape(-1, 2)
    for x, y in places:
        row, column = int(y), int(x)
        step = flow[:, row, column] * zoom * factor
        tint = tuple(_bytes(tints[row, column]).tolist())
        if inside[row, column]:
            _arrow(pen, np.array([x, y]) * 2, step * 2, gap / 6.5, (tint, theme.text))
        else:
            _ring_mark(pen, (2 * x, 2 * y), gap / 9, theme.text)
    sheet = Sheet(board.resize((width, height), Image.Resampling.BOX), theme)
    second = f"arrows at {_times(factor)} their length"
    second += "" if inside.all() else "; rings: outside"
    sheet.text(["Where each place lies in the other picture", second], 0)
    sheet.bar(scale, "sure", "unsure")
    return sheet.image


def confidence(match: Match, target: Any, *, theme: Theme = LIGHT) -> Image.Image:
    """Return how far the hypotheses lie from the flow: bright where they agree, dark where they do not.

    The target's outlines show through, so that one sees where one is; its tones do not, which would change the colors.

    Args:
        match: What to show; from a single hypothesis there is nothing to tell, and the view says so.
        target: `image_b` of the match, anything that `dense` takes.
        theme: Colors of the strip below.

    Raises:
        ValueError: The target cannot be read, or has another size than the flow.
    """
    std, size = match.std.numpy(), _size(match)
    scale = Scale.of(std)
    painted = scale.colors(_fitted(std, size), theme) + _relief(_small(match, target))[..., None]
    sheet = Sheet(_image(painted), theme)
    if scale.empty:
        sheet.text(["One hypothesis has no spread:", "match with two samples or more."], 0)
    else:
        sheet.text(["How sure each place is", "how far the hypotheses lie from the flow"], 0)
        sheet.bar(scale, "sure", "unsure")
    return sheet.image


def save(match: Match, target: Any, folder: str | Path, *, theme: Theme = LIGHT) -> dict[str, Path]:
    """Write a match: `flow.flo`, `flow.npy`, `std.npy`, `warped.png` and the three views.

    Each file is written beside its place and then moved there, so that none is ever half written.

    Args:
        match: What to write.
        target: `image_b` of the match.
        folder: Made where it is missing.
        theme: Colors of the strips.

    Returns:
        The files by their names without suffix; the flow's by `flo` and `npy`.

    Raises:
        ValueError: The target cannot be read, or has another size than the flow.
    """
    shown = {
        "warped": Image.fromarray(_bytes(match.warped.permute(1, 2, 0).numpy())),
        "wheel": wheel(match, theme=theme),
        "arrows": arrows(match, target, theme=theme),
        "confidence": confidence(match, target, theme=theme),
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = {"flo": folder / "flow.flo", "npy": folder / "flow.npy", "std": folder / "std.npy"}
    fields.write_flo(written["flo"], match.flow)
    for name, values in (("npy", match.flow), ("std", match.std)):
        beside = written[name].with_suffix(".part")
        with beside.open("wb") as file:
            np.save(file, values.numpy())
        os.replace(beside, written[name])
    for name, image in shown.items():
        written[name] = folder / f"{name}.png"
        beside = written[name].with_suffix(".part")
        image.save(beside, format="PNG")
        os.replace(beside, written[name])
    return written


# --- what the views share ---------------------------------------------------------------------------------------------


def _size(match: Match) -> tuple[int, int]:
    """Return the height and width of a view of the match."""
    height, width = match.std.shape
    long = max(height, width)
    zoom = min(max(long, _SHORT), _LONG) / long
    return max(round(height * zoom), 1), max(round(width * zoom), 1)


def _shown(match: Match) -> tuple[Floats, NDArray[np.bool_]]:
    """Return the flow, still in the match's pixels, and where it stays inside, at the view's size."""
    size = _size(match)
    flow = np.stack([_fitted(channel, size) for channel in match.flow.numpy()])
    return flow, _fitted(match.inside.numpy().astype(np.float32), size) >= 0.5


def _fitted(values: Floats, size: tuple[int, ...]) -> Floats:
    image = Image.fromarray(values.astype(np.float32))
    return np.asarray(image.resize((size[1], size[0]), Image.Resampling.BILINEAR))


def _small(match: Match, target: Any) -> Image.Image:
    """Return the target at the view's size."""
    image = load_picture(target, "target")[0].permute(1, 2, 0).numpy()
    if image.shape[:2] != tuple(match.std.shape):
        raise ValueError(
            f"`target` is {image.shape[1]}x{image.shape[0]} pixels, the flow {match.std.shape[1]}x"
            f"{match.std.shape[0]}: give the `image_b` that was matched."
        )
    height, width = _size(match)
    return _image(image).resize((width, height), Image.Resampling.BILINEAR)


def _relief(small: Image.Image) -> Floats:
    """Return what a picture has of outlines, a little of it: its grey less the same, blurred."""
    grey = small.convert("L")
    blurred = grey.filter(ImageFilter.GaussianBlur(max(small.size) / 100))
    detail = np.asarray(grey, dtype=np.float32) - np.asarray(blurred, dtype=np.float32)
    return np.clip(detail / 255 * 0.35, -0.12, 0.12).astype(np.float32)


def _faded(small: Image.Image, theme: Theme) -> Image.Image:
    """Return a picture with half of its color and a third of its contrast gone."""
    grey = small.convert("L").convert("RGB")
    paper = Image.new("RGB", small.size, theme.background)
    return Image.blend(Image.blend(small, grey, 0.5), paper, 0.35)


def _hatched(painted: Floats, inside: NDArray[np.bool_], theme: Theme) -> Floats:
    y, x = np.indices(inside.shape)
    line = np.expand_dims(np.asarray((x + y) % 12 < 3), -1)
    paper, ink = (np.array(Image.new("RGB", (1, 1), c)) / 255 for c in (theme.background, theme.control))
    outside = np.where(line, ink, 0.7 * paper + 0.3 * painted)
    return np.where(np.expand_dims(inside, -1), painted, outside).astype(np.float32)


def _factor(flow: Floats, inside: NDArray[np.bool_], gap: float) -> float:
    """Return the round factor by which to draw arrows, so that few reach farther than the next two."""
    lengths = np.hypot(*flow)
    long = float(np.percentile(lengths[inside] if inside.any() else lengths, 90))
    steps = [10.0**e * m for e in range(2, -4, -1) for m in (5, 2, 1)]
    return next((s for s in steps if s <= 20 and long * s <= 1.7 * gap), steps[-1])


def _times(factor: float) -> str:
    return f"{factor:g} times" if factor >= 1 else f"1/{round(1 / factor)} of"


def _spaced(length: int, gap: float) -> Floats:
    count = max(round(length / gap), 1)
    return ((np.arange(count) + 0.5) * length / count).astype(np.float32)


def _arrow(
    pen: ImageDraw.ImageDraw,
    tail: Floats,
    step: Floats,
    thick: float,
    tints: tuple[tuple[int, ...], str],
) -> None:
    """Draw an arrow, filled and rimmed in `tints`; a dot where it would be no longer than thick."""
    fill, rim = tints
    length = float(np.hypot(*step))
    if length < 2 * thick:
        box = [*(tail - thick), *(tail + thick)]
        pen.ellipse([float(v) for v in box], fill=fill, outline=rim, width=2)
        return
    along = step / length
    across = np.array([-along[1], along[0]])
    head = min(4.2 * thick, 0.6 * length)
    wide = head * 0.55
    tip, neck, slim = tail + step, tail + step - along * head, 0.5 * thick
    outline = [
        tail + across * slim, neck + across * slim, neck + across * wide, tip,
        neck - across * wide, neck - across * slim, tail - across * slim,
    ]  # fmt: skip
    points = [(float(x), float(y)) for x, y in outline]
    pen.polygon(points, outline=rim, width=4)
    pen.polygon(points, fill=fill, outline=rim, width=2)


def _ring_mark(
    pen: ImageDraw.ImageDraw, place: tuple[float, float], radius: float, color: str
) -> None:
    x, y = place
    pen.ellipse([x - radius, y - radius, x + radius, y + radius], outline=color, width=3)


def _ring() -> Floats:
    """Return the wheel's 55 colors, from the left clockwise as the picture lies."""
    corners = np.array(_CORNERS, dtype=np.float32)
    rows = [
        corners[i] + (corners[i + 1] - corners[i]) * (k / count)
        for count, i in _RUNS
        for k in range(count)
    ]
    return np.stack(rows)


def _bytes(values: Any) -> NDArray[np.uint8]:
    return (np.clip(np.asarray(values, dtype=np.float32), 0, 1) * 255).round().astype(np.uint8)


def _image(values: Floats) -> Image.Image:
    return Image.fromarray(_bytes(values))
