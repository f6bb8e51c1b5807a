r"""Views of a match: the flow as colors and as arrows, the uncertainty as colors; each with its legend.

A view is the picture, resized to suit a screen, above a legend that explains its colors. The functions take arrays;
the methods of `Match` call them.

Source: Baker et al., 2011 (Middlebury), https://doi.org/10.1007/s11263-010-0390-2, for the color wheel: white where the
flow is zero, a hue for each direction, more saturated the longer the flow.
Deviations: the longest one per cent of the flow shares the most saturated color; what lies outside of the source is
hatched, not black.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from overpaint.images.charts import LIGHT, Chart, Theme, picture_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import LogNorm

__all__ = ["LEGEND", "PAD", "arrows", "confidence", "flow_colors", "scale", "wheel"]

LEGEND, PAD = 116, 18  # height of a legend and its margin, in pixels
_LONGEST, _SHORTEST = 1120, 640  # limits of a view's longer side, in pixels
_WIDTH = 640  # pixels that a legend needs
_ARROWS = 24  # arrows along the longer side

# The color wheel as (steps, index of the first corner): steps from one corner of the color cube to the next.
_RUNS = ((15, 0), (6, 1), (4, 2), (11, 3), (13, 4), (6, 5))
_CORNERS = ((1, 0, 0), (1, 1, 0), (0, 1, 0), (0, 1, 1), (0, 0, 1), (1, 0, 1), (1, 0, 0))

Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]


def flow_colors(flow: Any, longest: float) -> Floats:
    """Return the color of each vector of a flow on Middlebury's wheel.

    Args:
        flow: (x, y), shape (2, H, W).
        longest: Length of the most saturated color, in the flow's unit; longer vectors have the same color.

    Returns:
        RGB in [0, 1], shape (H, W, 3), float32: white for 0, red to the right, yellow to the lower right.
    """
    x, y = np.asarray(flow, dtype=np.float32)
    saturation = np.minimum(np.hypot(x, y) / max(longest, 1e-9), 1)[..., None]
    ring = _ring()
    position = (np.arctan2(-y, -x) / math.pi + 1) / 2 * (len(ring) - 1)
    low = np.floor(position).astype(int)
    part = (position - low)[..., None]
    hue = ring[low] * (1 - part) + ring[(low + 1) % len(ring)] * part
    return (1 - saturation * (1 - hue)).astype(np.float32)


def wheel(flow: Floats, inside: Bools, *, theme: Theme = LIGHT) -> Chart:
    """Return the flow as colors, above a color wheel that explains them.

    Args:
        flow: In pixels, (x, y), shape (2, H, W).
        inside: Where the flow points to a point within the source, shape (H, W); hatched elsewhere.
        theme: Colors of the legend.
    """
    from matplotlib.patches import Circle

    flow, inside = _resized_flow(flow, inside)
    lengths = np.hypot(*flow)
    longest = _round_up(float(np.percentile(lengths[inside] if inside.any() else lengths, 99)))
    painted = _hatched(flow_colors(flow, longest), inside, theme)
    figure, legend = picture_figure(painted, theme=theme, legend=LEGEND, width=_WIDTH)
    side = LEGEND - 2 * PAD
    axis = np.linspace(-1, 1, 4 * side, dtype=np.float32)
    disc = legend.imshow(
        flow_colors(np.stack(np.meshgrid(axis, axis)), 1.0), aspect="auto",
        extent=(PAD, PAD + side, LEGEND - PAD, PAD),
    )  # fmt: skip
    rim = Circle((PAD + side / 2, LEGEND / 2), side / 2, facecolor="none", edgecolor=theme.grid)
    disc.set_clip_path(legend.add_patch(rim))
    lines = [
        "Direction and distance from each pixel to its match in the other picture:",
        f"rim of the wheel = {longest:g} {'pixel' if longest == 1 else 'pixels'}, white centre = 0",
    ]
    outside = not inside.all()
    _write(legend, lines + ["hatched: outside of the other picture"] * outside, side + PAD, theme)
    return Chart(figure)


def arrows(
    flow: Floats, inside: Bools, std: Floats, target: Floats, *, theme: Theme = LIGHT
) -> Chart:
    """Return the flow as arrows over the target, colored by the uncertainty.

    Args:
        flow: In pixels, (x, y), shape (2, H, W).
        inside: Where the flow points to a point within the source, shape (H, W); a ring elsewhere.
        std: Uncertainty in pixels, shape (H, W).
        target: The picture whose grid the flow is on, RGB in [0, 1], shape (H, W, 3).
        theme: Colors.
    """
    zoom = _view_size(std)[1] / std.shape[1]
    flow, inside = _resized_flow(flow, inside)
    flow = flow * zoom
    height, width = inside.shape
    gap = max(height, width) / _ARROWS
    factor = _arrow_factor(flow, inside, gap)
    figure, legend = picture_figure(
        _faded(_resized_picture(target), theme), theme=theme, legend=LEGEND, width=_WIDTH
    )
    axis = figure.axes[0]
    grid = np.meshgrid(_evenly_spaced(width, gap), _evenly_spaced(height, gap))
    x, y = (values.ravel() for values in grid)
    at = (y.astype(int), x.astype(int))
    valid = inside[at]
    tints = _std_colors(_resized(std, (height, width)), scale(std), theme)[at]
    u, v = (channel[at][valid] * factor for channel in flow)
    axis.quiver(
        x[valid] - 0.5, y[valid] - 0.5, u, v, color=tints[valid], edgecolor=theme.text, linewidth=0.7,
        angles="xy", units="dots", scale_units="xy", scale=1, width=gap / 11, headwidth=3.6, headlength=4.2,
        headaxislength=4, minshaft=1.5, minlength=1.2,
    )  # fmt: skip
    axis.scatter(
        x[~valid] - 0.5, y[~valid] - 0.5, s=(0.72 * gap / 7) ** 2, facecolors="none",
        edgecolors=theme.text, linewidths=1.0,
    )  # fmt: skip
    note = f"arrows drawn at {_factor_text(factor)} their length"
    note += "" if inside.all() else "; rings: outside"
    _write(legend, ["From each pixel to its match in the other picture", note], 0, theme)
    _add_bar(legend, scale(std), theme)
    return Chart(figure)


def confidence(std: Floats, target: Floats, summary: str = "", *, theme: Theme = LIGHT) -> Chart:
    """Return the uncertainty as colors: bright where it is small, dark where it is large.

    The target's outlines are visible, for orientation; its brightness is not, since it would change the colors.

    Args:
        std: Uncertainty in pixels, shape (H, W). If it is 0 everywhere, as for a single hypothesis, the view is grey
            and says why.
        target: The picture whose grid `std` is on, RGB in [0, 1], shape (H, W, 3).
        summary: First line of the legend, such as the verdict; its first letter becomes a capital.
        theme: Colors of the legend.
    """
    norm = scale(std)
    painted = _std_colors(_resized(std, _view_size(std)), norm, theme)
    painted = np.clip(painted + _outlines(_resized_picture(target))[..., None], 0, 1)
    figure, legend = picture_figure(painted, theme=theme, legend=LEGEND, width=_WIDTH)
    if norm is None:
        lines = ["A single hypothesis has no spread:", "match with two samples or more"]
    else:
        lines = ["Uncertainty of each pixel's match:", "distance of the hypotheses from the flow"]
    _write(legend, [summary[:1].upper() + summary[1:]] * bool(summary) + lines, 0, theme)
    _add_bar(legend, norm, theme)
    return Chart(figure)


def scale(std: Floats) -> "LogNorm | None":
    """Return a logarithmic color scale for standard deviations, between their 2nd and 98th percentiles, rounded.

    `None` if all of them are 0.
    """
    from matplotlib.colors import LogNorm

    if not (std > 0).any():
        return None
    low, high = (float(v) for v in np.percentile(std, [2, 98]))
    high = _round_up(max(high, 1e-3))
    low = max(_round_down(max(low, high / 1000)), 1e-6) if low < high / 2 else high / 10
    return LogNorm(low, high, clip=True)


# --- parts of the views -----------------------------------------------------------------------------------------------


def _view_size(values: NDArray[Any]) -> tuple[int, int]:
    """Return the height and width of a view of values (H, W, ...)."""
    height, width = values.shape[:2]
    longer = max(height, width)
    zoom = min(max(longer, _SHORTEST), _LONGEST) / longer
    return max(round(height * zoom), 1), max(round(width * zoom), 1)


def _resized(values: Floats, size: tuple[int, int]) -> Floats:
    """Return values (H, W) resized bilinearly."""
    image = Image.fromarray(values.astype(np.float32))
    return np.asarray(image.resize((size[1], size[0]), Image.Resampling.BILINEAR))


def _resized_flow(flow: Floats, inside: Bools) -> tuple[Floats, Bools]:
    """Return the flow, its vectors unchanged, and where it stays inside, on the grid of the view."""
    size = _view_size(inside)
    resized = np.stack([_resized(channel, size) for channel in flow])
    return resized, _resized(inside.astype(np.float32), size) >= 0.5


def _resized_picture(pixels: Floats) -> Image.Image:
    height, width = _view_size(pixels)
    picture = Image.fromarray((np.clip(pixels, 0, 1) * 255).round().astype(np.uint8))
    return picture.resize((width, height), Image.Resampling.BILINEAR)


def _outlines(picture: Image.Image) -> Floats:
    """Return the outlines of a picture, weakly: its grey minus the same, blurred."""
    grey = picture.convert("L")
    blurred = grey.filter(ImageFilter.GaussianBlur(max(picture.size) / 100))
    detail = np.asarray(grey, dtype=np.float32) - np.asarray(blurred, dtype=np.float32)
    return np.clip(detail / 255 * 0.35, -0.12, 0.12).astype(np.float32)


def _faded(picture: Image.Image, theme: Theme) -> Floats:
    """Return a picture with half of its saturation and two thirds of its contrast."""
    grey = picture.convert("L").convert("RGB")
    background = Image.new("RGB", picture.size, theme.background)
    faded = Image.blend(Image.blend(picture, grey, 0.5), background, 0.35)
    return np.asarray(faded, dtype=np.float32) / np.float32(255)


def _hatched(painted: Floats, inside: Bools, theme: Theme) -> Floats:
    """Return painted pixels with hatching outside of the source."""
    from matplotlib.colors import to_rgb

    y, x = np.indices(inside.shape)
    line = np.expand_dims((x + y) % 12 < 3, -1)
    background, hatch = (np.array(to_rgb(c)) for c in (theme.background, theme.control))
    outside = np.where(line, hatch, 0.7 * background + 0.3 * painted)
    return np.where(np.expand_dims(inside, -1), painted, outside).astype(np.float32)


def _std_colors(std: Floats, norm: "LogNorm | None", theme: Theme) -> Floats:
    """Return the color of each standard deviation, RGB in [0, 1], (H, W, 3): viridis, bright where it is small."""
    from matplotlib import colormaps
    from matplotlib.colors import to_rgb

    if norm is None:
        return np.broadcast_to(np.array(to_rgb(theme.control), np.float32), (*std.shape, 3))
    return colormaps["viridis_r"](np.asarray(norm(std)))[..., :3].astype(np.float32)


def _write(legend: "Axes", lines: Sequence[str], left: int, theme: Theme) -> None:
    """Write lines into a legend, centred vertically; all but the first are fainter."""
    step = 25
    top = (LEGEND - step * (len(lines) - 1)) / 2
    for i, line in enumerate(lines):
        legend.text(
            PAD + left, top + i * step, line, va="center", fontsize=11 if i == 0 else 10,
            color=theme.text, alpha=1 if i == 0 else 0.72,
        )  # fmt: skip


def _add_bar(legend: "Axes", norm: "LogNorm | None", theme: Theme) -> None:
    """Draw the color scale at the right end of a legend; nothing if there is none."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    if norm is None:
        return
    width, length, low, high = (
        legend.get_xlim()[1],
        240,
        float(norm.vmin or 0),
        float(norm.vmax or 0),
    )
    left = width - PAD - length - 8
    axis = legend.inset_axes((left, 48, length, 18), transform=legend.transData)
    bar = legend.figure.colorbar(
        ScalarMappable(norm, "viridis_r"), cax=axis, orientation="horizontal"
    )
    steps = (1, 2, 5) if high / low <= 300 else (1,)
    axis.xaxis.set_major_locator(LogLocator(subs=steps, numticks=12))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.tick_params(colors=theme.text, labelsize=9, length=4)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    for text, x, align in (("certain", left, "left"), ("uncertain, px", left + length, "right")):
        legend.text(x, 36, text, ha=align, va="center", fontsize=10, color=theme.text)


def _round_up(value: float) -> float:
    """Return the next round number that is not below `value`; 1 if `value` is not positive."""
    if not value > 0:
        return 1.0
    unit = 10.0 ** math.floor(math.log10(value))
    steps = (1, 1.5, 2, 3, 4, 5, 6, 8, 10)
    return next(unit * s for s in steps if unit * s >= value * (1 - 1e-6))


def _round_down(value: float) -> float:
    """Return the next number 1, 2 or 5 times a power of ten that is not above `value`."""
    unit = 10.0 ** math.floor(math.log10(value))
    return next(unit * s for s in (5, 2, 1) if unit * s <= value * (1 + 1e-6))


def _arrow_factor(flow: Floats, inside: Bools, gap: float) -> float:
    """Return the round factor for the arrows' lengths, such that 90 % of them are at most 1.7 gaps long."""
    lengths = np.hypot(*flow)
    long = float(np.percentile(lengths[inside] if inside.any() else lengths, 90))
    steps = [10.0**e * m for e in range(2, -4, -1) for m in (5, 2, 1)]
    return next((s for s in steps if s <= 20 and long * s <= 1.7 * gap), steps[-1])


def _factor_text(factor: float) -> str:
    return f"{factor:g} times" if factor >= 1 else f"1/{round(1 / factor)} of"


def _evenly_spaced(length: int, gap: float) -> Floats:
    """Return coordinates that divide a length into parts of about `gap`, at the middle of each part."""
    count = max(round(length / gap), 1)
    return ((np.arange(count) + 0.5) * length / count).astype(np.float32)


def _ring() -> Floats:
    """Return the wheel's 55 colors, from the left, clockwise on the screen."""
    corners = np.array(_CORNERS, dtype=np.float32)
    rows = [
        corners[i] + (corners[i + 1] - corners[i]) * (k / count)
        for count, i in _RUNS
        for k in range(count)
    ]
    return np.stack(rows)
