"""The charts of the page: effects turned into figures, captions and alternative texts."""

import base64
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from overpaint import edit
from overpaint.edit import Change
from overpaint.evaluate.results import Comparison
from overpaint.images import charts
from overpaint.images.charts import Chart, Panel, Point, Theme
from overpaint.report import drift_section, tables
from overpaint.report.tables import signed
from overpaint.trace import Effects, plot

__all__ = ["SOURCES", "foretold", "text_charts", "unet_charts"]

_JUDGE, _COSINE = "icons-judge", {"count", "viewpoint"}  # the judge, and what it has no head for
SOURCES = {"clean_trajectory": "clean trajectory", "same_latent": "same latent (control)"}


def text_charts(effects: Effects) -> list[dict[str, Any]]:
    """Return the heat maps of a trace of the text encoder.

    The first shows the effect on the pictures, where pictures were drawn; the second how far the text features recover,
    in the trained encoder and in an untrained one of the same shape.
    """
    found: list[dict[str, Any]] = []
    if effects.mean("indirect_effect").num_rows:
        caption = (
            f"How much of the concept returns to the picture. {_scale(effects)}{_causal(effects)}"
        )
        panels = plot.map_panels(effects, "indirect_effect")
        found.append(_heat_map(effects, "indirect_effect", caption, panels))
    if effects.mean("embed_recovery").num_rows:
        caption = "How far the text features return to the clean ones."
        if "untrained" in effects.table["control"].to_pylist():
            caption += (
                " On the right an encoder of the same shape whose weights were never trained: what it shows too is the "
                "architecture's doing, not knowledge."
            )
        panels = plot.map_panels(effects, "embed_recovery")
        found.append(_heat_map(effects, "embed_recovery", caption, panels))
    return found


def unet_charts(effects: Mapping[str, Effects]) -> list[dict[str, Any]]:
    """Return the charts of one or two traces of the UNet, by source: bars, and maps of single heads if traced."""
    found = [_bar_chart(effects)]
    for source, one in effects.items():
        if panels := plot.head_panels(one, one.value()):
            caption = f"Single heads, {SOURCES[source]}. {_scale(one)}"
            found.append(_heat_map(one, one.value(), caption, panels))
    return found


def foretold(
    comparison: Comparison, predicted: drift_section.Predicted, folder: Path, *, best: str
) -> dict[str, Any] | None:
    """Return what was known before any picture: charts, tables and points of drift; `None` if nothing is saved.

    Args:
        comparison: What the judge saw.
        predicted: Drift by method and concept.
        folder: May hold the preferred change, `change.safetensors`.
        best: The preferred method, drawn in the hue.
    """
    found = drift_section.points(comparison, predicted)
    series = {name: found[name] for name in sorted(found, key=lambda name: name != best)}
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
    points = [point for found in series.values() for point in found]
    told = f" Their rank correlation is {signed(order, 2)}." if math.isfinite(order) else ""
    axes = (
        "predicted: share of the text features that moves",
        "measured: points that the judge lost",
    )
    worst = max(points, key=lambda point: point.y)
    return {
        "chart": _both(lambda theme: charts.scatter(series, theme=theme, axes=axes)),
        "width": 34.75,
        "alt": f"Scatter of {len(points)} points, predicted drift against measured loss.{told} The largest loss, "
        f"{worst.y:.0f} points, is of {worst.label} at a predicted drift of {worst.x:.2f}.",
        "caption": f"Predicted against measured: one point for each other {kind} under each method. To the right, how "
        "far its prompts' text features move, in units of their distance from the empty prompt, which is known before "
        f"any picture is drawn; upwards, how many points of recognition it lost, with 95 % intervals.{told} Points of "
        "one method share prompts and seeds, so they are not independent.",
    }


def _scan(change: Change) -> dict[str, Any]:
    scan = change.report["scan"]
    chosen = next(row for row in scan if row["chosen"])
    said = (
        f"weight {chosen['preserve_weight']:g}, where {100 * (1 - chosen['missed']):.0f} % of the movement asked for "
        f"is reached and other captions drift by {100 * chosen['drift']:.1f} %"
    )
    return {
        "chart": _both(lambda theme: edit.plot(change, theme=theme)),
        "alt": f"Curve of {len(scan)} preserve weights, cost against gain. The chosen one is {said}.",
        "width": 30.5,  # rem; 42 for a drawing of full width
        "caption": f"How the edit was balanced, from text alone: each point is a weight of what should stay. Chosen: "
        f"{said}, both on captions that nothing was fitted to.",
    }


def _bar_chart(effects: Mapping[str, Effects]) -> dict[str, Any]:
    first = next(iter(effects.values()))
    value = first.value()
    panels = plot.bar_panels({SOURCES[name]: found for name, found in effects.items()}, value)
    bars = [bar for panel in panels for bar in panel.series[0][1] if math.isfinite(bar.mean)]
    best = max(bars, key=lambda bar: bar.mean)
    caption = (
        f"Bars are means, lines 95 % bootstrap intervals over prompts. {_scale(first)} Sites are counted in the order "
        f"they run, each kind by itself.{_causal(first)}"
    )
    unit = plot.unit(first, value)
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
    unit = plot.unit(effects, value)
    return {
        "chart": _both(lambda theme: charts.heat_map(panels, theme=theme, unit=unit)),
        "alt": f"Heat maps of {len(panels)} kinds of states. The largest value, {largest[0]:.2f}, is at {where}.",
        "caption": f"{caption} The number stands in each panel's largest cell{_below(cells)}",
    }


def _below(cells: list[tuple[float, str, str, str]]) -> str:
    """Return the end of the caption: how damage is drawn, if there is any."""
    least = min(cells)
    if least[0] > -0.005:  # nought, to the digits shown
        return "."
    return f"; what is below zero, down to {signed(least[0], 2)}, is drawn in blue."


def _causal(effects: Effects) -> str:
    """Return which states are causal, in a sentence; nothing where there is no threshold."""
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
    found = ", ".join(names[:5]).replace("_", " ") if names else "none"
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return (
        f" Causal states, whose mean score reaches {about['threshold']:.2f} ({about['threshold_from']}) and whose "
        f"effect has a Holm-corrected p of at most {about['alpha']:g} among {about['family']} states over "
        f"{about['prompts_tested']} other prompts: {found}{more}."
    )


def _scale(effects: Effects) -> str:
    """Return what the scores were measured with, in a sentence."""
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
    """Draw a figure for light and for dark paper, as base64."""
    themes = {"light": charts.LIGHT, "dark": charts.DARK}
    return {name: base64.b64encode(draw(theme).png()).decode() for name, theme in themes.items()}
