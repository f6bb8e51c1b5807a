"""The settings that `auto` looked at: what each reaches and what it costs, with the chosen one."""

from pathlib import Path

from overpaint.edit.change import Change
from overpaint.images import charts
from overpaint.images.charts import Chart, Theme

__all__ = ["plot"]


def plot(change: Change, path: str | Path | None = None, *, theme: Theme = charts.LIGHT) -> Chart:
    """Draw the scan of a change made by `auto`: share of the movement reached against drift of the background.

    Args:
        change: Made by `auto`.
        path: A `.png` or `.svg` file to write as well.
        theme: Its colors.

    Raises:
        ValueError: The change was made in another way, or the file has another suffix.
    """
    scan = change.report.get("scan")
    if not scan:
        raise ValueError(
            f"a change by {change.protocol.get('method')!r} holds no scan to draw: make it with `edit.auto`, "
            "with `tokens=False` where token rows did it all, and draw it before it is compact or added to another."
        )
    points = [(row["drift"], 1 - row["missed"], f"{row['preserve_weight']:g}") for row in scan]
    chosen = next(i for i, row in enumerate(scan) if row["chosen"])
    labels = ("drift of captions that nothing was fitted to", "share of the movement reached")
    drawing = charts.trade_off(points, chosen=chosen, theme=theme, axes=labels)
    if path is not None:
        drawing.save(path)
    return drawing
