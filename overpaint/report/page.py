"""Write a folder of saved results as one self-contained HTML page, and the figures of the page as JSON.

The folder may hold these files, one for each part of the page: `text.parquet` (effects in the text encoder, with
controls), `unet-clean_trajectory.parquet` and `unet-same_latent.parquet` (effects in the UNet), `swap.parquet` (direct
effects of a prompt swap), `comparison.json` with `gallery.safetensors`, `measures.json` (an evaluation set),
`attack.json` (a search for prompts that bring the concept back), `drift.json` (drift predicted from text features),
`change.safetensors`, `summary.json` (headline figures by name) and `run.json` (commands and protocol). This module
reads results; it measures nothing.

The Content Security Policy of the page forbids network access and every script except the page's own.
"""

import base64
import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from shlex import join
from typing import Any

from overpaint.edit import Change, verdict
from overpaint.evaluate import attack_results, measures, predicted_drift
from overpaint.evaluate.results import Comparison, Scores
from overpaint.files import from_json, user_path, write_json, write_text
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
    """Write the page of the results in `folder` and a JSON file with its figures; return the path of the page.

    Args:
        folder: Folder with saved results; the text at the top of this module lists the files.
        out: Path of the page, by default `report.html` in the folder. The JSON file has the same name with `.json`.

    Raises:
        FileNotFoundError: The folder holds no result.
        ValueError: A result is damaged, or one of the two files would overwrite a result.
    """
    source = user_path(folder, "folder")
    page = source / "report.html" if out is None else user_path(out, "out")
    if source.is_dir():
        _check_out(source, page)
    json_path = page.with_suffix(".json")
    with _damage_named(source):
        values, figures = _content(source)
        text = _render(values, json_path.name)
    write_text(page, text)
    write_json(json_path, figures)
    return page


def _content(source: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the values of the page's template, and the content of the JSON file."""
    run, summary = _read_json(source / "run.json"), _read_json(source / "summary.json")
    parts = _parts(source, run, summary)
    best_scores: Scores | None = parts.pop("best_scores")
    measured: MetricsSection | None = parts["measured"]
    protocols = _protocols(parts, best_scores)
    seconds: Any = summary.get("edit_seconds")
    values = {
        "title": run.get("title")
        or _title(best_scores)
        or (measured.title if measured else "overpaint: results"),
        "lead": run.get("lead", "Figures and tables from saved results."),
        "commands": run.get("commands", [join(["overpaint", "report", str(source)])]),
        "verdict": _verdict(source / "change.safetensors"),
        "facts": provenance.facts(run.get("protocol", {}), protocols),
        "warning": provenance.differing(protocols),
        "tiles": tables.tiles(best_scores, float(seconds) if _is_number(seconds) else None),
        **parts,
    }
    return values, as_json.content(values, summary, source)


@contextmanager
def _damage_named(source: Path) -> Iterator[None]:
    """Raise a `ValueError` that names the folder if its files hold values of other types than overpaint writes."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"the results in {str(source)!r} are damaged ({type(error).__name__}: {error}): make them again with "
            "`overpaint evaluate` or `overpaint demo`."
        ) from error


def save_card(folder: str | Path, model: str | Path) -> Path:
    """Add the scores in `folder` to the model card of an edited model, and return the card's path.

    Args:
        folder: Folder with a saved comparison.
        model: Folder of the edited model, written by `overpaint apply`.

    Raises:
        FileNotFoundError: There is no comparison, or no card.
        ValueError: The comparison or the card is damaged.
    """
    source = user_path(folder, "folder")
    if not (source / "comparison.json").is_file():
        raise FileNotFoundError(
            f"{str(source)!r} holds no scores of an edit: name a folder that `overpaint demo --out` or "
            "`overpaint evaluate --out` wrote."
        )
    method = str(_read_json(source / "run.json").get("method", ""))
    return model_card.add_scores(model, Comparison.load(source), method=method)


def _parts(source: Path, run: Mapping[str, Any], summary: Mapping[str, Any]) -> dict[str, Any]:
    """Load the results in the folder and return the values of the template that show them."""
    names = (
        "text",
        "unet",
        "swap",
        "scenes",
        "tables",
        "measured",
        "attack",
        "predicted",
        "best_scores",
    )
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
    if (source / "swap.parquet").is_file():
        effects = Effects.load(source / "swap.parquet")
        parts["swap"] = charts.swap_charts(effects)
        parts["findings"]["swap"] = trace_headline.headline(effects)
    if (source / "comparison.json").is_file():
        comparison = Comparison.load(source)
        best = _best(comparison, str(run.get("method", "")), summary)
        parts |= _comparison_parts(comparison, best)
        has_drift = (source / predicted_drift.FILE).is_file()
        drift = predicted_drift.load(source) if has_drift else {}
        parts["predicted"] = charts.predicted(comparison, drift, source, best=best)
    parts["measured"] = metrics_section.load(source)
    parts["attack"] = attack_section.load(source)
    if not any(parts[name] for name in ("text", "unet", "swap", "tables", "measured", "attack")):
        raise FileNotFoundError(
            f"{str(source)!r} holds no result: name a folder that `overpaint demo`, `trace` or `evaluate` wrote with "
            "--out."
        )
    return parts


def _comparison_parts(comparison: Comparison, best: str) -> dict[str, Any]:
    """Return the values of the template that show a comparison."""
    return {
        "scenes": galleries.scenes(comparison),
        "tables": [
            tables.methods(comparison, best),
            tables.others(comparison),
            tables.baseline(comparison),
        ],
        "reading": tables.reading(comparison),
        "best_scores": comparison.scores.get(best),
        "best": best,
        "methods": galleries.methods(comparison)[1:],
    }


def _best(comparison: Comparison, method: str, summary: Mapping[str, Any]) -> str:
    """Return the name of the edit that the headline figures describe.

    It is `method` if the comparison has this edit; otherwise the edit whose scores equal the summary's figures;
    otherwise the first edit.
    """
    edits = [name for name in comparison.scores if name != _NO_EDIT]
    if method in edits:
        return method

    def is_summarised(scores: Scores) -> bool:
        flat = {
            k: v for k, v in scores.flat().items() if _is_number(summary.get(k)) and _is_number(v)
        }
        return bool(flat) and all(abs(summary[k] - v) < 1e-4 for k, v in flat.items())

    summarised = [name for name in edits if is_summarised(comparison.scores[name])]
    return next(iter([*summarised, *edits]), "")


def _protocols(
    parts: Mapping[str, Any], best_scores: Scores | None
) -> dict[str, Mapping[str, Any]]:
    """Return a dict from the heading of each part to its protocol."""
    measured: MetricsSection | None = parts["measured"]
    attack: AttackSection | None = parts["attack"]
    return {
        **({"What the edit did": best_scores.protocol} if best_scores else {}),
        **({f"Measured on {measured.name}": measured.protocol} if measured else {}),
        **({"Attack": attack.protocol} if attack else {}),
    }


def _check_out(source: Path, page: Path) -> None:
    """Raise if the page or its JSON file would overwrite a result, or if both have the same path."""
    json_path = page.with_suffix(".json")
    inputs = {p.resolve() for p in source.iterdir() if p.name in _INPUTS or p.suffix in _TENSORS}
    for path in (page, json_path):
        if path.resolve() in inputs:
            raise ValueError(
                f"the page {str(page)!r} or its .json would overwrite the result {str(path)!r}: choose another name, "
                "such as 'report.html'."
            )
    if json_path == page:
        raise ValueError(
            f"the page {str(page)!r} has the same name as its JSON file of figures: end the page's name in .html."
        )


def _title(scores: Scores | None) -> str:
    if scores is None:
        return ""
    return f"{scores.erase} → {scores.replace}" if scores.replace else f"{scores.erase} erased"


def _render(values: Mapping[str, Any], json_name: str) -> str:
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    here = Path(__file__).parent
    style, script, template = (
        (here / name).read_text(encoding="utf-8")
        for name in ("page.css", "page.js", "page.html.jinja")
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    environment.filters["no_break"] = _no_break
    return environment.from_string(template).render(
        **values,
        data=json_name,
        style=Markup(style),
        script=Markup(script),
        digest=f"sha256-{digest}",
    )


def _no_break(text: str) -> str:
    """Return `text` with a no-break space between each number and its per cent sign."""
    return re.sub(r"(?<=\d) %", "\N{NO-BREAK SPACE}%", text)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return dict(from_json(path.read_bytes()))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{str(path)!r} is damaged: it is not a JSON object. Write the result again."
        ) from error


def _verdict(path: Path) -> str:
    """Return the sentence that describes the saved change and its risks; an empty string if there is no change."""
    return verdict.describe(Change.load(path)) if path.is_file() else ""


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not math.isnan(value)
