"""One self-contained HTML page from a folder of saved results.

The folder may hold, each with a part of the page: `text.parquet` and `text-control.parquet` (effects in the text
encoder, and in an untrained one), `unet-clean_trajectory.parquet` and `unet-same_latent.parquet`, `comparison.json` with
`gallery.safetensors`, `summary.json` (flat figures) and `run.json` (commands and protocol). Nothing is measured here.
"""

import base64
import io
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from overpaint import figures
from overpaint.figures import Bar, Panel, Theme
from overpaint.metrics import Interval
from overpaint.questions import Question
from overpaint.scores import Comparison, Paired
from overpaint.trace import Effects

__all__ = ["write"]

SOURCES = {"clean_trajectory": "clean trajectory", "same_latent": "same latent (control)"}


@dataclass(frozen=True)
class Cell:
    """A table cell: its text, and a smaller note below."""

    text: str
    note: str = ""


@dataclass(frozen=True)
class Table:
    """A table: its name and caption, its heads, and rows that begin with a name."""

    name: str
    caption: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str | Cell, ...], ...]


def write(folder: str | Path, *, out: str | Path | None = None) -> Path:
    """Write the page of the results in `folder` and return its path.

    Args:
        folder: Holds saved results, see above.
        out: The page; by default `report.html` in the folder. Written beside, then renamed.

    Raises:
        FileNotFoundError: The folder holds no result.
        ValueError: A result is damaged.
    """
    source = Path(folder)
    page = source / "report.html" if out is None else Path(out)
    parts = _parts(source)
    run = _json(source / "run.json")
    summary = _json(source / "summary.json")
    html = _template().render(
        title=run.get("title", "overpaint: results"),
        lead=run.get("lead", "Figures and tables from saved results."),
        tiles=_tiles(summary),
        commands=run.get("commands", [f"overpaint report {source}"]),
        facts=list(run.get("protocol", {}).items()),
        **parts,
    )
    draft = page.with_name(page.name + ".part")
    draft.write_text(html, encoding="utf-8")
    os.replace(draft, page)
    return page


def _parts(source: Path) -> dict[str, Any]:
    """Read what the folder holds and return the parts of the page."""
    parts: dict[str, Any] = {}
    if (source / "text.parquet").is_file():
        parts["text"] = _text_section(source)
    unet = {name: source / f"unet-{name}.parquet" for name in SOURCES}
    found = {name: Effects.load(path) for name, path in unet.items() if path.is_file()}
    if found:
        parts["unet"] = _unet_section(found)
    if (source / "comparison.json").is_file():
        comparison = Comparison.load(source)
        parts["scenes"] = _scenes(comparison)
        parts["tables"] = [_methods(comparison), _others(comparison), _baseline(comparison)]
        parts["reading"] = _reading(comparison)
    if not parts:
        raise FileNotFoundError(
            f"{str(source)!r} holds no result: name a folder that `overpaint demo --out` or `overpaint trace --out` "
            "wrote."
        )
    return parts


def _template() -> Any:
    from jinja2 import Environment, StrictUndefined

    text = Path(__file__).with_name("report.html.jinja").read_text(encoding="utf-8")
    empty = {"text": None, "unet": None, "scenes": None, "tables": None, "reading": ""}
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.globals.update(empty)
    return environment.from_string(text)


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _charts(draw: Callable[[Theme], bytes]) -> dict[str, str]:
    """Draw a figure for light and for dark paper."""
    themes = {"light": figures.LIGHT, "dark": figures.DARK}
    return {name: base64.b64encode(draw(theme)).decode() for name, theme in themes.items()}


def _tiles(summary: Mapping[str, float]) -> list[tuple[str, str]]:
    """Return the headline figures: name and text."""
    wanted = (
        ("Target recognised before", "target_before", _percent),
        ("Target recognised after", "target_after", _percent),
        ("Other concepts lost", "others_drop", _points),
        ("Objects lost", "objects_drop", _points),
        ("The edit took", "edit_seconds", lambda s: f"{s:.2f} s"),
    )
    return [(name, text(summary[key])) for name, key, text in wanted if _is_number(summary.get(key))]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not math.isnan(value)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _points(share: float) -> str:
    return f"{100 * share + 0.0:+.1f} points".replace("+", "").replace("-0.0 ", "0.0 ")


# --- tables -----------------------------------------------------------------------------------------------------------


def _share(found: Interval) -> Cell:
    if found.n == 0:
        return Cell("–")
    return Cell(
        _percent(found.mean), f"{100 * found.low:.0f} to {100 * found.high:.0f}, n {found.n}"
    )


def _change(found: Paired) -> Cell:
    if found.change.n == 0:
        return Cell("–")
    mean, low, high = (100 * v for v in (found.change.mean, found.change.low, found.change.high))
    return Cell(f"{mean:+.1f}", f"{low:+.1f} to {high:+.1f}, n {found.change.n}")


def _methods(comparison: Comparison) -> Table:
    first = next(iter(comparison.scores.values()))
    kinds = [k for k in first.specificity if k != first.kind]
    rows = [
        (
            name,
            _share(s.efficacy.after),
            _share(s.redirection.after),
            *(_share(p.after) for p in s.generality.values()),
            _change(s.specificity[s.kind]),
            *(_change(s.specificity[k]) for k in kinds),
            Cell(f"{100 * s.empty_drift:.1f} %"),
        )
        for name, s in comparison.scores.items()
    ]
    heads = (
        "Method", f"Still {first.erase}", f"Now {first.replace or 'the replacement'}",
        *(f"Still {first.erase}, {name}" for name in first.generality),
        f"Other {first.kind}s, change in points", *(f"{k.capitalize()}s, change in points" for k in kinds),
        "Empty prompt moved",
    )  # fmt: skip
    caption = (
        "Share of pictures that the judge recognises, with 95 % bootstrap intervals over n pictures; changes are "
        "against the unedited model on the same prompts and seeds. A mean of 0 % or 100 % in n pictures leaves room for "
        "about 3/n."
    )
    return Table("Methods compared", caption, heads, tuple(rows))


def _others(comparison: Comparison) -> Table:
    names = list(comparison.scores)
    first = comparison.scores[names[0]]
    rows = [
        (
            other,
            _share(first.others[other].before),
            *(_change(comparison.scores[n].others[other]) for n in names),
        )
        for other in first.others
    ]
    caption = (
        f"Each other {first.kind} alone: share recognised before any edit, and the change in points after each method, "
        "picture by picture."
    )
    heads = (first.kind.capitalize(), "Before", *(f"{n}, change" for n in names))
    return Table(f"Each other {first.kind}", caption, heads, tuple(rows))


def _baseline(comparison: Comparison) -> Table:
    kinds = [name for name in comparison.baseline if not name.endswith(" held out")]
    rows = [
        (k.capitalize(), *(_share(comparison.baseline[key]) for key in (k, f"{k} held out")))
        for k in kinds
    ]
    caption = "How well the judge recognises what the unedited model draws: the ceiling of every figure above."
    heads = ("Recognised", "Pairs seen in training", "Pairs held out of training")
    return Table("The model before any edit", caption, heads, tuple(rows))


def _reading(comparison: Comparison) -> str:
    first = next(iter(comparison.scores.values()))
    goal = f" and be seen as {first.replace} instead" if first.replace else ""
    return (
        f"Pictures asked for in the {first.kind} {first.erase} should no longer be recognised as such{goal}, in any "
        f"wording; everything else should stay. A judge that had no part in making the model looked at the same "
        f"{first.protocol.get('questions', '')} prompts and seeds under each method."
    )


# --- pictures ---------------------------------------------------------------------------------------------------------


def _scenes(comparison: Comparison) -> list[dict[str, Any]]:
    """Return one grid a scene: a column for each concept of the kind, a row for each method."""
    first = next(iter(comparison.scores.values()))
    methods = ["before", *(n for n in comparison.scores if n != "no edit")]
    scenes: dict[int, list[int]] = {}
    for i, question in enumerate(comparison.questions):
        scenes.setdefault(question.seed, []).append(i)
    return [
        {
            "title": _scene_title(comparison.questions[columns[0]], first.kind),
            "columns": [
                {
                    "name": (label := comparison.questions[i].label(first.kind)),
                    "mark": label == first.erase,
                }
                for i in columns
            ],
            "rows": [
                {"name": name, "cells": _cells(comparison, name, columns)} for name in methods
            ],
        }
        for columns in scenes.values()
    ]


def _cells(comparison: Comparison, name: str, columns: Iterable[int]) -> list[dict[str, str]]:
    return [
        {
            "png": _png(comparison.pictures[name][i]),
            "alt": f"{comparison.questions[i].prompt}, {name}",
        }
        for i in columns
    ]


def _scene_title(question: Question, kind: str) -> str:
    said = {k: question.label(k) for k in ("object", "style", "color") if k != kind}
    words = [f"{v} {k}" if k == "style" else f"{v} background" if k == "color" else v for k, v in said.items() if v]  # fmt: skip
    return f"{', '.join(words)} (seed {question.seed})".capitalize()


def _png(pixels: Tensor) -> str:
    """Encode one picture, uint8 (3, H, W), as base64 PNG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(
        buffer, format="PNG", optimize=True
    )
    return base64.b64encode(buffer.getvalue()).decode()
