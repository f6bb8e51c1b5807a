"""The content of the page as data: titles, tables with intervals, texts of the figures, and hashes of the inputs."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from overpaint.report.tables import Cell, Table

__all__ = ["content"]

_SOURCES = (".json", ".parquet", ".safetensors")


def content(values: Mapping[str, Any], summary: Mapping[str, Any], source: Path) -> dict[str, Any]:
    """Return the content of the page without the pictures, which are described by their alternative texts.

    Args:
        values: Values of the template.
        summary: Headline figures of the run, by name.
        source: The folder of the results.
    """
    predicted = values["predicted"] or {"charts": [], "tables": [], "points": []}
    measured = [*values["measured"].tables] if values["measured"] else []
    measured += [values["attack"].table] if values["attack"] else []
    traces = [figure for part in ("text", "unet", "swap") for figure in values[part] or []]
    figures = [*predicted["charts"], *traces]
    return {
        "title": values["title"],
        "lead": values["lead"],
        "verdict": values["verdict"],
        "findings": dict(values["findings"]),
        "method": values["best"],
        "summary": dict(summary),
        "tables": [_table(t) for t in (*(values["tables"] or []), *measured, *predicted["tables"])],
        "figures": [{"alt": f["alt"], "caption": f["caption"]} for f in figures],
        "drift": predicted["points"],
        "pictures": [
            {"scene": scene["title"], "method": row["name"], "what": cell["alt"]}
            for scene in values["scenes"] or []
            for row in scene["rows"]
            for cell in row["cells"]
        ],
        "commands": list(values["commands"]),
        "protocol": {part.name: dict(part.rows) for part in values["facts"]},
        "warning": values["warning"],
        "sha256": {path.name: _hash(path) for path in _files(source)},
    }


def _table(table: Table) -> dict[str, Any]:
    rows = [
        dict(zip(table.heads, (_value(cell) for cell in row), strict=True)) for row in table.rows
    ]
    return {"name": table.name, "caption": table.caption, "rows": rows}


def _value(cell: str | Cell) -> Any:
    if isinstance(cell, str):
        return cell
    if cell.interval is None:
        return cell.text
    return {name: getattr(cell.interval, name) for name in ("mean", "low", "high", "n")}


def _files(source: Path) -> list[Path]:
    return sorted(p for p in source.iterdir() if p.suffix in _SOURCES and p.name != "report.json")


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
