"""What the page shows, as HTML. Every word that comes from a user, a file or a model is escaped here.

Besides HTML's own signs, `{`, `$` and the backtick are written as entities: the page's framework fills templates.
"""

import base64
import html
import io
from collections.abc import Mapping, Sequence

from PIL import Image

from overpaint.edit import Change
from overpaint.studio.scheduler import Progress
from overpaint.studio.session import Bench
from overpaint.studio.side_effects import Collateral, Drift
from overpaint.studio.tasks import Drawn, Map, Picture, sublayer

__all__ = [
    "alert", "coats", "empty", "escape", "facts", "forecast", "grid", "heat_map", "note", "progress", "restored",
]  # fmt: skip

_SHOWN = 10  # rows of the forecast


def escape(text: object) -> str:
    """Return text that is safe anywhere in the page: as content, in an attribute, in a template."""
    safe = html.escape(str(text), quote=True)
    return safe.replace("{", "&#123;").replace("}", "&#125;").replace("$", "&#36;").replace("`", "&#96;")  # fmt: skip


def alert(text: str) -> str:
    """Return an error in words."""
    return f'<p class="op-alert" role="alert">{escape(_sentence(text))}</p>'


def note(text: str) -> str:
    """Return a quiet remark."""
    return f'<p class="op-note" role="status">{escape(_sentence(text))}</p>'


def empty(text: str) -> str:
    """Return what stands where nothing is shown yet."""
    return f'<p class="op-empty">{escape(text)}</p>'


def progress(step: Progress) -> str:
    """Return a bar with what is done and the time left."""
    percent = round(100 * step.share)
    left = "" if step.left is None else f", {_seconds(step.left)} left"
    words = escape(f"{step.what[:1].upper()}{step.what[1:]}{left}")
    return (
        f'<div class="op-progress"><span role="status">{words}</span>'
        f'<progress max="100" value="{percent}" aria-label="{words}"></progress></div>'
    )


def heat_map(found: Map, chosen: tuple[int, int] | None = None) -> str:
    """Return the map: a table of buttons, each a state; the stronger the color the more comes back."""
    top = max((abs(v) for row in found.values for v in row if v is not None), default=0.0) or 1.0
    heads = "".join(
        f'<th scope="col"><span>{escape(token)}</span></th>' for _, _, token in found.columns
    )
    rows = "".join(
        f'<tr><th scope="row">{escape(sublayer(site))}</th>'
        + "".join(
            _cell(found, i, j, value, top, chosen == (i, j))
            for j, value in enumerate(found.values[i])
        )
        + "</tr>"
        for i, site in reversed(list(enumerate(found.sites)))
    )
    what = (
        "score of the judge that comes back with this state alone"
        if found.measured == "pictures"
        else "share of the way that the text features go back"
    )
    instead = f"Judged by text features, not by pictures: {found.instead}." if found.instead else ""
    return (
        f'{note(instead) if instead else ""}<figure class="op-map">'
        '<div class="op-scroll" tabindex="0" role="region" aria-label="Map of states">'
        f"<table><thead><tr><td></td>{heads}</tr></thead><tbody>{rows}</tbody></table></div>"
        f"<figcaption>The words “{escape(found.question.concept)}” are drowned in noise; one state at a time, a "
        f"sublayer’s output at one token, is put back. Number: {what}. Input below, output above. Click a cell to "
        "see its picture.</figcaption></figure>"
    )


def restored(pictures: Sequence[Picture]) -> str:
    """Return the pictures of one cell, side by side."""
    items = "".join(
        f"<figure>{_img(p.image, p.about)}<figcaption><b>{escape(p.title)}</b> {escape(p.about)}</figcaption></figure>"
        for p in pictures
    )
    return f'<div class="op-row">{items}</div>'


def grid(drawn: Drawn) -> str:
    """Return versions as rows and seeds as columns; an empty frame where a picture is still to come."""
    prompt = drawn.question.prompt
    rows = ""
    for name, images in zip(drawn.names, drawn.rows, strict=True):
        cells = "".join(
            '<span class="op-blank" aria-hidden="true"></span>'
            if image is None
            else _img(image, f"{prompt}, {name}, seed {seed}")
            for image, seed in zip(images, drawn.question.seeds, strict=True)
        )
        rows += f'<div class="op-version"><h4>{escape(name)}</h4><div class="op-cells">{cells}</div></div>'
    seeds = ", ".join(map(str, drawn.question.seeds))
    return (
        f'<figure class="op-grid">{rows}<figcaption>“{escape(prompt)}”, {drawn.question.steps} steps, seed {seeds}: '
        "pictures of one column start from the same noise.</figcaption></figure>"
    )


def coats(bench: Bench) -> str:
    """Return what lies on the model."""
    if not bench.coats:
        return empty("No coat yet: the model is as it was trained.")
    items = "".join(
        f"<li><b>{escape(coat.name)}</b><span>{escape(coat.change.protocol.get('method', 'a file'))}, "
        f"{escape(_weights(coat.change))}</span></li>"
        for coat in bench.coats
    )
    dial = "" if bench.strength == 1 else f" All at strength {bench.strength:g}."
    words = "Solved together, in either order the same." if len(bench.coats) > 1 else ""
    return f'<ol class="op-coats">{items}</ol><p class="op-note">{words}{dial}</p>'


def forecast(found: Collateral | None) -> str:
    """Return what a change is expected to do, the worst first."""
    if found is None:
        return ""
    tiles = [
        ("Of the wanted movement reached", found.reached),
        ("Movement of the empty prompt", found.empty),
    ]
    shown = "".join(
        f"<div><dt>{name}</dt><dd>{_percent(value)}</dd></div>"
        for name, value in tiles
        if value is not None
    )
    count = len(found.endangered)
    shown += f"<div><dt>Concepts endangered</dt><dd>{count if found.drifts else '–'}</dd></div>"
    if not found.drifts:
        return (
            f'<dl class="op-tiles">{shown}</dl><p class="op-note">The drift of other concepts cannot be told from '
            f"text: {escape(found.reason)}.</p>"
        )
    if found.drifts[0].share == 0:
        return (
            f'<dl class="op-tiles">{shown}</dl><p class="op-note">None of the {len(found.drifts)} other concepts '
            "moves: no prompt about them reads what was changed.</p>"
        )
    shown_drifts = found.drifts[:_SHOWN]
    kept = any(drift.kept for drift in shown_drifts)
    rows = "".join(_drift(drift, kept=kept) for drift in shown_drifts)
    caption = (
        "How far other concepts are expected to move, as a share of the movement of the concept that is painted over; "
        "from 5\u00a0% on pictures are likely to show it."
    )
    heads = "".join(
        f'<th scope="col">{name}</th>'
        for name in ("concept", "drift", "share", *(["edit"] if kept else []))
    )
    return (
        f'<dl class="op-tiles">{shown}</dl><table class="op-table"><caption>{caption}</caption>'
        f"<thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"
    )


def facts(versions: Mapping[str, Change | None]) -> str:
    """Return a table of what changes are, side by side."""
    names = list(versions)
    lines = (
        ("concepts", lambda c: ", ".join(f"{old} → {new}" for old, new in c.pairs.items()) or "not told"),
        ("method", lambda c: str(c.protocol.get("method", "not told"))),
        ("weights", _weights),
        ("rank", lambda c: str(max(m.left.shape[1] for m in c.movements))),
        ("strength", lambda c: ", ".join(f"{v:g}" for v in c.protocol.get("strength", {}).values()) or "1"),
        ("digest", lambda c: c.digest[:12]),
    )  # fmt: skip
    heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    rows = "".join(
        f'<tr><th scope="row">{label}</th>'
        + "".join(f"<td>{'–' if c is None else escape(tell(c))}</td>" for c in versions.values())
        + "</tr>"
        for label, tell in lines
    )
    return (
        '<div class="op-scroll" tabindex="0" role="region" aria-label="What the two are">'
        f'<table class="op-table op-facts"><thead><tr><td></td>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _cell(found: Map, i: int, j: int, value: float | None, top: float, chosen: bool) -> str:
    site, (_, _, token) = sublayer(found.sites[i]), found.columns[j]
    if value is None:
        return "<td>–</td>"
    text = f"{value:.2f}".replace("-0.00", "0.00")
    words = escape(f"{site} at {token}: {text}. Show the picture.")
    sign = "op-warm" if value >= 0 else "op-cold"
    return (
        f'<td><button type="button" class="{sign}" style="--v: {abs(value) / top:.3f}" data-cell="{i},{j}" '
        f'aria-label="{words}" aria-pressed="{"true" if chosen else "false"}">{text}</button></td>'
    )


def _drift(drift: Drift, *, kept: bool) -> str:
    """Return a row of the forecast; `kept`: with a column that says what the edit itself looked after."""
    concept, share = escape(drift.concept), min(1.0, drift.share)
    return (
        f'<tr class="{"op-danger" if drift.endangered else ""}"><th scope="row">{concept}</th>'
        f'<td><meter min="0" max="1" value="{share:.3f}" aria-label="drift of {concept}"></meter></td>'
        f"<td>{_percent(drift.share)}</td>"
        + (f"<td>{'looked after' if drift.kept else ''}</td>" if kept else "")
        + "</tr>"
    )


def _img(image: Image.Image, alt: str) -> str:
    data = io.BytesIO()
    image.save(data, format="PNG")
    code = base64.b64encode(data.getvalue()).decode()
    width, height = image.size
    return f'<img src="data:image/png;base64,{code}" alt="{escape(alt)}" width="{width}" height="{height}">'


def _percent(share: float) -> str:
    digits = 0 if share >= 0.1 else 1
    return f"{100 * share:.{digits}f}\N{NO-BREAK SPACE}%"


def _weights(change: Change) -> str:
    return change.sites[0] if len(change.sites) == 1 else f"{len(change.sites)} weights"


def _seconds(left: float) -> str:
    return f"{left:.0f} s" if left < 90 else f"{left / 60:.0f} min"


def _sentence(text: str) -> str:
    words = " ".join(text.split())
    return words[:1].upper() + words[1:]
