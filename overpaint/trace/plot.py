"""Maps and bars of effects: which layer, at which token, head and window of steps.

Text: a heat map of layers by token roles for each kind of sublayer, with the untrained encoder beside it where it
was measured. UNet: bars with intervals, one panel a window of steps. Single heads: sites by heads.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

from overpaint.images import charts
from overpaint.images.charts import (
    Bar,
    BarPanel,
    Chart,
    Panel,
    Theme,
)
from overpaint.model.sites import Site
from overpaint.trace import states
from overpaint.trace.effects import Effects
from overpaint.trace.states import ROLES, State

__all__ = ["UNITS", "bar_panels", "draw", "head_panels", "map_panels", "unit"]

UNITS = {
    "indirect_effect": "indirect effect: restored minus corrupted score",
    "recovery": "share of the score's way back that is recovered",
    "score_restored": "score with the state restored",
    "embed_recovery": "share of the text features' way back that is recovered",
    "embed_recovery_pads": "share of the way back recovered at end of text and padding",
    "latent_recovery": "share of the latents' way back that is recovered",
    "attribution": "gradient attribution: estimated indirect effect",
}
_KINDS = {
    "cross_attn": "cross-attention", "self_attn": "self-attention", "mlp": "MLP",
    "resnet": "ResNet", "group": "groups",
}  # fmt: skip
_PARTS = {"text2": ", 2nd encoder"}
_WINDOWS = {"": "all steps", "early": "early steps", "middle": "middle steps", "late": "late steps"}
_MIRRORED = {"indirect_effect": "indirect effect: clean minus score with the state corrupted"}


def draw(effects: Effects, kind: str | None, *, value: str, theme: Theme | None) -> Chart:
    """Draw a map or bars; see `Effects.plot`.

    Raises:
        ValueError: No such kind, or no state has the value.
    """
    if kind not in (None, "map", "bars"):
        raise ValueError(f"unknown kind of plot {kind!r}: choose 'map' or 'bars'.")
    found = _means(effects, value)
    if not found:
        raise ValueError(f"no state has a {value!r}: plot another value, or trace with pictures.")
    paper = theme or charts.LIGHT
    sites = effects.sites()
    bars = all(sites[s.site].part == "unet" for s in found) and any(s.head is None for s in found)
    if kind == "bars" or (kind is None and bars):
        panels = bar_panels({"": effects}, value)
        return charts.bar_chart(panels, theme=paper, unit=unit(effects, value))
    return charts.heat_map(map_panels(effects, value), theme=paper, unit=unit(effects, value))


def unit(effects: Effects, value: str) -> str:
    """Return what the numbers mean, in words."""
    mirrored = "corrupt" in effects.table["direction"].to_pylist()
    return (_MIRRORED if mirrored else {}).get(value, UNITS[value])


def map_panels(effects: Effects, value: str) -> list[Panel]:
    """Return heat maps: text layers by token roles, UNet sites by windows, sites by heads.

    The untrained encoder stands beside the trained one where it has the value.
    """
    trained, untrained = _means(effects, value), _means(effects, value, "untrained")
    runs = {", trained": trained, ", untrained": untrained} if untrained else {"": trained}
    panels: list[Panel] = []
    for sites in _kinds(effects, trained):
        names = {site.name for site in sites}
        here = [s for s in trained if s.site in names and s.head is None]
        pairs = _columns(here, by_window=sites[0].part == "unet")
        for window, columns in pairs.items():
            title = _KINDS[sites[0].kind] + _PARTS.get(sites[0].part, "")
            title += f", {_WINDOWS[window]}" if window else ""
            panels += [
                _panel(title + run, sites, columns, means) for run, means in runs.items() if here
            ]
    return panels + head_panels(effects, value)


def head_panels(effects: Effects, value: str) -> list[Panel]:
    """Return a heat map of sites by heads for each role and window where single heads were traced."""
    means, sites = _means(effects, value), effects.sites()
    single = [state for state in means if state.head is not None]
    heads = {str(state.head): state.head for state in sorted(single, key=lambda s: s.head or 0)}
    groups: dict[tuple[str, str, str], dict[str, Site]] = {}
    for state in single:
        site = sites[state.site]
        groups.setdefault((site.part, state.role, state.window), {})[site.name] = site
    panels: list[Panel] = []
    for (part, role, window), found in groups.items():
        title = "heads" + _PARTS.get(part, "") + (f", {_words(role)}" if role else "")
        title += f", {_WINDOWS[window]}" if window else ""
        columns = {text: (role, head, window) for text, head in heads.items()}
        panels.append(_panel(title, list(found.values()), columns, means))
    return panels


def bar_panels(sources: Mapping[str, Effects], value: str) -> list[BarPanel]:
    """Return bars by kind, within a kind as the sites run: a panel a window, a series a source.

    Args:
        sources: Traces by their names in the legend; states that one of them lacks have no value there.
        value: One of `VALUES`.
    """
    found = {name: _intervals(effects, value) for name, effects in sources.items()}
    sites = {name: site for effects in sources.values() for name, site in effects.sites().items()}
    places = dict.fromkeys(state._replace(window="") for rows in found.values() for state in rows)
    order = list(_KINDS)
    labels = sorted(places, key=lambda s: (order.index(sites[s.site].kind), sites[s.site].part))
    windows = _windows(state for rows in found.values() for state in rows)
    return [
        BarPanel(
            _capital(_WINDOWS[window]) if len(windows) > 1 or window else "",
            tuple(
                (name, tuple(_bar(rows, s._replace(window=window), sites[s.site]) for s in labels))
                for name, rows in found.items()
            ),
        )
        for window in windows
    ]


def _bar(rows: Mapping[State, tuple[float, float, float]], state: State, site: Site) -> Bar:
    label = site.name.removeprefix("unet.")
    label += f" head {state.head}" if state.head is not None else ""
    label += f", {_words(state.role)}" if state.role in ROLES else ""
    return Bar(label, site.kind, *rows.get(state, (math.nan, math.nan, math.nan)))


def _intervals(effects: Effects, value: str) -> dict[State, tuple[float, float, float]]:
    """Return mean, low and high of whole outputs, or of heads where nothing else was traced."""
    rows = effects.mean(value).to_pylist()
    kept = [row for row in rows if row["head"] is None] or rows
    return {
        State(*(row[name] for name in State._fields)): (row["mean"], row["low"], row["high"])
        for row in kept
    }


def _means(effects: Effects, value: str, control: str = "") -> dict[State, float]:
    cells = states.cells(effects.table, value, control)
    return {state: states.average(pairs) for state, pairs in cells.items()}


def _kinds(effects: Effects, means: Mapping[State, float]) -> list[list[Site]]:
    """Return the sites whose whole outputs were traced, by part and kind."""
    traced = {state.site for state in means if state.head is None}
    groups: dict[tuple[str, int], list[Site]] = {}
    for name, site in effects.sites().items():
        if name in traced:
            groups.setdefault((site.part, list(_KINDS).index(site.kind)), []).append(site)
    return [groups[key] for key in sorted(groups)]


def _columns(
    found: Sequence[State], *, by_window: bool
) -> dict[str, dict[str, tuple[str, int | None, str]]]:
    """Return for each panel, by its window, the columns: by roles, or by windows in one panel."""
    roles = [role for role in (*ROLES, *sorted({s.role for s in found} - set(ROLES)))
             if any(s.role == role for s in found)]  # fmt: skip
    if by_window:
        return {"": {_WINDOWS[w]: (roles[0], None, w) for w in _windows(found)}}
    return {w: {_words(role): (role, None, w) for role in roles} for w in _windows(found)}


def _panel(
    title: str,
    sites: Sequence[Site],
    columns: Mapping[str, tuple[str, int | None, str]],
    means: Mapping[State, float],
) -> Panel:
    rows = tuple(
        tuple(means.get(State(site.name, *column), math.nan) for column in columns.values())
        for site in sites
    )
    return Panel(_capital(title), tuple(map(_row, sites)), tuple(columns), rows)


def _row(site: Site) -> str:
    """Return what tells a site from others of its panel."""
    if site.kind == "group":
        return site.name
    return f"layer {site.index}" if site.part != "unet" else site.name.removeprefix("unet.")


def _windows(found: Iterable[State]) -> list[str]:
    present = {state.window for state in found}
    return [window for window in _WINDOWS if window in present]


def _words(role: str) -> str:
    return role.replace("_", " ")


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
