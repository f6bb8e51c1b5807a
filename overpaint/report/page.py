"""One self-contained HTML page from a folder of saved results, and the same as JSON beside it.

The folder may hold, each with a part of the page: `text.parquet` (effects in the text encoder, with controls),
`unet-clean_trajectory.parquet` and `unet-same_latent.parquet`, `comparison.json` with `gallery.safetensors`,
`measures.json` (an evaluation set), `attack.json` (ways back), `drift.json` (drift that text predicts),
`change.safetensors`, `summary.json` (flat figures) and `run.json` (commands and protocol). Nothing is measured here.
The page fetches nothing: its policy forbids it, and any script but its own.
"""

import base64
import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from shlex import quote
from typing import Any

from overpaint.evaluate.results import Comparison, Scores
from overpaint.report import (
    as_json,
    attack_section,
    charts,
    drift_section,
    galleries,
    metrics_section,
    model_card,
    provenance,
    tables,
)
from overpaint.report.attack_section import Attacked
from overpaint.report.metrics_section import Measured
from overpaint.trace import Effects

__all__ = ["to_card", "write"]

_NO_EDIT = "no edit"
_INPUTS = (
    "run.json", "summary.json", "comparison.json", "drift.json", metrics_section.FILE, attack_section.FILE,
)  # fmt: skip
_TENSORS = (".parquet", ".safetensors")


def write(folder: str | Path, *, out: str | Path | None = None) -> Path:
    """Write the page of the results in `folder` and return its path; `report.json` goes beside it.

    Args:
        folder: Holds saved results, see above.
        out: The page; by default `report.html` in the folder. Written beside, then renamed.

    Raises:
        FileNotFoundError: The folder holds no result.
        ValueError: A result is damaged, or `out` would overwrite one.
    """
    source = Path(folder)
    page = source / "report.html" if out is None else Path(out)
    if source.is_dir():
        _check_out(source, page)
    run, summary = _json(source / "run.json"), _json(source / "summary.json")
    parts = _parts(source, run, summary)
    chosen: Scores | None = parts.pop("chosen")
    found: Measured | None = parts["measured"]
    protocols = _protocols(parts, chosen)
    seconds: Any = summary.get("edit_seconds")
    words = {
        "title": run.get("title")
        or _title(chosen)
        or (found.title if found else "overpaint: results"),
        "lead": run.get("lead", "Figures and tables from saved results."),
        "commands": run.get("commands", [f"overpaint report {quote(str(source))}"]),
        "facts": provenance.facts(run.get("protocol", {}), protocols),
        "warning": provenance.differing(protocols),
        "tiles": tables.tiles(chosen, float(seconds) if _is_number(seconds) else None),
        **parts,
    }
    beside = page.with_suffix(".json")
    _write(page, _render(words, beside.name))
    _write(beside, as_json.as_json(words, summary, source))
    return page


def to_card(folder: str | Path, model: str | Path) -> Path:
    """Put what the judge saw on the model card of an edited model, and return the card's path.

    Args:
        folder: Holds a saved comparison.
        model: Folder of the edited model, as `overpaint apply` wrote it.

    Raises:
        FileNotFoundError: There is no comparison, or no card.
        ValueError: The comparison or the card is damaged.
    """
    source = Path(folder)
    if not (source / "comparison.json").is_file():
        raise FileNotFoundError(
            f"{str(source)!r} holds nothing that a judge saw: name a folder that `overpaint demo --out` or "
            "`overpaint evaluate --out` wrote."
        )
    method = str(_json(source / "run.json").get("method", ""))
    return model_card.add_scores(model, Comparison.load(source), method=method)


def _parts(source: Path, run: Mapping[str, Any], summary: Mapping[str, Any]) -> dict[str, Any]:
    """Read what the folder holds and return the parts of the page."""
    names = ("text", "unet", "scenes", "tables", "measured", "attacked", "foretold", "chosen")
    parts: dict[str, Any] = dict.fromkeys(names) | {"reading": "", "best": "", "methods": []}
    if (source / "text.parquet").is_file():
        parts["text"] = charts.text_charts(Effects.load(source / "text.parquet"))
    paths = {name: source / f"unet-{name}.parquet" for name in charts.SOURCES}
    found = {name: Effects.load(path) for name, path in paths.items() if path.is_file()}
    if found:
        parts["unet"] = charts.unet_charts(found)
    if (source / "comparison.json").is_file():
        comparison = Comparison.load(source)
        best = _best(comparison, str(run.get("method", "")), summary)
        parts |= _judged(comparison, best)
        parts["foretold"] = charts.foretold(
            comparison, drift_section.load(source), source, best=best
        )
    parts["measured"] = metrics_section.load(source)
    parts["attacked"] = attack_section.load(source)
    if not any(parts[name] for name in ("text", "unet", "tables", "measured", "attacked")):
        raise FileNotFoundError(
            f"{str(source)!r} holds no result: name a folder that `overpaint demo`, `trace` or `evaluate` wrote with "
            "--out."
        )
    return parts


def _judged(comparison: Comparison, best: str) -> dict[str, Any]:
    """Return the parts of the page that a comparison gives."""
    return {
        "scenes": galleries.scenes(comparison),
        "tables": [
            tables.methods(comparison, best),
            tables.others(comparison),
            tables.baseline(comparison),
        ],
        "reading": tables.reading(comparison),
        "chosen": comparison.scores.get(best),
        "best": best,
        "methods": galleries.methods(comparison)[1:],
    }


def _best(comparison: Comparison, named: str, summary: Mapping[str, Any]) -> str:
    """Return the method that the page is about: the named one, the one that the summary is of, or the first edit."""
    edits = [name for name in comparison.scores if name != _NO_EDIT]
    if named in edits:
        return named

    def is_told(found: Scores) -> bool:
        flat = {
            k: v for k, v in found.flat().items() if _is_number(summary.get(k)) and _is_number(v)
        }
        return bool(flat) and all(abs(summary[k] - v) < 1e-4 for k, v in flat.items())

    told = [name for name in edits if is_told(comparison.scores[name])]
    return next(iter([*told, *edits]), "")


def _protocols(parts: Mapping[str, Any], chosen: Scores | None) -> dict[str, Mapping[str, Any]]:
    """Return what each part was measured with, by the part's heading."""
    found: Measured | None = parts["measured"]
    ways: Attacked | None = parts["attacked"]
    return {
        **({"What the edit did": chosen.protocol} if chosen else {}),
        **({f"Measured on {found.name}": found.protocol} if found else {}),
        **({"Ways back": ways.protocol} if ways else {}),
    }


def _check_out(source: Path, page: Path) -> None:
    """Refuse a page that, or whose `.json`, would take the place of a result."""
    beside = page.with_suffix(".json")
    inputs = {p.resolve() for p in source.iterdir() if p.name in _INPUTS or p.suffix in _TENSORS}
    for made in (page, beside):
        if made.resolve() in inputs:
            raise ValueError(
                f"the page {str(page)!r} would overwrite the result {str(made)!r}, for its figures go into a .json "
                "beside it: give it another name, such as 'report.html'."
            )
    if beside == page:
        raise ValueError(
            f"the page {str(page)!r} would lie where its own figures go: end its name in .html."
        )


def _title(chosen: Scores | None) -> str:
    if chosen is None:
        return ""
    return (
        f"{chosen.erase} → {chosen.replace}" if chosen.replace else f"{chosen.erase}, painted over"
    )


def _render(words: Mapping[str, Any], beside: str) -> str:
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    here = Path(__file__).parent
    style, script, text = (
        (here / name).read_text(encoding="utf-8")
        for name in ("page.css", "page.js", "page.html.jinja")
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    pages = Environment(autoescape=True, undefined=StrictUndefined)
    pages.filters["tight"] = _tight
    return pages.from_string(text).render(
        **words, data=beside, style=Markup(style), script=Markup(script), digest=f"sha256-{digest}"
    )


def _tight(text: str) -> str:
    """Keep a number and its per cent sign on one line."""
    return re.sub(r"(?<=\d) %", "\N{NO-BREAK SPACE}%", text)


def _write(path: Path, text: str) -> None:
    draft = path.with_name(path.name + ".part")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(
            f"{str(path)!r} is damaged: it is no JSON object. Make it again."
        ) from error


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not math.isnan(value)
