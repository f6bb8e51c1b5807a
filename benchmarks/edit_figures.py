"""Figures of `quality_edit`: of one concept from the labels of its pictures, and of a method with intervals.

- target, wording, synonym: share of the pictures that are still recognised as the concept, by how it was asked for;
- redirection: share of the pictures of `target` that are recognised as the replacement;
- reached: the same for the unedited model's pictures of the replacement, which no edit can be asked to exceed;
- others_drop, rest_drop: labels no longer recognised in pictures without the concept, of its kind and of others;
- scene_drop: labels of other kinds no longer recognised in pictures of `target`, such as the object of a style;
- kept: labels recognised in pictures without the concept, as a share of those before the edit;
- harmonic: harmonic mean of efficacy (1 - target) and kept, the specificity.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from edit_prompts import TARGETS, Asked

from overpaint import metrics
from overpaint.metrics import Interval, paired_share, share

__all__ = ["best_settings", "differences", "harmonic", "of_concept", "summary"]

Figures = dict[str, float]
Labels = Sequence[Mapping[str, str]]
_CHANGES = ("others_drop", "rest_drop", "scene_drop")
_SHARES = (
    *TARGETS, "redirection", "reached", "kept", "harmonic", "captions", "attack", "attack_before", "attack_chance",
    "refused",
)  # fmt: skip


def harmonic(target: float, kept: float) -> float:
    """Return the harmonic mean of efficacy (1 - `target`) and specificity (`kept`)."""
    efficacy = 1 - target
    return 2 * efficacy * kept / max(efficacy + kept, 1e-9)


def of_concept(asked: Asked, result: Mapping[str, Any], plain: Mapping[str, Any]) -> Figures:
    """Return the figures of one concept and edit.

    Args:
        asked: The concept and its prompts.
        result: What `edit_measure.measure` returned for the edit.
        plain: The same for the unedited model.
    """
    label, new = asked.labels  # labels of pictures stand in the order of the prompts
    before: Labels = plain["labels"]
    after: Labels = result["labels"]
    figures = {
        "seconds": result["seconds"],
        "bytes": result["bytes"],
        "captions": result.get("captions", math.nan),  # a refused edit moves none
    }
    figures["refused"] = float(bool(result["refused"]))
    for role in TARGETS:
        seen = [got[asked.head] == label for got in _of(role, asked, after)]
        if seen:
            figures[role] = _mean(seen)
    named = [got[asked.head] == new for got in _of("target", asked, after)]
    figures["redirection"] = _mean(named)
    figures["reached"] = _mean([g[asked.head] == new for g in _of("replacement", asked, before)])
    drops = _drops(asked, before, after)
    right, still = (sum(n) for n in zip(*(drops[k][1:] for k in _CHANGES[:2]), strict=True))
    figures |= {name: drop for name, (drop, *_) in drops.items()}
    figures["kept"] = min(1.0, still / right) if right else math.nan
    figures["harmonic"] = harmonic(figures["target"], figures["kept"])
    if "best" in (attack := result.get("attack", {})):
        names = {"attack": "best", "attack_before": "before", "attack_chance": "chance"}
        figures |= {name: attack[key] for name, key in names.items()}
    return figures


def summary(rows: Sequence[Figures]) -> dict[str, Interval]:
    """Return the means of figures over concepts, with their intervals; a concept is one unit."""
    result: dict[str, Interval] = {}
    for name in _SHARES:
        values = [row[name] for row in rows if name in row and math.isfinite(row[name])]
        if values:
            result[name] = share(values)
    for name in _CHANGES:
        values = [row[name] for row in rows if math.isfinite(row[name])]
        result[name] = paired_share([0.0] * len(values), values)
    for name in ("seconds", "bytes"):
        result[name] = metrics.bootstrap([row[name] for row in rows])
    return result


def differences(
    ours: Sequence[Figures], theirs: Sequence[Figures], name: str = "harmonic"
) -> Interval:
    """Return the mean of ours minus theirs, paired by concept; above 0 where ours is better.

    Concepts for which a figure is not known are left out: `n` of the interval counts the others.
    """
    pairs = [(b[name], a[name]) for a, b in zip(ours, theirs, strict=True)]
    known = [pair for pair in pairs if all(map(math.isfinite, pair))]
    return paired_share([b for b, _ in known], [a for _, a in known])


def best_settings(tried: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return the entry of `tried` with the best `harmonic`, the mean over validation concepts; of equal ones the first.

    An entry whose mean is not known, because the unedited model draws nothing that is recognised, is chosen last.
    """
    return max(tried, key=lambda row: row["harmonic"] if math.isfinite(row["harmonic"]) else -1.0)


def _drops(asked: Asked, before: Labels, after: Labels) -> dict[str, tuple[float, int, int]]:
    """Return for each drop the lost share of labels, and how many were right before and after."""
    counts = {name: [0, 0, 0] for name in _CHANGES}  # labels, right before, right after
    for prompt, old, got in zip(asked.prompts, before, after, strict=False):
        for kind, label in prompt.labels.items():
            if prompt.role in ("other", "plain"):
                name = "others_drop" if kind == asked.head else "rest_drop"
            elif prompt.role == "target" and kind != asked.head:
                name = "scene_drop"
            else:
                continue
            row = counts[name]
            row[0] += 1
            row[1] += old[kind] == label
            row[2] += got[kind] == label
    return {
        name: ((right - still) / number if number else math.nan, right, still)
        for name, (number, right, still) in counts.items()
    }


def _of(role: str, asked: Asked, labels: Labels) -> list[Mapping[str, str]]:
    return [row for p, row in zip(asked.prompts, labels, strict=False) if p.role == role]


def _mean(values: Sequence[bool]) -> float:
    return sum(values) / len(values) if values else math.nan
