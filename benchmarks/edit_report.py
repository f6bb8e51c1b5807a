"""Tables and flat figures of `quality_edit`."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from edit_figures import Figures, differences, summary
from edit_methods import METHODS, OURS, PLAIN, TOKEN_ROWS, settings_text

from overpaint.metrics import Interval

__all__ = ["as_json", "attack_rows", "flat", "markdown", "outcome", "tables"]

_SHOWN = ("target", "wording", "synonym", "new synonym", "redirection", "others_drop", "rest_drop", "scene_drop",
          "kept", "harmonic", "captions", "attack", "refused", "seconds", "bytes")  # fmt: skip
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
    paired: list[dict[str, Any]] = []
    for name, part in rows.items():
        if name != OURS:
            found = differences(rows[OURS], part)
            head = {"method": name, "role": METHODS[name].role, "n": found.n}
            paired.append(head | {"harmonic": found, "verdict": verdict(found)})
    return {
        "methods": methods, "by kind": by_kind, "auto minus the row": paired, "attack": attack_rows(rows),
        "many": [dict(r) for r in many], "kid": [dict(r) for r in kid],
    }  # fmt: skip


def attack_rows(rows: Rows) -> list[dict[str, Any]]:
    """Return `auto`'s success under attack against that of each other attacked row, paired by concept.

    Only concepts that both edit are compared: what a method refuses cannot be attacked. `n` of each interval counts
    them.
    """
    found: list[dict[str, Any]] = []
    for name, part in rows.items():
        if name == OURS or not any(math.isfinite(row.get("attack", math.nan)) for row in part):
            continue
        difference = differences(rows[OURS], part, "attack")
        half = differences(rows[OURS], part, "attack", share_of_theirs=0.5)
        found.append({
            "method": name, "role": METHODS[name].role, "n": difference.n, "difference": difference,
            "minus half": half,
            "verdict": {"auto is better": "auto is higher", "auto is worse": "auto is lower"}.get(
                verdict(difference), "draw"
            ),
            "at most half": "yes" if half.high <= 0 else "no" if half.low > 0 else "not known",
        })  # fmt: skip
    return found


def outcome(paired: Sequence[Mapping[str, Any]], role: str = "rival") -> dict[str, list[str]]:
    """Return the methods of `role` by verdict of the paired interval: those beaten, those in a draw, those better."""
    names = {"auto is better": "better than", "draw": "a draw with", "auto is worse": "worse than"}
    return {
        words: [
            row["method"] for row in paired if row["verdict"] == key and row["role"] == role
        ]
        for key, words in names.items()
    }  # fmt: skip


def verdict(difference: Interval) -> str:
    """Return what a paired interval of ours minus theirs shows: "auto is better", "auto is worse" or "draw".

    An interval without values is a draw.
    """
    if difference.low > 0:
        return "auto is better"
    return "auto is worse" if difference.high < 0 else "draw"


def flat(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, float]:
    """Return the flat figures of the tables; a figure that was not measured is left out.

    Of attacks, `attack_after` is the probability of the concept under the best attempt on `auto`'s edits,
    `attack_plain` that of the same prompts without an attack, `attack_before` that of the unedited model.
    `token_rows_attack_after` and `attack_minus_token_rows` are over the concepts that token rows edit too, `attack_n`
    of them. `beats_all` is 1 only if `auto`'s harmonic mean is above every rival's by the paired interval.
    """
    rows = {row["method"]: row for row in found["methods"]}
    ours, plain = rows[OURS], rows[PLAIN]
    rivals = [row for row in found["auto minus the row"] if row["role"] == "rival"]
    names = {
        "target_after": "target", "wording_after": "wording", "synonym_after": "synonym", "others_drop": "others_drop",
        "rest_drop": "rest_drop", "scene_drop": "scene_drop", "redirection": "redirection",
        "redirection_unedited": "reached", "kept": "kept", "harmonic": "harmonic", "captions_moved": "captions",
        "attack_after": "attack", "attack_before": "attack_before", "attack_plain": "attack_plain",
        "attack_chance": "attack_chance", "new_synonym_after": "new synonym",
        "edit_seconds": "seconds", "file_bytes": "bytes",
    }  # fmt: skip
    result = {name: ours[key].mean for name, key in names.items() if key in ours}
    for key in ("target", "wording", "synonym", "new synonym"):
        if key in plain:
            result[f"{key.replace(' ', '_')}_before"] = plain[key].mean
    for row in found["attack"]:
        if row["method"] == TOKEN_ROWS:
            result["token_rows_attack_after"] = rows[TOKEN_ROWS]["attack"].mean
            part = row["difference"], row["minus half"]
            for name, interval in zip(("token_rows", "half_of_token_rows"), part, strict=True):
                for key in ("mean", "low", "high"):
                    end = "" if key == "mean" else f"_{key}"
                    result[f"attack_minus_{name}{end}"] = getattr(interval, key)
            result["attack_n"] = row["n"]
    for row in found["many"]:
        if row["method"] == OURS:
            result[f"kept_at_{row['concepts']}"] = row["kept"].mean
            result[f"left_at_{row['concepts']}"] = row["left"].mean
    best = [rows[row["method"]]["harmonic"].mean for row in rivals if "harmonic" in rows[row["method"]]]  # fmt: skip
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
        if k not in names and title in ("many", "kid", "auto minus the row", "attack")
    ]
    lines = [f"\n### {title}\n", f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    cells = (" | ".join(_cell(row.get(name, "")) for name in names) for row in rows)
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


def _cell(value: Any) -> str:
    """Return the text of a cell; nothing for what is not known."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return "" if isinstance(value, Interval) and math.isnan(value.mean) else str(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, Interval | int | float)
