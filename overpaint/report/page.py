"""One self-contained HTML page of a folder of saved results, and its figures as JSON.

The folder may hold these files, one for each part of the page: `text.parquet` (effects in the text encoder, with
controls), `unet-clean_trajectory.parquet` and `unet-same_latent.parquet`, `comparison.json` with `gallery.safetensors`,
`measures.json` (an evaluation set), `attack.json` (a search for prompts that bring the concept back), `drift.json`
(drift predicted from text features), `change.safetensors`, `summary.json` (flat figures) and `run.json` (commands and
protocol). Nothing is measured here. The page loads nothing from the network: its Content Security Policy forbids that,
and any script except its own.
"""

import base64
import hashlib
import math
import re
from collections.abc import Mapping
from pathlib import Path
from shlex import join
from typing import Any

from overpaint.edit import Change, verdict
from overpaint.evaluate import attack_results, measures, predicted_drift
from overpaint.evaluate.results import Comparison, Scores
from overpaint.files import from_json, write_json, write_text
from overpaint.report import (
    as_json,
    attack_section,
    charts,
    galleries,
    metrics_section,
    model_card,
    provenance,
    tables,
    trace_headline,
)
from overpaint.report.attack_section import AttackSection
from overpaint.report.metrics_section import MetricsSection
from overpaint.trace import Effects

__all__ = ["save", "save_card"]

_NO_EDIT = "no edit"
_INPUTS = (
    "run.json", "summary.json", "comparison.json", predicted_drift.FILE, measures.FILE, attack_results.FILE,
)  # fmt: skip
_TENSORS = (".parquet", ".safetensors")


def save(folder: str | Path, *, out: str | Path | None = None) -> Path:
    """Write the page of the results in `folder`, and its figures as JSON beside it; return the path of the page.

    Args:
        folder: Holds saved results, see above.
        out: Path of the page; by default `report.html` in the folder.

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
    measured: MetricsSection | None = parts["measured"]
    protocols = _protocols(parts, chosen)
    seconds: Any = summary.get("edit_seconds")
    words = {
        "title": run.get("title")
        or _title(chosen)
        or (measured.title if measured else "overpaint: results"),
        "lead": run.get("lead", "Figures and tables from saved results."),
        "commands": run.get("commands", [join(["overpaint", "report", str(source)])]),
        "verdict": _verdict(source / "change.safetensors"),
        "facts": provenance.facts(run.get("protocol", {}), protocols),
        "warning": provenance.differing(protocols),
        "tiles": tables.tiles(chosen, float(seconds) if _is_number(seconds) else None),
        **parts,
    }
    beside = page.with_suffix(".json")
    write_text(page, _render(words, beside.name))
    write_json(beside, as_json.content(words, summary, source))
    return page


def save_card(folder: str | Path, model: str | Path) -> Path:
    """Add the scores in `folder` to the model card of an edited model, and return the card's path.

    Args:
        folder: Holds a saved comparison.
        model: Folder of the edited model, written by `overpaint apply`.

    Raises:
        FileNotFoundError: There is no comparison, or no card.
        ValueError: The comparison or the card is damaged.
    """
    source = Path(folder)
    if not (source / "comparison.json").is_file():
        raise FileNotFoundError(
            f"{str(source)!r} holds no scores of an edit: name a folder that `overpaint demo --out` or "
            "`overpaint evaluate --out` wrote."
        )
    method = str(_json(source / "run.json").get("method", ""))
    return model_card.add_scores(model, Comparison.load(source), method=method)


def _parts(source: Path, run: Mapping[str, Any], summary: Mapping[str, Any]) -> dict[str, Any]:
    """Load the files of the folder and return the parts of the page."""
    names = ("text", "unet", "scenes", "tables", "measured", "attack", "predicted", "chosen")
    parts: dict[str, Any] = dict.fromkeys(names) | {
        "reading": "",
        "best": "",
        "methods": [],
        "findings": {},
    }
    if (source / "text.parquet").is_file():
        effects = Effects.load(source / "text.parquet")
        parts["text"] = charts.text_charts(effects)
        parts["findings"]["text"] = trace_headline.headline(effects)
    paths = {name: source / f"unet-{name}.parquet" for name in charts.SOURCES}
    traces = {name: Effects.load(path) for name, path in paths.items() if path.is_file()}
    if traces:
        parts["unet"] = charts.unet_charts(traces)
        parts["findings"]["unet"] = trace_headline.headline(next(iter(traces.values())))
    if (source / "comparison.json").is_file():
        comparison = Comparison.load(source)
        best = _best(comparison, str(run.get("method", "")), summary)
        parts |= _comparison_parts(comparison, best)
        has_drift = (source / predicted_drift.FILE).is_file()
        drift = predicted_drift.load(source) if has_drift else {}
        parts["predicted"] = charts.predicted(comparison, drift, source, best=best)
    parts["measured"] = metrics_section.load(source)
    parts["attack"] = attack_section.load(source)
    if not any(parts[name] for name in ("text", "unet", "tables", "measured", "attack")):
        raise FileNotFoundError(
            f"{str(source)!r} holds no result: name a folder that `overpaint demo`, `trace` or `evaluate` wrote with "
            "--out."
        )
    return parts


def _comparison_parts(comparison: Comparison, best: str) -> dict[str, Any]:
    """Return the parts of the page that show a comparison."""
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
    """Return the method of the headline figures: the named one, else that of the summary, else the first edit."""
    edits = [name for name in comparison.scores if name != _NO_EDIT]
    if named in edits:
        return named

    def is_summarised(scores: Scores) -> bool:
        flat = {
            k: v for k, v in scores.flat().items() if _is_number(summary.get(k)) and _is_number(v)
        }
        return bool(flat) and all(abs(summary[k] - v) < 1e-4 for k, v in flat.items())

    summarised = [name for name in edits if is_summarised(comparison.scores[name])]
    return next(iter([*summarised, *edits]), "")


def _protocols(parts: Mapping[str, Any], chosen: Scores | None) -> dict[str, Mapping[str, Any]]:
    """Return the protocol of each part, by the part's heading."""
    measured: MetricsSection | None = parts["measured"]
    attack: AttackSection | None = parts["attack"]
    return {
        **({"What the edit did": chosen.protocol} if chosen else {}),
        **({f"Measured on {measured.name}": measured.protocol} if measured else {}),
        **({"Attack": attack.protocol} if attack else {}),
    }


def _check_out(source: Path, page: Path) -> None:
    """Raise if the page, or the `.json` beside it, would overwrite a result."""
    beside = page.with_suffix(".json")
    inputs = {p.resolve() for p in source.iterdir() if p.name in _INPUTS or p.suffix in _TENSORS}
    for path in (page, beside):
        if path.resolve() in inputs:
            raise ValueError(
                f"the page {str(page)!r} or its .json would overwrite the result {str(path)!r}: choose another name, "
                "such as 'report.html'."
            )
    if beside == page:
        raise ValueError(
            f"the page {str(page)!r} has the name of the file of its figures: end its name in .html."
        )


def _title(chosen: Scores | None) -> str:
    if chosen is None:
        return ""
    return f"{chosen.erase} → {chosen.replace}" if chosen.replace else f"{chosen.erase} erased"


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
    """Return `text` with a no-break space between each number and its per cent sign."""
    return re.sub(r"(?<=\d) %", "\N{NO-BREAK SPACE}%", text)


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return dict(from_json(path.read_bytes()))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{str(path)!r} is damaged: it is not a JSON object. Make it again."
        ) from error


def _verdict(path: Path) -> str:
    """Return what the saved change moves and endangers, or an empty string if there is no change."""
    return verdict.describe(Change.load(path)) if path.is_file() else ""


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not math.isnan(value)
