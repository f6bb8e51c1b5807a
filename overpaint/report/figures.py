"""Figures: a heat map of states and a bar chart of sites, as PNG bytes, on light and on dark paper.

Drawn narrow, so that a phone shows them near their own size. One hue carries the data; grey is for controls.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["DARK", "LIGHT", "Bar", "Panel", "Theme", "bar_chart", "heat_map"]


@dataclass(frozen=True)
class Theme:
    """Colors of a figure: paper, ink, faint ink for grids, the data's hue and the control's grey."""

    paper: str
    ink: str
    faint: str
    hue: str
    control: str


LIGHT = Theme("#ffffff", "#1f2430", "#d5d8df", "#b4432f", "#8d95a5")
DARK = Theme("#181b22", "#e6e8ee", "#3a404d", "#f08a6c", "#7f8898")


@dataclass(frozen=True)
class Panel:
    """One heat map: values (rows, columns), NaN where there is none; rows are drawn from top to bottom."""

    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Bar:
    """One bar: its label and its group (the kind of site), a mean and the bounds of its interval."""

    label: str
    group: str
    mean: float
    low: float
    high: float


def heat_map(panels: Sequence[Panel], *, theme: Theme, columns: int = 2, unit: str = "") -> bytes:
    """Draw `panels` in rows of `columns` under one color scale from 0 and return a PNG.

    Args:
        panels: At least one.
        theme: Colors.
        columns: Panels side by side.
        unit: What the color bar shows.
    """
    from matplotlib.colors import LinearSegmentedColormap

    rows = -(-len(panels) // columns)
    height = sum(
        0.19 * max(len(p.rows) for p in panels[i : i + columns]) + 1.0
        for i in range(0, len(panels), columns)
    )
    figure = _figure(5.8, height + 0.35, theme)
    axes = figure.subplots(rows, columns, squeeze=False)
    found = np.array([v for p in panels for row in p.values for v in row], dtype=float)
    high = max(float(np.nanmax(found)), 1e-6) if np.isfinite(found).any() else 1.0
    hues = LinearSegmentedColormap.from_list("overpaint", [theme.paper, theme.hue])
    colors = hues.with_extremes(bad=theme.faint)
    image: Any = None
    for axis, panel in zip(axes.flat, panels, strict=False):
        image = axis.imshow(np.array(panel.values), cmap=colors, vmin=0, vmax=high, aspect="auto")
        _label(axis, panel, theme, mark=high)
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_visible(False)
    bar = figure.colorbar(
        image, ax=axes, orientation="horizontal", fraction=0.035, aspect=45, pad=0.02
    )
    bar.set_label(unit, color=theme.ink, fontsize=8)
    bar.ax.tick_params(colors=theme.ink, labelsize=7)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    return _png(figure)


def bar_chart(
    series: Sequence[tuple[str, Sequence[Bar]]], *, theme: Theme, unit: str = ""
) -> bytes:
    """Draw one row of horizontal bars a label, one bar a series, with intervals; return a PNG.

    Args:
        series: Name and bars; all with the same labels in the same order. The first is drawn in the hue.
        theme: Colors.
        unit: What the length means.
    """
    labels = [bar.label for bar in series[0][1]]
    figure = _figure(5.8, 0.19 * len(labels) + 1.1, theme)
    axis = figure.subplots()
    thick = 0.8 / len(series)
    places = np.arange(len(labels))
    for i, (name, bars) in enumerate(series):
        means = np.array([b.mean for b in bars])
        errors = np.array([[b.mean - b.low for b in bars], [b.high - b.mean for b in bars]])
        axis.barh(
            places + (i - (len(series) - 1) / 2) * thick, means, height=thick * 0.9, label=name,
            color=theme.hue if i == 0 else theme.control, xerr=np.maximum(np.nan_to_num(errors), 0),
            error_kw={"ecolor": theme.ink, "elinewidth": 0.7, "capsize": 0},
        )  # fmt: skip
    groups = [bar.group for bar in series[0][1]]
    for place in [i for i in range(1, len(groups)) if groups[i] != groups[i - 1]]:
        axis.axhline(place - 0.5, color=theme.faint, linewidth=0.8)
    axis.axvline(0, color=theme.ink, linewidth=0.8)
    axis.set_yticks(places, labels, fontsize=7)
    axis.set_ylim(len(labels) - 0.5, -0.5)
    axis.set_xlabel(unit, color=theme.ink, fontsize=8)
    axis.grid(axis="x", color=theme.faint, linewidth=0.5)
    axis.set_axisbelow(True)
    _plain(axis, theme)
    axis.tick_params(axis="x", labelsize=7)
    figure.legend(
        *axis.get_legend_handles_labels(), loc="outside upper left", ncols=len(series), frameon=False,
        fontsize=8, labelcolor=theme.ink,
    )  # fmt: skip
    return _png(figure)


def _figure(width: float, height: float, theme: Theme) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=160, facecolor=theme.paper, layout="constrained")


def _label(axis: "Axes", panel: Panel, theme: Theme, *, mark: float) -> None:
    """Name rows and columns, and write the largest value into its cell."""
    axis.set_title(panel.title, fontsize=8.5, color=theme.ink, loc="left")
    axis.set_xticks(range(len(panel.columns)), panel.columns, fontsize=7, rotation=35, ha="right")
    axis.set_yticks(range(len(panel.rows)), panel.rows, fontsize=7)
    _plain(axis, theme)
    values = np.array(panel.values, dtype=float)
    if np.isfinite(values).any():
        row, column = np.unravel_index(np.nanargmax(values), values.shape)
        dark = values[row, column] > 0.6 * mark
        axis.text(
            float(column), float(row), f"{values[row, column]:.2f}", ha="center", va="center", fontsize=6.5,
            color=theme.paper if dark else theme.ink,
        )  # fmt: skip


def _plain(axis: "Axes", theme: Theme) -> None:
    axis.set_facecolor(theme.paper)
    axis.tick_params(colors=theme.ink, length=0)
    axis.spines[:].set_visible(False)


def _png(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
