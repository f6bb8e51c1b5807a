"""Plot of the preserve weights that `auto` compared: movement reached against drift, with the chosen one."""

from pathlib import Path

from overpaint.edit.change import Change
from overpaint.images import charts
from overpaint.images.charts import Chart, Theme

__all__ = ["plot"]


def plot(change: Change, path: str | Path | None = None, *, theme: Theme = charts.LIGHT) -> Chart:
    """Return a plot of the scan of a change made by `auto`: share of movement reached against background drift.

    Args:
        change: Made by `auto`.
        path: If given, a `.png` or `.svg` file that is also written.
        theme: The colors.

    Raises:
        ValueError: The change has no scan, or the file has another suffix.
    """
    scan = change.report.get("scan")
    if not scan:
        raise ValueError(
            f"a change by {change.protocol.get('method')!r} has no scan to plot: make it with `edit.auto`, with "
            "`tokens=False` if only token rows moved, and plot it before it is compacted or added to another."
        )
    points = [(row["drift"], 1 - row["missed"], f"{row['preserve_weight']:g}") for row in scan]
    chosen = next(i for i, row in enumerate(scan) if row["chosen"])
    labels = ("drift of captions that are not fitted", "share of the movement reached")
    drawing = charts.trade_off(points, chosen=chosen, theme=theme, axes=labels)
    if path is not None:
        drawing.save(path)
    return drawing
