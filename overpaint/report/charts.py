"""The charts of the page: effects turned into figures, captions and alternative texts."""

import base64
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from overpaint.report import figures
from overpaint.report.figures import Bar, Panel, Theme
from overpaint.trace import Effects

__all__ = ["SOURCES", "text_charts", "unet_chart"]

SOURCES = {"clean_trajectory": "clean trajectory", "same_latent": "same latent (control)"}
UNITS = {
    "indirect_effect": "indirect effect: restored minus corrupted score",
    "embed_recovery": "share of the text features' way back that is recovered",
}
ROLES = ("subject", "last_subject", "after", "eos", "pad")
KINDS = {"self_attn": "self-attention", "mlp": "MLP"}
ORDER = ("cross_attn", "self_attn", "mlp", "resnet")


def text_charts(effects: Effects) -> list[dict[str, Any]]:
    """Return the heat maps of a trace of the text encoder.

    The first shows the effect on the pictures, where pictures were drawn; the second how far the text features recover,
    in the trained encoder and in an untrained one of the same shape.
    """
    found: list[dict[str, Any]] = []
    pictures = [_panel(effects, kind, "indirect_effect", "", name) for kind, name in KINDS.items()]
    if any(math.isfinite(v) for panel in pictures for row in panel.values for v in row):
        found.append(
            _heat_map(
                pictures,
                "indirect_effect",
                f"How much of the concept returns to the picture. {_scale(effects)}",
            )
        )
    controls = set(effects.table["control"].to_pylist())
    runs = {"": "trained", "untrained": "untrained"} if "untrained" in controls else {"": "trained"}
    features = [
        _panel(effects, kind, "embed_recovery", control, f"{name}, {run}")
        for kind, name in KINDS.items()
        for control, run in runs.items()
    ]
    caption = (
        "How far the text features return to the clean ones. On the right an encoder of the same shape whose weights "
        "were never trained: what it shows too is the architecture's doing, not knowledge."
    )
    return [
        *found,
        _heat_map(
            features,
            "embed_recovery",
            caption if len(runs) > 1 else caption.partition(". ")[0] + ".",
        ),
    ]


def unet_chart(effects: Mapping[str, Effects]) -> dict[str, Any]:
    """Return the bar chart of one or two traces of the UNet, by source."""
    series = [(SOURCES[source], _bars(found)) for source, found in effects.items()]
    first = next(iter(effects.values()))
    value = _value(first)
    best = max(series[0][1], key=lambda bar: bar.mean)
    caption = (
        f"Bars are means, lines 95 % bootstrap intervals over prompts. {_scale(first)} Sites are counted in the order "
        "they run, each kind by itself."
    )
    return {
        "chart": _both(lambda theme: figures.bar_chart(series, theme=theme, unit=UNITS[value])),
        "alt": f"Bar chart of {len(series[0][1])} UNet sites. The largest effect is at {best.label}, {best.mean:.2f}.",
        "caption": caption,
    }


def _heat_map(panels: Sequence[Panel], value: str, caption: str) -> dict[str, Any]:
    cells = [
        (v, panel.title, row, column)
        for panel in panels
        for row, values in zip(panel.rows, panel.values, strict=True)
        for column, v in zip(panel.columns, values, strict=True)
        if math.isfinite(v)
    ]
    largest = max(cells, default=(math.nan, "", "", ""))
    where = f"{largest[1]}, {largest[2]}, {largest[3]}"
    return {
        "chart": _both(lambda theme: figures.heat_map(panels, theme=theme, unit=UNITS[value])),
        "alt": f"Heat maps of text layers by kind of token. The largest value, {largest[0]:.2f}, is at {where}.",
        "caption": f"{caption} The number stands in each panel's largest cell; values below zero are drawn as zero.",
    }


def _panel(effects: Effects, kind: str, value: str, control: str, title: str) -> Panel:
    """Return the mean of `value` by layer and role for one kind of sublayer."""
    traced = effects.sites()
    layers = sorted(site.index for site in traced.values() if site.kind == kind)
    columns = (effects.table[name].to_pylist() for name in ("role", "control"))
    present = {role for role, run in zip(*columns, strict=True) if not run}
    roles = tuple(role for role in ROLES if role in present)
    means = {
        (traced[row["site"]].index, row["role"]): row["mean"]
        for row in effects.mean(value, control=control).to_pylist()
        if traced[row["site"]].kind == kind
    }
    values = tuple(tuple(means.get((n, role), math.nan) for role in roles) for n in layers)
    names = tuple(role.replace("_", " ") for role in roles)
    return Panel(title, tuple(f"layer {n}" for n in layers), names, values)


def _bars(effects: Effects) -> list[Bar]:
    """Return a bar for each site, by kind, and within a kind in the order they run."""
    traced = effects.sites()
    rows = effects.mean(_value(effects)).to_pylist()
    rows.sort(key=lambda row: (ORDER.index(traced[row["site"]].kind), traced[row["site"]].index))
    return [
        Bar(
            row["site"].removeprefix("unet."),
            traced[row["site"]].kind,
            row["mean"],
            row["low"],
            row["high"],
        )
        for row in rows
    ]


def _value(effects: Effects) -> str:
    drawn = effects.table["indirect_effect"].null_count < len(effects)
    return "indirect_effect" if drawn else "embed_recovery"


def _scale(effects: Effects) -> str:
    """Return what the scores were measured with, in a sentence."""
    about = effects.protocol
    return (
        f"Scored by {about.get('scorer', 'the judge')} as a probability; {about.get('probes', 'some')} prompts, "
        f"{about.get('steps', '?')} steps, guidance {about.get('guidance_scale', '?')}."
    )


def _both(draw: Callable[[Theme], bytes]) -> dict[str, str]:
    """Draw a figure for light and for dark paper, as base64."""
    themes = {"light": figures.LIGHT, "dark": figures.DARK}
    return {name: base64.b64encode(draw(theme)).decode() for name, theme in themes.items()}
