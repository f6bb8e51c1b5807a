"""Return the parts of the studio's page as HTML. All text from users, files and models is escaped here.

Besides the special characters of HTML, `{`, `}`, `$` and the backtick are written as entities: Gradio would read them
as template code in the values of its components. The templates are in `fragments.html.jinja`.
"""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from overpaint.edit import Change
from overpaint.studio import tasks
from overpaint.studio.scheduler import ProgressUpdate
from overpaint.studio.session import EditState
from overpaint.studio.side_effects import SideEffects
from overpaint.studio.tasks import LabelledPicture, PictureGrid, TraceMap

__all__ = [
    "alert", "changes", "escape", "facts", "grid", "heat_map", "note", "placeholder", "progress", "restored_pictures",
    "side_effects",
]  # fmt: skip

_DRIFTS_SHOWN = 10
_ENTITIES = str.maketrans({c: f"&#{ord(c)};" for c in "{}$`"})


def escape(value: Any) -> Markup:
    """Return `value` as text, escaped for content, for attributes and for Gradio's templates."""
    if isinstance(value, Markup):
        return value
    return Markup(html.escape(str(value), quote=True).translate(_ENTITIES))


def alert(text: str) -> str:
    """Return an error message."""
    return _render("alert", text)


def note(text: str) -> str:
    """Return a short message that is not an error."""
    return _render("note", text)


def placeholder(text: str) -> str:
    """Return a message for a part of the page that is still empty."""
    return _render("placeholder", text)


def progress(update: ProgressUpdate) -> str:
    """Return a progress bar with a label and the time left."""
    left = "" if update.seconds_left is None else f", {_duration(update.seconds_left)} left"
    return _render("progress", f"{update.label}{left}", round(100 * update.share))


def heat_map(trace_map: TraceMap, selected: tuple[int, int] | None = None) -> str:
    """Return a table of buttons, one for each restored state; a button's color shows the effect."""
    values = (abs(v) for row in trace_map.values for v in row if v is not None)
    return _render("heat_map", trace_map, selected, max(values, default=0.0) or 1.0)


def restored_pictures(pictures: Sequence[LabelledPicture]) -> str:
    """Return the pictures of one cell of the map in a row."""
    return _render("restored_pictures", pictures)


def grid(pictures: PictureGrid) -> str:
    """Return a grid of pictures: a row for each version, a column for each seed, an empty frame if not drawn yet."""
    return _render("grid", pictures)


def changes(state: EditState) -> str:
    """Return the list of applied changes."""
    return _render("changes", state)


def side_effects(effects: SideEffects | None) -> str:
    """Return the predicted side effects, the largest drift first."""
    return (
        "" if effects is None else _render("side_effects", effects, effects.drifts[:_DRIFTS_SHOWN])
    )


def facts(versions: Mapping[str, Change | None]) -> str:
    """Return a table with a column for each version: concepts, method, weights, rank, strength and digest."""
    columns = [_facts(change) for change in versions.values()]
    labels = ("concepts", "method", "weights", "rank", "strength", "digest")
    return _render(
        "facts", list(versions), list(zip(labels, zip(*columns, strict=True), strict=True))
    )


def _facts(change: Change | None) -> tuple[str, ...]:
    if change is None:
        return ("–",) * 6
    return (
        ", ".join(f"{old} → {new}" for old, new in change.pairs.items()) or "unknown",
        str(change.protocol.get("method", "unknown")),
        _weights(change),
        str(max(m.left.shape[1] for m in change.movements)),
        _strengths(change) or "1",
        change.digest[:12],
    )


def _data_url(image: Image.Image) -> str:
    data = io.BytesIO()
    image.save(data, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"


def _decimal(value: float) -> str:
    return f"{value:.2f}".replace("-0.00", "0.00")


def _percent(share: float) -> str:
    digits = 0 if share >= 0.1 or share == 0 else 1
    return f"{100 * share:.{digits}f}\N{NO-BREAK SPACE}%"


def _weights(change: Change) -> str:
    return change.sites[0] if len(change.sites) == 1 else f"{len(change.sites)} weights"


def _strengths(change: Change) -> str:
    """Return the strengths of a change as text; an empty text if all of them are 1."""
    strengths = change.protocol.get("strength", {})
    values = [float(strengths.get(old, 1.0)) for old in change.pairs]
    return ", ".join(f"{v:g}" for v in dict.fromkeys(values)) if set(values) - {1.0} else ""


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def _sentence(text: str) -> str:
    words = " ".join(text.split())
    return words[:1].upper() + words[1:]


_ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    finalize=escape,  # called with the value of every expression, before jinja's own escaping
    undefined=StrictUndefined,
)
_ENVIRONMENT.filters |= {
    "decimal": _decimal, "percent": _percent, "png": _data_url, "sentence": _sentence,
    "strengths": _strengths, "sublayer": tasks.sublayer_label, "weights": _weights,
}  # fmt: skip
_ENVIRONMENT.tests["in_second_encoder"] = lambda site: str(site).startswith("text2.")


def _render(macro: str, *values: Any) -> str:
    """Call a macro of the template with `values` and return its output."""
    module: Any = _ENVIRONMENT.get_template("fragments.html.jinja").module
    return str(getattr(module, macro)(*values))
