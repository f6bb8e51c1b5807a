"""Figures: heat maps of states and bar charts of sites, on light and on dark paper, as PNG or SVG.

Drawn narrow, so that a phone shows them near their own size. A warm hue carries what is above zero, a cold one what is
below, at equal strength for equal size; grey is for controls, and hatching says that there is no value.
"""

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

__all__ = [
    "DARK", "LIGHT", "Bar", "BarPanel", "Chart", "Panel", "Point", "Theme", "bar_chart", "heat_map",
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
    """One heat map: values (rows, columns), NaN where there is none; rows are drawn from top to bottom."""

    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Bar:
    """One bar: its label and its group (the kind of site), a mean and its interval; NaN for no value."""

    label: str
    group: str
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class BarPanel:
    """One column of a bar chart: a title, and series by name, each with the same labels in the same order."""

    title: str
    series: tuple[tuple[str, tuple[Bar, ...]], ...]


@dataclass(frozen=True)
class Point:
    """One point of a scatter: where it lies, the interval of `y`, and its name."""

    x: float
    y: float
    low: float
    high: float
    label: str


@dataclass(frozen=True)
class Chart:
    """A finished figure; `figure` is matplotlib's, to be changed at will."""

    figure: "Figure"

    def png(self) -> bytes:
        """Return a PNG."""
        return self._bytes("png", {"Software": None})

    def svg(self) -> bytes:
        """Return an SVG."""
        return self._bytes("svg", {"Date": None, "Creator": None})

    def save(self, path: str | Path) -> Path:
        """Write a `.png` or an `.svg` file, beside and then renamed; return its path.

        Raises:
            ValueError: Another suffix.
        """
        path = Path(path)
        draw = {".png": self.png, ".svg": self.svg}.get(path.suffix.lower())
        if draw is None:
            raise ValueError(
                f"cannot draw a {path.suffix or 'file without suffix'!r}: end {path.name!r} in .png or .svg."
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(path.name + ".part")
        beside.write_bytes(draw())
        os.replace(beside, path)
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
    """Draw `panels` in rows of `columns` under one color scale that has its blank at 0.

    Args:
        panels: At least one.
        theme: Colors.
        columns: Panels side by side.
        unit: What the color bar shows.
    """
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    tallest = [
        max(len(p.rows) for p in panels[i * columns : (i + 1) * columns]) for i in range(rows)
    ]
    heights = [0.19 * max(n, 3) + 1.0 for n in tallest]
    figure = _figure(5.8, sum(heights) + 0.45, theme)
    axes = figure.subplots(rows, columns, squeeze=False, height_ratios=heights)
    found = np.array([v for p in panels for row in p.values for v in row], dtype=float)
    found = found[np.isfinite(found)]
    low, high = min([0.0, *found.tolist()]), max([1e-6, *found.tolist()])
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
    absent = any(not np.isfinite(v) for p in panels for row in p.values for v in row)
    bar.set_label(unit + (" (hatched: no value)" if absent else ""), color=theme.text, fontsize=8)
    bar.ax.tick_params(colors=theme.text, labelsize=7)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    return Chart(figure)


def bar_chart(panels: Sequence[BarPanel], *, theme: Theme, unit: str = "") -> Chart:
    """Draw one row of horizontal bars a label, one bar a series, with intervals; panels side by side.

    Args:
        panels: All with the same labels and series. The first series is drawn in the hue, others in grey.
        theme: Colors.
        unit: What the length means.
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
    """Draw a curve of settings, cost to the right and gain upwards, and mark the chosen one.

    Args:
        points: Cost, gain and name of each setting, along the curve.
        chosen: Which was chosen.
        theme: Its colors.
        axes: What cost and gain are.
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
    _plain(axis, theme)
    return Chart(figure)


def scatter(
    series: Mapping[str, Sequence[Point]], *, theme: Theme, axes: tuple[str, str]
) -> Chart:
    """Draw points with their vertical intervals; the first series is in the hue, each has a mark of its own.

    Args:
        series: By the name in the legend; at most five.
        theme: Its colors.
        axes: What lies to the right and what upwards.
    """
    figure = _figure(4.8, 3.5, theme)
    axis = figure.subplots()
    axis.set_facecolor(theme.background)
    colors = (theme.warm, theme.cold, theme.text, theme.control, theme.control)
    for (name, points), color, mark in zip(series.items(), colors, "osD^v", strict=False):
        x, y = ([getattr(p, at) for p in points] for at in "xy")
        errors = [[max(p.y - p.low, 0) for p in points], [max(p.high - p.y, 0) for p in points]]
        axis.errorbar(
            x, y, yerr=np.nan_to_num(errors), fmt=mark, label=name, color=color, markersize=5,
            elinewidth=0.8, alpha=0.9, markeredgewidth=0,
        )  # fmt: skip
    axis.axhline(0, color=theme.text, linewidth=0.8, zorder=0)
    axis.set_xlabel(axes[0], fontsize=7.5, color=theme.text)
    axis.set_ylabel(axes[1], fontsize=7.5, color=theme.text)
    axis.set_xlim(left=min(0.0, axis.get_xlim()[0]))
    axis.grid(color=theme.grid, linewidth=0.5)
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=7)
    _plain(axis, theme)
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


def _bars(axis: "Axes", panel: BarPanel, theme: Theme) -> None:
    thick = 0.8 / len(panel.series)
    for i, (name, bars) in enumerate(panel.series):
        places = np.arange(len(bars)) + (i - (len(panel.series) - 1) / 2) * thick
        means = np.array([bar.mean for bar in bars])
        errors = np.array([[b.mean - b.low for b in bars], [b.high - b.mean for b in bars]])
        axis.barh(
            places, means, height=thick * 0.9, label=name, color=theme.control if i else theme.warm,
            xerr=np.maximum(np.nan_to_num(errors), 0),
            error_kw={"ecolor": theme.text, "elinewidth": 0.7, "capsize": 0},
        )  # fmt: skip
        for place in places[~np.isfinite(means)]:
            axis.text(
                0.02, place, "no value", transform=axis.get_yaxis_transform(), va="center",
                fontsize=6.5 if thick > 0.5 else 5, color=theme.control,
            )  # fmt: skip
    groups = [bar.group for bar in panel.series[0][1]]
    for place in [i for i in range(1, len(groups)) if groups[i] != groups[i - 1]]:
        axis.axhline(place - 0.5, color=theme.grid, linewidth=0.8)
    axis.axvline(0, color=theme.text, linewidth=0.8)
    axis.grid(axis="x", color=theme.grid, linewidth=0.5)
    axis.set_axisbelow(True)
    axis.set_facecolor(theme.background)
    _plain(axis, theme)
    axis.tick_params(axis="x", labelsize=7)


def _colors(theme: Theme, low: float, high: float) -> "Colormap":
    """Return colors from `low` to `high` with paper at 0; equal distances from it are equally strong."""
    from matplotlib.colors import LinearSegmentedColormap, to_rgb

    def mixed(hue: str, share: float) -> tuple[float, ...]:
        pairs = zip(to_rgb(theme.background), to_rgb(hue), strict=True)
        return tuple(paper + share * (color - paper) for paper, color in pairs)

    most = max(high, -low)
    stops = [(-low / (high - low), to_rgb(theme.background)), (1.0, mixed(theme.warm, high / most))]
    if low < 0:
        stops.insert(0, (0.0, mixed(theme.cold, -low / most)))
    colors = LinearSegmentedColormap.from_list("overpaint", stops, N=512)
    return colors.with_extremes(bad=(0, 0, 0, 0))


def _figure(width: float, height: float, theme: Theme) -> "Figure":
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.07)
    return Figure(figsize=(width, height), dpi=160, facecolor=theme.background, layout=layout)


def _label(axis: "Axes", panel: Panel, theme: Theme, low: float, high: float) -> None:
    """Name rows and columns, and write the largest value, and the smallest if negative, into its cell."""
    axis.set_title(panel.title, fontsize=8.5, color=theme.text, loc="left")
    short = max(map(len, panel.columns), default=0) <= 2
    turn = {} if short else {"rotation": 35, "ha": "right", "rotation_mode": "anchor"}
    axis.set_xticks(range(len(panel.columns)), panel.columns, fontsize=7, **turn)
    axis.set_yticks(range(len(panel.rows)), panel.rows, fontsize=7)
    _plain(axis, theme)
    values = np.array(panel.values, dtype=float)
    if not np.isfinite(values).any():
        return
    cells = {int(np.nanargmax(values))}
    if np.nanmin(values) < -0.25 * max(high, -low):
        cells.add(int(np.nanargmin(values)))
    for cell in cells:
        row, column = divmod(cell, values.shape[1])
        strong = abs(values[row, column]) > 0.6 * max(high, -low)
        axis.text(
            column, row, f"{values[row, column]:.2f}", ha="center", va="center",
            fontsize=6.5 if values.shape[1] <= 8 else 4.5,
            color=theme.background if strong else theme.text,
        )  # fmt: skip


def _plain(axis: "Axes", theme: Theme) -> None:
    axis.tick_params(colors=theme.text, length=0)
    axis.spines[:].set_visible(False)
