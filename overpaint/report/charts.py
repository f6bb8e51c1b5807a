"""The charts of the page, each with a caption and an alternative text."""

import base64
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from overpaint import edit
from overpaint.edit import Change
from overpaint.evaluate.predicted_drift import PredictedDrift
from overpaint.evaluate.results import Comparison
from overpaint.images import charts
from overpaint.images.charts import Chart, Panel, Point, Theme
from overpaint.report import drift_section, tables
from overpaint.report.tables import signed
from overpaint.trace import Effects, plot

__all__ = ["SOURCES", "predicted", "swap_charts", "text_charts", "unet_charts"]

_JUDGE, _COSINE = (
    "icons-judge",
    {"count", "viewpoint"},
)  # name of the judge, and the kinds of probes for which it has no head
SOURCES = {"clean_trajectory": "clean trajectory", "same_latent": "same latent (control)"}


def text_charts(effects: Effects) -> list[dict[str, Any]]:
    """Return the heat maps of a trace of the text encoder.

    The first shows the effect on the pictures, if pictures were drawn; the second the recovery of the text features, in
    the trained encoder and in an untrained one of the same shape.
    """
    shown: list[dict[str, Any]] = []
    if effects.mean("indirect_effect").num_rows:
        caption = f"Recovery of the concept in the picture. {_scale(effects)}{_causal(effects)}"
        panels = plot.map_panels(effects.table, "indirect_effect")
        shown.append(_heat_map(effects, "indirect_effect", caption, panels))
    if effects.mean("embed_recovery").num_rows:
        caption = "Recovery of the clean text features."
        if "untrained" in effects.table["control"].to_pylist():
            caption += (
                " On the right, an untrained encoder of the same shape: effects that it shows too come from the "
                "architecture, not from training."
            )
        panels = plot.map_panels(effects.table, "embed_recovery")
        shown.append(_heat_map(effects, "embed_recovery", caption, panels))
    return shown


def unet_charts(effects: Mapping[str, Effects]) -> list[dict[str, Any]]:
    """Return the charts of one or two traces of the UNet, by source: bars, and maps of single heads if traced."""
    shown = [_bar_chart(effects)]
    for source, trace in effects.items():
        if panels := plot.head_panels(trace.table, trace.value()):
            caption = f"Single heads, {SOURCES[source]}. {_scale(trace)}"
            shown.append(_heat_map(trace, trace.value(), caption, panels))
    return shown


def swap_charts(effects: Effects) -> list[dict[str, Any]]:
    """Return the bars of a prompt swap: one for each window of cross-attention layers."""
    about = effects.protocol
    targets: Sequence[str] = about.get("targets", ())
    window, count = about.get("window", 1), len(targets)
    others = f" and of {count - 1} other prompts" if count > 1 else ""
    read = f", for example {targets[0]!r}{others}" if targets else ""
    wanted = "show the target" if about.get("pick") == "max" else "no longer show the concept"
    note = (
        f" Bars are windows of {window} consecutive cross-attention layers, named by their first layer, that read the "
        f"text features of the target prompt{read}. A positive effect means that the pictures {wanted}."
    )
    chart = _bar_chart({"": effects})
    return [{**chart, "caption": chart["caption"] + note}]


def predicted(
    comparison: Comparison, drift: PredictedDrift, folder: Path, *, best: str
) -> dict[str, Any] | None:
    """Return the charts, tables and points of predictions from text features; `None` if none are saved.

    Args:
        comparison: The measured scores.
        drift: Predicted drift by method and concept; may be empty.
        folder: May hold the preferred change, `change.safetensors`.
        best: The preferred method, drawn in the accent color.
    """
    by_method = drift_section.points(comparison, drift)
    series = {n: by_method[n] for n in sorted(by_method, key=lambda name: name != best)}
    shown = [_scatter(comparison, series)] if series else []
    path = folder / "change.safetensors"
    report = Change.load(path).report if path.is_file() else {}
    if report.get("scan"):
        shown.append(_scan(Change.load(path)))
    danger = tables.endangered(report)
    rows = [{"method": name, **asdict(point)} for name, ps in series.items() for point in ps]
    if not shown and danger is None:
        return None
    return {"charts": shown, "tables": [danger] if danger else [], "points": rows}


def _scatter(comparison: Comparison, series: Mapping[str, Sequence[Point]]) -> dict[str, Any]:
    kind = next(iter(comparison.scores.values())).kind
    order = drift_section.rank_correlation(series)
    points = [point for rows in series.values() for point in rows]
    correlation = f" Their rank correlation is {signed(order, 2)}." if math.isfinite(order) else ""
    axes = (
        "predicted: relative drift of the text features",
        "measured: loss of recognition in points",
    )
    worst = max(points, key=lambda point: point.y)
    return {
        "chart": _both(lambda theme: charts.scatter(series, theme=theme, axes=axes)),
        "width": 34.75,
        "alt": f"Scatter of {len(points)} points, predicted drift against measured loss.{correlation} The largest "
        f"loss, {worst.y:.0f} points, is of {worst.label} at a predicted drift of {worst.x:.2f}.",
        "caption": f"Predicted against measured: one point for each other {kind} under each method. To the right, the "
        "drift of the text features of its prompts, in units of their distance from the empty prompt, which is known "
        f"before any picture is drawn; upwards, the measured loss of recognition in points, with 95 % intervals."
        f"{correlation} Points of one method share prompts and seeds, so they are not independent.",
    }


def _scan(change: Change) -> dict[str, Any]:
    scan = change.report["scan"]
    chosen = next(row for row in scan if row["chosen"])
    description = (
        f"weight {chosen['preserve_weight']:g}, where {100 * (1 - chosen['missed']):.0f} % of the requested movement "
        f"is reached and the drift of other captions is {100 * chosen['drift']:.1f} %"
    )
    return {
        "chart": _both(lambda theme: edit.plot(change, theme=theme)),
        "alt": f"Curve of {len(scan)} preserve weights, cost against gain. The chosen one is {description}.",
        "width": 30.5,  # rem; 42 for a drawing of full width
        "caption": f"Choice of the preserve weight from text features: one point for each weight. Chosen: "
        f"{description}, both on captions that the edit was not fitted to.",
    }


def _bar_chart(effects: Mapping[str, Effects]) -> dict[str, Any]:
    first = next(iter(effects.values()))
    value = first.value()
    tables = {SOURCES.get(name, name): trace.table for name, trace in effects.items()}
    panels = plot.bar_panels(tables, value)
    bars = [bar for panel in panels for bar in panel.series[0][1] if math.isfinite(bar.mean)]
    best = max(bars, key=lambda bar: bar.mean)
    caption = (
        f"Bars are means, lines 95 % bootstrap intervals over prompts. {_scale(first)} Sites are numbered in "
        f"execution order, each kind separately.{_causal(first)}"
    )
    unit = plot.unit(first.table, value)
    return {
        "chart": _both(lambda theme: charts.bar_chart(panels, theme=theme, unit=unit)),
        "alt": f"Bar chart of {len(panels[0].series[0][1])} UNet sites. The largest effect is at {best.label}, "
        f"{best.mean:.2f}.",
        "caption": caption,
    }


def _heat_map(
    effects: Effects, value: str, caption: str, panels: Sequence[Panel]
) -> dict[str, Any]:
    cells = [
        (v, panel.title, row, column)
        for panel in panels
        for row, values in zip(panel.rows, panel.values, strict=True)
        for column, v in zip(panel.columns, values, strict=True)
        if math.isfinite(v)
    ]
    largest = max(cells)
    where = f"{largest[1]}, {largest[2]}, {largest[3]}"
    unit = plot.unit(effects.table, value)
    return {
        "chart": _both(lambda theme: charts.heat_map(panels, theme=theme, unit=unit)),
        "alt": f"Heat maps of {len(panels)} kinds of states. The largest value, {largest[0]:.2f}, is at {where}.",
        "caption": f"{caption} The number is in the largest cell of each panel{_below(cells)}",
    }


def _below(cells: list[tuple[float, str, str, str]]) -> str:
    """Return the end of the caption: the color of negative values, if there are any."""
    least = min(cells)
    if least[0] > -0.005:  # 0, to the digits shown
        return "."
    return f"; negative values, down to {signed(least[0], 2)}, are blue."


def _causal(effects: Effects) -> str:
    """Return a sentence with the causal states; an empty string without a threshold."""
    verdict = effects.test()
    about = verdict.protocol
    if about["threshold"] is None:
        return ""
    if verdict.reason:
        return f" {verdict.reason[:1].upper()}{verdict.reason[1:]}."
    names = [
        " ".join(str(row[key]) for key in ("site", "role", "window") if row[key])
        + (f" head {row['head']}" if row["head"] is not None else "")
        for row in verdict.table.to_pylist()
        if row["causal"]
    ]
    listed = ", ".join(names[:5]).replace("_", " ") if names else "none"
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return (
        f" Causal states, whose mean score reaches {about['threshold']:.2f} ({about['threshold_from']}) and whose "
        f"effect has a Holm-corrected p of at most {about['alpha']:g} among {about['family']} states over "
        f"{about['prompts_tested']} other prompts: {listed}{more}."
    )


def _scale(effects: Effects) -> str:
    """Return a sentence with the settings of the scores."""
    about = effects.protocol
    scorer = about.get("scorer", "the judge")
    kinds = set(effects.table["attribute"].to_pylist())
    units = [
        *(["as a probability"] if kinds - _COSINE else []),
        *(["as the raw cosine of picture and prompt"] if kinds & _COSINE else []),
    ]
    how = f" {' or, for counts and views, '.join(units)}" if scorer == _JUDGE else ""
    return (
        f"Scored by {scorer}{how}; {about.get('probes', 'some')} prompts, "
        f"{about.get('steps', '?')} steps, guidance {about.get('guidance_scale', '?')}."
    )


def _both(draw: Callable[[Theme], Chart]) -> dict[str, str]:
    """Return a figure for light and for dark background, as base64."""
    themes = {"light": charts.LIGHT, "dark": charts.DARK}
    return {name: base64.b64encode(draw(theme).png()).decode() for name, theme in themes.items()}
