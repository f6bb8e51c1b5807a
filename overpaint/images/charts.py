"""Charts: heat maps, bar charts and scatter plots with a light or a dark theme, as PNG or SVG.

Charts are narrow, so that phones show them at about their own size. Values above zero have a warm color and values
below zero a cold one, equally strong for equal magnitude. Controls are grey. Hatched cells have no value.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from overpaint import files

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

__all__ = [
    "DARK", "LIGHT", "Bar", "BarPanel", "Chart", "Panel", "Point", "Theme", "bar_chart", "heat_map", "picture_figure",
    "scatter", "trade_off",
]  # fmt: skip


@dataclass(frozen=True)
class Theme:
    """Colors of a figure: background, text, grid lines, values above (`warm`) and below zero (`cold`), controls."""

    background: str
    text: str
    grid: str
    warm: str
    cold: str
    control: str


LIGHT = Theme("#ffffff", "#1f2430", "#d5d8df", "#b4432f", "#2d6aa8", "#8d95a5")
DARK = Theme("#181b22", "#e6e8ee", "#3a404d", "#f08a6c", "#6aa9ec", "#7f8898")


@dataclass(frozen=True)
class Panel:
    """One heat map: values (rows, columns), NaN for no value; the first row is at the top."""

    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Bar:
    """One bar: label, group (the kind of site), mean and interval; NaN for no value."""

    label: str
    group: str
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class BarPanel:
    """One column of a bar chart: a title and named series, which have the same labels in the same order."""

    title: str
    series: tuple[tuple[str, tuple[Bar, ...]], ...]


@dataclass(frozen=True)
class Point:
    """One point of a scatter plot: coordinates, interval of `y`, and label."""

    x: float
    y: float
    low: float
    high: float
    label: str


@dataclass(frozen=True)
class Chart:
    """A chart; `figure` is the matplotlib figure."""

    figure: "Figure"

    def png(self) -> bytes:
        """Return a PNG."""
        return self._bytes("png", {"Software": None})

    def svg(self) -> bytes:
        """Return an SVG."""
        return self._bytes("svg", {"Date": None, "Creator": None})

    def save(self, path: str | Path) -> Path:
        """Write a `.png` or `.svg` file and return its path; its folder is created.

        Raises:
            ValueError: The suffix is neither `.png` nor `.svg`.
        """
        path = files.user_path(path, "path")
        render = {".png": self.png, ".svg": self.svg}.get(path.suffix.lower())
        if render is None:
            raise ValueError(f"cannot write a chart as {path.name!r}: use the suffix .png or .svg.")
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.atomic(path) as draft:
            draft.write_bytes(render())
        return path

    def _repr_png_(self) -> bytes:
        return self.png()

    def _bytes(self, form: str, metadata: dict[str, Any]) -> bytes:
        from matplotlib import rc_context

        buffer = io.BytesIO()
        with rc_context({"svg.hashsalt": "overpaint", "svg.fonttype": "none"}):
            self.figure.savefig(buffer, format=form, metadata=metadata)
        return buffer.getvalue()


def heat_map(panels: Sequence[Panel], *, theme: Theme, columns: int = 2, unit: str = "") -> Chart:
    """Return heat maps in rows of `columns`, with one color scale whose 0 is the background color.

    Args:
        panels: At least one.
        theme: Colors.
        columns: Panels in a row.
        unit: Label of the color bar.
    """
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    tallest = [
        max(len(p.rows) for p in panels[i * columns : (i + 1) * columns]) for i in range(rows)
    ]
    heights = [0.19 * max(n, 3) + 1.0 for n in tallest]
    figure = _figure(5.8, sum(heights) + 0.45, theme)
    axes = figure.subplots(rows, columns, squeeze=False, height_ratios=heights)
    numbers = np.array([v for p in panels for row in p.values for v in row], dtype=float)
    finite = numbers[np.isfinite(numbers)]
    low, high = min([0.0, *finite.tolist()]), max([1e-6, *finite.tolist()])
    image: Any = None
    for axis, panel in zip(axes.flat, panels, strict=False):
        values = np.array(panel.values, dtype=float)
        axis.set_facecolor(theme.background)
        axis.patch.set(hatch="//////", edgecolor=theme.grid, linewidth=0)
        image = axis.imshow(
            np.ma.masked_invalid(values), cmap=_colors(theme, low, high), vmin=low, vmax=high, aspect="auto"
        )  # fmt: skip
        _label(axis, panel, theme, low, high)
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_visible(False)
    bar = figure.colorbar(
        image, ax=axes, orientation="horizontal", fraction=0.035, aspect=45, pad=0.02
    )
    has_gaps = len(finite) < len(numbers)
    bar.set_label(unit + (" (hatched: no value)" if has_gaps else ""), color=theme.text, fontsize=8)
    bar.ax.tick_params(colors=theme.text, labelsize=7)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    return Chart(figure)


def bar_chart(panels: Sequence[BarPanel], *, theme: Theme, unit: str = "") -> Chart:
    """Return a chart of horizontal bars with intervals: one row for each label, one bar for each series.

    Args:
        panels: Drawn side by side, with the same labels and series. The first series is warm, others are grey.
        theme: Colors.
        unit: Label of the horizontal axis.
    """
    bars = panels[0].series[0][1]
    figure = _figure(max(5.8, 2.2 + 1.7 * len(panels)), 0.19 * len(bars) + 1.2, theme)
    axes = figure.subplots(1, len(panels), squeeze=False, sharex=True, sharey=True)[0]
    for axis, panel in zip(axes, panels, strict=True):
        _bars(axis, panel, theme)
        axis.set_title(panel.title, fontsize=8.5, color=theme.text, loc="left")
    axes[0].set_yticks(np.arange(len(bars)), [bar.label for bar in bars], fontsize=7)
    axes[0].set_ylim(len(bars) - 0.5, -0.5)
    figure.supxlabel(unit, color=theme.text, fontsize=8)
    if any(name for name, _ in panels[0].series):
        figure.legend(
            *axes[0].get_legend_handles_labels(), loc="outside upper left", frameon=False,
            ncols=len(panels[0].series), fontsize=8, labelcolor=theme.text,
        )  # fmt: skip
    return Chart(figure)


def trade_off(
    points: Sequence[tuple[float, float, str]], *, chosen: int, theme: Theme, axes: tuple[str, str]
) -> Chart:
    """Return a curve of settings, with cost on the horizontal and gain on the vertical axis, and the chosen one marked.

    Args:
        points: Cost, gain and name of each setting, along the curve.
        chosen: Index of the chosen setting.
        theme: Colors.
        axes: Labels of the horizontal and vertical axis.
    """
    figure = _figure(4.2, 3.0, theme)
    axis = figure.subplots()
    axis.set_facecolor(theme.background)
    costs, gains, names = zip(*points, strict=True)
    axis.plot(costs, gains, color=theme.control, linewidth=1, zorder=1)
    colors = [theme.warm if i == chosen else theme.cold for i in range(len(points))]
    axis.scatter(
        costs, gains, c=colors, s=[34 if i == chosen else 14 for i in range(len(points))], zorder=2
    )
    for i, (cost, gain, name) in enumerate(points):
        axis.annotate(
            f"{name} (chosen)" if i == chosen else name, (cost, gain), xytext=(6, -9),
            textcoords="offset points", fontsize=7, color=colors[i],
        )  # fmt: skip
    axis.set_xlabel(axes[0], fontsize=7.5, color=theme.text)
    axis.set_ylabel(axes[1], fontsize=7.5, color=theme.text)
    axis.margins(0.16)
    axis.grid(color=theme.grid, linewidth=0.5)
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=7)
    _hide_frame(axis, theme)
    return Chart(figure)


def scatter(series: Mapping[str, Sequence[Point]], *, theme: Theme, axes: tuple[str, str]) -> Chart:
    """Return a scatter plot with vertical intervals; the first series is warm, and each has its own marker.

    Args:
        series: Points by their name in the legend; at most five series.
        theme: Colors.
        axes: Labels of the horizontal and vertical axis.
    """
    figure = _figure(4.8, 3.5, theme)
    axis = figure.subplots()
    axis.set_facecolor(theme.background)
    colors = (theme.warm, theme.cold, theme.text, theme.control, theme.control)
    for (name, points), color, marker in zip(series.items(), colors, "osD^v", strict=False):
        x, y = [p.x for p in points], [p.y for p in points]
        errors = [[max(p.y - p.low, 0) for p in points], [max(p.high - p.y, 0) for p in points]]
        axis.errorbar(
            x, y, yerr=np.nan_to_num(errors), fmt=marker, label=name, color=color, markersize=5,
            elinewidth=0.8, alpha=0.9, markeredgewidth=0,
        )  # fmt: skip
    axis.axhline(0, color=theme.text, linewidth=0.8, zorder=0)
    axis.set_xlabel(axes[0], fontsize=7.5, color=theme.text)
    axis.set_ylabel(axes[1], fontsize=7.5, color=theme.text)
    axis.set_xlim(left=min(0.0, axis.get_xlim()[0]))
    axis.grid(color=theme.grid, linewidth=0.5)
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=7)
    _hide_frame(axis, theme)
    figure.legend(
        loc="outside upper left",
        frameon=False,
        ncols=4,
        fontsize=7.5,
        labelcolor=theme.text,
        handletextpad=0.2,
        columnspacing=1.2,
    )
    return Chart(figure)


def picture_figure(
    pixels: np.ndarray, *, theme: Theme, legend: int, width: int
) -> "tuple[Figure, Axes]":
    """Return a figure that shows a picture, one to one, above an empty legend, and the axes of the legend.

    The axes of the legend are in pixels: (0, 0) is its upper left corner.

    Args:
        pixels: RGB in [0, 1], shape (H, W, 3).
        theme: Colors.
        legend: Height of the legend, in pixels.
        width: Least width of the figure, in pixels; a narrower picture is centred.
    """
    from matplotlib.figure import Figure

    height, shown = pixels.shape[:2]
    width, total = max(width, shown), height + legend
    left = (width - shown) // 2
    # A little more than whole pixels, since matplotlib rounds down.
    size = ((width + 0.01) / 100, (total + 0.01) / 100)
    figure = Figure(figsize=size, dpi=100, facecolor=theme.background)
    axis = figure.add_axes((left / width, legend / total, shown / width, height / total))
    axis.imshow(pixels, interpolation="none", aspect="auto")
    strip = figure.add_axes((0, 0, 1, legend / total))
    strip.set(xlim=(0, width), ylim=(legend, 0))
    for each in (axis, strip):
        each.set_axis_off()
        each.autoscale(False)
    return figure, strip


def _bars(axis: "Axes", panel: BarPanel, theme: Theme) -> None:
    height = 0.8 / len(panel.series)
    for i, (name, bars) in enumerate(panel.series):
        positions = np.arange(len(bars)) + (i - (len(panel.series) - 1) / 2) * height
        means = np.array([bar.mean for bar in bars])
        errors = np.array([[b.mean - b.low for b in bars], [b.high - b.mean for b in bars]])
        axis.barh(
            positions, means, height=height * 0.9, label=name, color=theme.control if i else theme.warm,
            xerr=np.maximum(np.nan_to_num(errors), 0),
            error_kw={"ecolor": theme.text, "elinewidth": 0.7, "capsize": 0},
        )  # fmt: skip
        for position in positions[~np.isfinite(means)]:
            axis.text(
                0.02, position, "no value", transform=axis.get_yaxis_transform(), va="center",
                fontsize=6.5 if height > 0.5 else 5, color=theme.control,
            )  # fmt: skip
    groups = [bar.group for bar in panel.series[0][1]]
    for i in range(1, len(groups)):
        if groups[i] != groups[i - 1]:
            axis.axhline(i - 0.5, color=theme.grid, linewidth=0.8)
    axis.axvline(0, color=theme.text, linewidth=0.8)
    axis.grid(axis="x", color=theme.grid, linewidth=0.5)
    axis.set_axisbelow(True)
    axis.set_facecolor(theme.background)
    _hide_frame(axis, theme)
    axis.tick_params(axis="x", labelsize=7)


def _colors(theme: Theme, low: float, high: float) -> "Colormap":
    """Return a color map from `low` to `high`, the background at 0, equally strong for equal magnitude."""
    from matplotlib.colors import LinearSegmentedColormap, to_rgb

    def blended(name: str, share: float) -> tuple[float, ...]:
        pairs = zip(to_rgb(theme.background), to_rgb(name), strict=True)
        return tuple(start + share * (end - start) for start, end in pairs)

    largest = max(high, -low)
    stops = [
        (-low / (high - low), to_rgb(theme.background)),
        (1.0, blended(theme.warm, high / largest)),
    ]
    if low < 0:
        stops.insert(0, (0.0, blended(theme.cold, -low / largest)))
    colors = LinearSegmentedColormap.from_list("overpaint", stops, N=512)
    return colors.with_extremes(bad=(0, 0, 0, 0))


def _figure(width: float, height: float, theme: Theme) -> "Figure":
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.07)
    return Figure(figsize=(width, height), dpi=160, facecolor=theme.background, layout=layout)


def _label(axis: "Axes", panel: Panel, theme: Theme, low: float, high: float) -> None:
    """Label rows and columns, and print the largest value, and the smallest if clearly negative, in its cell."""
    axis.set_title(panel.title, fontsize=8.5, color=theme.text, loc="left")
    is_short = max(map(len, panel.columns), default=0) <= 2
    rotation = {} if is_short else {"rotation": 35, "ha": "right", "rotation_mode": "anchor"}
    axis.set_xticks(range(len(panel.columns)), panel.columns, fontsize=7, **rotation)
    axis.set_yticks(range(len(panel.rows)), panel.rows, fontsize=7)
    _hide_frame(axis, theme)
    values = np.array(panel.values, dtype=float)
    if not np.isfinite(values).any():
        return
    cells = {int(np.nanargmax(values))}
    if np.nanmin(values) < -0.25 * max(high, -low):
        cells.add(int(np.nanargmin(values)))
    for cell in cells:
        row, column = divmod(cell, values.shape[1])
        is_strong = abs(values[row, column]) > 0.6 * max(high, -low)
        axis.text(
            column, row, f"{values[row, column]:.2f}", ha="center", va="center",
            fontsize=6.5 if values.shape[1] <= 8 else 4.5,
            color=theme.background if is_strong else theme.text,
        )  # fmt: skip


def _hide_frame(axis: "Axes", theme: Theme) -> None:
    axis.tick_params(colors=theme.text, length=0)
    axis.spines[:].set_visible(False)
