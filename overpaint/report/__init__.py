"""One self-contained HTML page from a folder of saved results.

The folder may hold, each with a part of the page: `text.parquet` (effects in the text encoder, with controls),
`unet-clean_trajectory.parquet` and `unet-same_latent.parquet`, `comparison.json` with `gallery.safetensors`,
`summary.json` (flat figures) and `run.json` (commands and protocol). Nothing is measured here.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from overpaint.report import charts, scenes, tables
from overpaint.scores import Comparison
from overpaint.trace import Effects

__all__ = ["write"]


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
    html = _template().render(
        title=run.get("title", "overpaint: results"),
        lead=run.get("lead", "Figures and tables from saved results."),
        tiles=_tiles(_json(source / "summary.json")),
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
    parts: dict[str, Any] = {
        "text": None,
        "unet": None,
        "scenes": None,
        "tables": None,
        "reading": "",
    }
    if (source / "text.parquet").is_file():
        parts["text"] = charts.text_charts(Effects.load(source / "text.parquet"))
    paths = {name: source / f"unet-{name}.parquet" for name in charts.SOURCES}
    found = {name: Effects.load(path) for name, path in paths.items() if path.is_file()}
    if found:
        parts["unet"] = charts.unet_charts(found)
    if (source / "comparison.json").is_file():
        comparison = Comparison.load(source)
        parts["scenes"] = scenes.scenes(comparison)
        parts["tables"] = [
            tables.methods(comparison),
            tables.others(comparison),
            tables.baseline(comparison),
        ]
        parts["reading"] = tables.reading(comparison)
    if not any(parts.values()):
        raise FileNotFoundError(
            f"{str(source)!r} holds no result: name a folder that `overpaint demo --out` or `overpaint trace --out` "
            "wrote."
        )
    return parts


def _template() -> Any:
    from jinja2 import Environment, StrictUndefined

    text = Path(__file__).with_name("page.html.jinja").read_text(encoding="utf-8")
    return Environment(autoescape=True, undefined=StrictUndefined).from_string(text)


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(
            f"{str(path)!r} is damaged: it is no JSON object. Make it again."
        ) from error


def _tiles(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the headline figures, name and text, of those that were measured."""
    wanted = (
        ("Target recognised before", "target_before", tables.percent),
        ("Target recognised after", "target_after", tables.percent),
        ("Other concepts lost", "others_drop", tables.points),
        ("Objects lost", "objects_drop", tables.points),
        ("The edit took", "edit_seconds", lambda s: f"{s:.2f} s"),
    )
    return [
        (name, text(summary[key])) for name, key, text in wanted if _is_number(summary.get(key))
    ]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not math.isnan(value)
