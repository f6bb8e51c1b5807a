"""Tables and flat figures of `quality_edit`."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from edit_figures import Figures, differences, summary
from edit_methods import METHODS, OURS, settings_text
from edit_run import PLAIN

from overpaint.metrics import Interval

__all__ = ["as_json", "flat", "markdown", "tables"]

_SHOWN = ("target", "wording", "synonym", "redirection", "others_drop", "rest_drop", "scene_drop", "kept",
          "harmonic", "captions", "attack", "refused", "seconds", "bytes")  # fmt: skip
Rows = Mapping[str, Sequence[Figures]]


def tables(
    rows: Rows,
    kinds: Sequence[str],
    chosen: Mapping[str, Mapping[str, Any]],
    many: Sequence[Mapping[str, Any]],
    kid: Sequence[Mapping[str, Any]],
) -> dict[str, list[dict[str, Any]]]:
    """Return all tables by name.

    Args:
        rows: Figures of each concept, by method.
        kinds: Kind of each concept.
        chosen: Settings of each method.
        many: Rows of several concepts at once.
        kid: Rows of the kernel distance.
    """
    methods = [
        {
            "method": name, "role": METHODS[name].role, "settings": settings_text(chosen[name]), **summary(part),
        }
        for name, part in rows.items()
    ]  # fmt: skip
    by_kind = [
        {
            "kind": kind, "method": name,
            **summary([row for row, k in zip(part, kinds, strict=True) if k == kind]),
        }
        for kind in dict.fromkeys(kinds)
        for name, part in rows.items()
    ]  # fmt: skip
    paired = [
        {
            "method": name, "role": METHODS[name].role, "harmonic": differences(rows[OURS], part),
            "verdict": verdict(differences(rows[OURS], part)),
        }
        for name, part in rows.items()
        if name != OURS
    ]  # fmt: skip
    return {
        "methods": methods, "by kind": by_kind, "auto minus the row": paired, "many": [dict(r) for r in many],
        "kid": [dict(r) for r in kid],
    }  # fmt: skip


def verdict(difference: Interval) -> str:
    """Return what a paired interval of ours minus theirs shows: "auto is better", "auto is worse" or "draw"."""
    if difference.low > 0:
        return "auto is better"
    return "auto is worse" if difference.high < 0 else "draw"


def flat(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, float]:
    """Return the flat figures of the tables; a figure that was not measured is left out."""
    rows = {row["method"]: row for row in found["methods"]}
    ours, plain = rows[OURS], rows[PLAIN]
    rivals = [row for row in found["auto minus the row"] if row["role"] == "rival"]
    names = {
        "target_after": "target", "wording_after": "wording", "synonym_after": "synonym", "others_drop": "others_drop",
        "rest_drop": "rest_drop", "scene_drop": "scene_drop", "redirection": "redirection",
        "redirection_unedited": "reached", "kept": "kept", "harmonic": "harmonic", "captions_moved": "captions",
        "attack_after": "attack",
        "attack_chance": "attack_chance", "edit_seconds": "seconds", "file_bytes": "bytes",
    }  # fmt: skip
    result = {name: ours[key].mean for name, key in names.items() if key in ours}
    for name, key in (("target", "target"), ("wording", "wording"), ("synonym", "synonym")):
        if key in plain:
            result[f"{name}_before"] = plain[key].mean
    if "attack" in rows.get("token rows", {}):
        result["token_rows_attack_after"] = rows["token rows"]["attack"].mean
    for row in found["many"]:
        if row["method"] == OURS:
            result[f"kept_at_{row['concepts']}"] = row["kept"].mean
            result[f"left_at_{row['concepts']}"] = row["left"].mean
    best = [rows[row["method"]]["harmonic"].mean for row in rivals]
    result["best_rival"] = max(best, default=math.nan)
    for name in ("better", "worse"):
        result[f"rivals_{name}"] = sum(row["verdict"] == f"auto is {name}" for row in rivals)
    result["rivals_draw"] = sum(row["verdict"] == "draw" for row in rivals)
    result["beats_all"] = float(bool(rivals) and result["rivals_better"] == len(rivals))
    result["concepts"] = ours["target"].n
    return {name: round(float(value), 4) for name, value in result.items()}


def markdown(title: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a Markdown table; figures that a row lacks are empty."""
    if not rows:
        return ""
    names = list(
        dict.fromkeys(k for row in rows for k in row if k in _SHOWN or not _is_number(row[k]))
    )
    names += [
        k
        for k in dict.fromkeys(k for row in rows for k in row)
        if k not in names and title in ("many", "kid")
    ]
    lines = [f"\n### {title}\n", f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    cells = (" | ".join(str(row.get(name, "")) for name in names) for row in rows)
    return "\n".join([*lines, *(f"| {row} |" for row in cells)])


def as_json(value: Any) -> Any:
    """Return tables as JSON can hold them."""
    if isinstance(value, Interval):
        return {"mean": value.mean, "low": value.low, "high": value.high, "n": value.n}
    if isinstance(value, Mapping):
        return {key: as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, Interval | int | float)
