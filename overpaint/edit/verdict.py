"""Verdict of an edit: one sentence with the moved weights and the endangered concepts, from movements and report.

Warnings follow it: an edited concept that hardly moves, a weight that moves by many times its own norm, and an empty
prompt that moves. They hold for the change of any method. Nothing is measured here.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from overpaint.edit.change import Change
from overpaint.edit.methods.token_rows import edited_words

__all__ = [
    "CONCEPT_LIMIT", "EMPTY_PROMPT_LIMIT", "WEIGHT_LIMIT", "describe", "everyday", "warnings"
]  # fmt: skip

CONCEPT_LIMIT = 0.1  # `concept_movement` below which a concept hardly moves
EMPTY_PROMPT_LIMIT = 0.05  # relative movement of the empty prompt above which a warning follows
# Norm of a movement, relative to its weight, above which a warning follows: ours, since no source gives a bound.
WEIGHT_LIMIT = 5.0
_EMBEDDING = ".token_embedding"  # end of the name of a token embedding, of either text encoder
_LISTED = 5  # names in a list; the others are counted


def describe(change: Change) -> str:
    """Return one sentence: the moved weights, the movement of the empty prompt, and the endangered concepts.

    The `warnings` follow as further sentences. A change that reports nothing of other concepts gets a sentence that
    says so.

    Args:
        change: The change. If it was loaded from a file, its report may hold values of any type.
    """
    report = change.report
    lost = set(_names(report.get("not_kept")))  # of them some were preserved, without success
    clauses = [f"This change moves {_moved(change)}", _empty_prompt(change)]
    clauses.append(everyday(report) or "how many everyday captions move was not measured")
    clauses += [
        f"{words} {_listed(names)}"
        for key, words in (
            ("endangered", "endangered, and preserved for that reason:"),
            ("not_kept", "not preserved, likely to change too:"),
            ("aliases", "erased with them:"),
            ("unedited_encoders", "text encoders that stay as they are:"),
            ("carried", "changed with the token rows that they hold:"),
        )
        if (names := [n for n in _names(report.get(key)) if key != "endangered" or n not in lost])
    ]
    if not any(isinstance(report.get(key), list) for key in ("endangered", "not_kept")):
        clauses.append("effects on other concepts were not measured")
    elif not any(_names(report.get(key)) for key in ("endangered", "not_kept")):
        clauses.append("no other known concept is endangered")
    sentence = "; ".join(clauses) + "."
    return " ".join([sentence, *warnings(change)])


def everyday(report: Mapping[str, Any]) -> str:
    """Return how many everyday captions a change moves, in words; an empty string if none were measured.

    Args:
        report: Report of a change, as `edit.everyday_drift.with_collateral` completes it.
    """
    record = report.get("collateral")
    keys = ("captions_moved", "captions_measured", "max_drift")
    values = [record.get(key) for key in keys] if isinstance(record, Mapping) else []
    numbers = [float(v) for v in values if isinstance(v, int | float) and math.isfinite(v)]
    if len(numbers) < len(keys):
        return ""
    moved, measured, limit = numbers
    return f"{moved:.0f} of {measured:.0f} measured everyday captions move by more than {100 * limit:g} %"


def warnings(change: Change) -> list[str]:
    """Return the warnings about a change, each one sentence: what is wrong, and what to do next.

    They are about edited concepts whose `concept_movement` is below `CONCEPT_LIMIT`, about weights that move by more
    than `WEIGHT_LIMIT` times their norm, and about an empty prompt that moves by more than `EMPTY_PROMPT_LIMIT`.

    Args:
        change: As in `describe`.
    """
    return [
        text
        for text in (_hardly_moved(change), _large_weights(change), _moved_empty_prompt(change))
        if text
    ]


def _hardly_moved(change: Change) -> str:
    shares = change.report.get("concept_movement")
    rows = shares.items() if isinstance(shares, Mapping) else ()
    small = {
        old: s for old, share in rows if (s := _number(share)) is not None and s < CONCEPT_LIMIT
    }
    if not small:
        return ""
    verb = "moves" if len(small) == 1 else "move"
    return (
        f"Warning: {_listed([repr(old) for old in small])} hardly {verb}, by {_percent(max(small.values()))} of the "
        "way to the replacement, so that pictures may still show it: preserve fewer prompts or with a smaller weight, "
        "lower `ridge`, train for more `steps`, or raise the strength."
    )


def _large_weights(change: Change) -> str:
    norms = {m.site: m.relative_norm for m in change.movements if not m.site.endswith(_EMBEDDING)}
    large = {site: norm for site, norm in norms.items() if norm is not None and norm > WEIGHT_LIMIT}
    if not large:
        return ""
    sites = sorted(large, key=lambda site: -large[site])
    verb = "moves" if len(large) == 1 else "move"
    return (
        f"Warning: {_listed(sites)} {verb} by up to {max(large.values()):.3g} times the norm of the weight, so that "
        "any other prompt may change: raise `ridge`, edit fewer tokens, preserve fewer prompts exactly, or lower the "
        "strength, and measure with `edit.collateral`."
    )


def _moved_empty_prompt(change: Change) -> str:
    drift = _empty_prompt_drift(change)
    if drift is None or drift <= EMPTY_PROMPT_LIMIT:
        return ""
    return (
        f"Warning: the empty prompt moves by more than {100 * EMPTY_PROMPT_LIMIT:g} %, and guidance reads it for every "
        "picture, so that all pictures may change: lower the strength, or preserve more prompts."
    )


def _moved(change: Change) -> str:
    """Return the moved weights and token rows in words."""
    sites = [m.site for m in change.movements if not m.site.endswith(_EMBEDDING)]
    rows = sum(
        int((m.left.abs().amax(1) > 0).sum())
        for m in change.movements
        if m.site.endswith(_EMBEDDING) and m.left.numel()
    )
    parts = [f"{_count(len(sites), 'weight')} ({_listed(sites)})"] if sites else []
    if rows or len(sites) < len(change.movements):
        words = edited_words(change.report)
        parts.append(_count(rows, "token row") + (f" ({_listed(words)})" if words else ""))
    text = " and ".join(parts) or "nothing"
    strengths = _strengths(change)
    if strengths != {1.0}:
        text += f" at strength {', '.join(f'{s:g}' for s in sorted(strengths))}"
    return text


def _empty_prompt(change: Change) -> str:
    if change.report.get("guidance_reads_zeros") is True:
        return "guidance reads zeros for the empty prompt, which no edit moves"
    drift = _empty_prompt_drift(change)
    if drift is None:
        return "how far the empty prompt moves was not measured"
    if drift == 0:
        return "the empty prompt does not move"
    return f"the empty prompt moves by {_percent(drift)}"


def _empty_prompt_drift(change: Change) -> float | None:
    """Return the relative movement of the empty prompt; `None` if the report does not hold it."""
    if change.report.get("guidance_reads_zeros") is True:
        return 0.0
    if change.movements and all(m.site.endswith(_EMBEDDING) for m in change.movements):
        # rows of words: the empty prompt holds none of them
        return 0.0 if edited_words(change.report) else None
    return _number(change.report.get("empty_prompt_drift"))


def _strengths(change: Change) -> set[float]:
    strength: Mapping[str, Any] = change.protocol.get("strength", {})
    return {float(strength.get(old, 1.0)) for old in change.pairs} or {1.0}


def _number(value: Any) -> float | None:
    """Return the size of a finite number, else `None`; the report of a file may hold any type."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return abs(float(value))


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share >= 0.0005 or not share else "less than 0.1 %"


def _names(rows: Any) -> list[str]:
    """Return the concepts of a list of a report; its rows are names, or mappings with the key `concept`."""
    rows = rows if isinstance(rows, list) else []
    return [str(row.get("concept", "")) if isinstance(row, Mapping) else str(row) for row in rows]


def _listed(names: Sequence[str]) -> str:
    """Return the first names, on one line, and the number of the others."""
    shown = [" ".join(name.split()) for name in names[:_LISTED]]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
