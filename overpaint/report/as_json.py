"""The page as data: titles, tables with their intervals, what each figure shows, and the hashes of its sources."""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from overpaint.report.tables import Cell, Table

__all__ = ["as_json"]

_SOURCES = (".json", ".parquet", ".safetensors")


def as_json(words: Mapping[str, Any], summary: Mapping[str, Any], source: Path) -> str:
    """Return the page's content as one JSON object; pictures are named and not held.

    Args:
        words: What the page is drawn from.
        summary: Flat figures of the run.
        source: The folder of the results.
    """
    foretold = words["foretold"] or {"charts": [], "tables": [], "points": []}
    measured = [*words["measured"].tables] if words["measured"] else []
    measured += [words["attacked"].table] if words["attacked"] else []
    figures = [*foretold["charts"], *(words["text"] or []), *(words["unet"] or [])]
    content = {
        "title": words["title"],
        "lead": words["lead"],
        "method": words["best"],
        "summary": dict(summary),
        "tables": [_table(t) for t in (*(words["tables"] or []), *measured, *foretold["tables"])],
        "figures": [{"alt": one["alt"], "caption": one["caption"]} for one in figures],
        "drift": foretold["points"],
        "pictures": [
            {"scene": scene["title"], "method": row["name"], "what": cell["alt"]}
            for scene in words["scenes"] or []
            for row in scene["rows"]
            for cell in row["cells"]
        ],
        "commands": list(words["commands"]),
        "protocol": {part.name: dict(part.rows) for part in words["facts"]},
        "warning": words["warning"],
        "sha256": {path.name: _hash(path) for path in _files(source)},
    }
    return json.dumps(_finite(content), indent=1, ensure_ascii=False, allow_nan=False)


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
    made = {"report.json"}
    return sorted(p for p in source.iterdir() if p.suffix in _SOURCES and p.name not in made)


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _finite(words: Any) -> Any:
    """Write a missing number as null: JSON knows no NaN."""
    if isinstance(words, dict):
        return {key: _finite(value) for key, value in words.items()}
    if isinstance(words, list | tuple):
        return [_finite(value) for value in words]
    return None if isinstance(words, float) and not math.isfinite(words) else words
