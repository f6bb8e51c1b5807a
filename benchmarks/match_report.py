"""Tables of `quality_match` as Markdown and as JSON."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from overpaint.metrics import Interval

__all__ = ["as_json", "markdown"]


def markdown(rows: Sequence[Mapping[str, Any]], title: str) -> str:
    """Return a Markdown table."""
    lines = [f"\n### {title}\n", f"| {' | '.join(rows[0])} |", "|" + "---|" * len(rows[0])]
    cells = (
        " | ".join(f"{v:.2f}" if isinstance(v, float) else str(v) for v in r.values()) for r in rows
    )
    return "\n".join([*lines, *(f"| {row} |" for row in cells)])


def as_json(value: Any) -> Any:
    """Return a value that JSON can hold."""
    if isinstance(value, Interval):
        return {
            key: as_json(getattr(value, key)) for key in ("mean", "low", "high")
        } | {"n": value.n}  # fmt: skip
    if isinstance(value, float):
        return round(value, 4) if math.isfinite(value) else None
    return value
