"""Heat maps and bar charts of a table of effects, by layer, token role, head and window of steps.

Text encoder: a heat map of layers by token roles for each kind of sublayer, with the untrained encoder beside it if
it was measured. UNet: bars with intervals, one panel for each window of steps. Single heads: sites by heads.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import pyarrow as pa

from overpaint.images import charts
from overpaint.images.charts import Bar, BarPanel, Chart, Panel, Theme
from overpaint.metrics import Interval
from overpaint.model.sites import Site
from overpaint.trace import states
from overpaint.trace.states import ROLES, State
from overpaint.trace.statistics import intervals

__all__ = ["UNITS", "bar_panels", "draw", "head_panels", "map_panels", "unit"]

UNITS = {
    "indirect_effect": "indirect effect: restored minus corrupted score",
    "direct_effect": "direct effect: change of the score by the target prompt in the window",
    "recovery": "recovered share of the gap in the score",
    "score_restored": "score with the state restored",
    "embed_recovery": "recovered share of the gap in the text features",
    "embed_recovery_pads": "recovered share of the gap in the text features, at end of text and padding",
    "latent_recovery": "recovered share of the gap in the latents",
    "attribution": "gradient attribution: estimated indirect effect",
}
_KINDS = {
    "cross_attn": "cross-attention", "self_attn": "self-attention", "mlp": "MLP",
    "resnet": "ResNet", "group": "groups",
}  # fmt: skip
_PARTS = {"text2": ", 2nd encoder"}
_WINDOWS = {"": "all steps", "early": "early steps", "middle": "middle steps", "late": "late steps"}
_MIRRORED = {"indirect_effect": "indirect effect: clean minus score with the state corrupted"}


def draw(table: pa.Table, kind: str | None, *, value: str, theme: Theme | None = None) -> Chart:
    """Draw a heat map or bars of a table of effects; `Effects.plot` explains the arguments.

    Raises:
        ValueError: No such kind, or no state has the value.
    """
    if kind not in (None, "map", "bars"):
        raise ValueError(f"unknown kind of plot {kind!r}: choose 'map' or 'bars'.")
    means = _means(table, value)
    if not means:
        raise ValueError(f"no state has a {value!r}: plot another value, or trace with pictures.")
    theme = theme or charts.LIGHT
    sites = states.sites(table)
    bars = all(sites[s.site].part == "unet" for s in means) and any(s.head is None for s in means)
    if kind == "bars" or (kind is None and bars):
        return charts.bar_chart(
            bar_panels({"": table}, value), theme=theme, unit=unit(table, value)
        )
    return charts.heat_map(map_panels(table, value), theme=theme, unit=unit(table, value))


def unit(table: pa.Table, value: str) -> str:
    """Return the meaning of the numbers, in words."""
    mirrored = "corrupt" in table["direction"].to_pylist()
    return (_MIRRORED if mirrored else {}).get(value, UNITS[value])


def map_panels(table: pa.Table, value: str) -> list[Panel]:
    """Return heat maps: text layers by token roles, UNet sites by windows, sites by heads.

    The untrained encoder is shown beside the trained one if it has the value.
    """
    trained, untrained = _means(table, value), _means(table, value, "untrained")
    runs = {", trained": trained, ", untrained": untrained} if untrained else {"": trained}
    panels: list[Panel] = []
    for sites in _kinds(table, trained):
        names = {site.name for site in sites}
        whole = [s for s in trained if s.site in names and s.head is None]
        groups = _columns(whole, by_window=sites[0].part == "unet")
        for window, columns in groups.items():
            title = _KINDS[sites[0].kind] + _PARTS.get(sites[0].part, "")
            title += f", {_WINDOWS[window]}" if window else ""
            panels += [
                _panel(title + run, sites, columns, means) for run, means in runs.items() if whole
            ]
    return panels + head_panels(table, value)


def head_panels(table: pa.Table, value: str) -> list[Panel]:
    """Return a heat map of sites by heads for each role and window where single heads were traced."""
    means, sites = _means(table, value), states.sites(table)
    single = [state for state in means if state.head is not None]
    heads = {str(state.head): state.head for state in sorted(single, key=lambda s: s.head or 0)}
    groups: dict[tuple[str, str, str], dict[str, Site]] = {}
    for state in single:
        site = sites[state.site]
        groups.setdefault((site.part, state.role, state.window), {})[site.name] = site
    panels: list[Panel] = []
    for (part, role, window), members in groups.items():
        title = "heads" + _PARTS.get(part, "") + (f", {_words(role)}" if role else "")
        title += f", {_WINDOWS[window]}" if window else ""
        columns = {text: (role, head, window) for text, head in heads.items()}
        panels.append(_panel(title, list(members.values()), columns, means))
    return panels


def bar_panels(tables: Mapping[str, pa.Table], value: str) -> list[BarPanel]:
    """Return bars by kind, within a kind in execution order: a panel for each window, a series for each table.

    Args:
        tables: Tables of effects by their names in the legend. A state that a table lacks has no value in its series.
        value: One of `VALUES`.
    """
    series = {name: _whole_or_heads(table, value) for name, table in tables.items()}
    sites = {name: site for table in tables.values() for name, site in states.sites(table).items()}
    places = dict.fromkeys(state._replace(window="") for rows in series.values() for state in rows)
    order = list(_KINDS)
    labels = sorted(places, key=lambda s: (order.index(sites[s.site].kind), sites[s.site].part))
    windows = _windows(state for rows in series.values() for state in rows)
    return [
        BarPanel(
            _capital(_WINDOWS[window]) if len(windows) > 1 or window else "",
            tuple(
                (name, tuple(_bar(rows, s._replace(window=window), sites[s.site]) for s in labels))
                for name, rows in series.items()
            ),
        )
        for window in windows
    ]


def _bar(rows: Mapping[State, Interval], state: State, site: Site) -> Bar:
    label = site.name.removeprefix("unet.")
    label += f" head {state.head}" if state.head is not None else ""
    label += f", {_words(state.role)}" if state.role in ROLES else ""
    if state not in rows:
        return Bar(label, site.kind, math.nan, math.nan, math.nan)
    return Bar(label, site.kind, rows[state].mean, rows[state].low, rows[state].high)


def _whole_or_heads(table: pa.Table, value: str) -> dict[State, Interval]:
    """Return the means of whole outputs, or of single heads where only heads were traced."""
    means = intervals(table, value)
    return {state: mean for state, mean in means.items() if state.head is None} or means


def _means(table: pa.Table, value: str, control: str = "") -> dict[State, float]:
    cells = states.cells(table, value, control)
    return {state: states.average(pairs) for state, pairs in cells.items()}


def _kinds(table: pa.Table, means: Mapping[State, float]) -> list[list[Site]]:
    """Return the sites whose whole outputs were traced, grouped by part and kind."""
    traced = {state.site for state in means if state.head is None}
    groups: dict[tuple[str, int], list[Site]] = {}
    for name, site in states.sites(table).items():
        if name in traced:
            groups.setdefault((site.part, list(_KINDS).index(site.kind)), []).append(site)
    return [groups[key] for key in sorted(groups)]


def _columns(
    means: Sequence[State], *, by_window: bool
) -> dict[str, dict[str, tuple[str, int | None, str]]]:
    """Return the columns of each panel, by the panel's window: roles, or all windows in one panel."""
    present = {state.role for state in means}
    roles = [role for role in (*ROLES, *sorted(present - set(ROLES))) if role in present]
    if by_window:
        return {"": {_WINDOWS[w]: (roles[0], None, w) for w in _windows(means)}}
    return {w: {_words(role): (role, None, w) for role in roles} for w in _windows(means)}


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
    return Panel(_capital(title), tuple(map(_row_label, sites)), tuple(columns), rows)


def _row_label(site: Site) -> str:
    """Return the label of a site, which need not repeat the title of its panel."""
    if site.kind == "group":
        return site.name
    return f"layer {site.index}" if site.part != "unet" else site.name.removeprefix("unet.")


def _windows(traced: Iterable[State]) -> list[str]:
    present = {state.window for state in traced}
    return [window for window in _WINDOWS if window in present]


def _words(role: str) -> str:
    return role.replace("_", " ")


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
