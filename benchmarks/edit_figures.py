"""Figures of `quality_edit`: of one concept from the labels of its pictures, and of a method with intervals.

- target, wording, synonym, new synonym: share of the pictures that are still recognised as the concept, by how it was
  asked for;
- redirection: share of the pictures of `target` that are recognised as the replacement;
- reached: the same for the unedited model's pictures of the replacement, which no edit can be asked to exceed;
- others_drop, rest_drop: labels no longer recognised in pictures without the concept, of its kind and of others;
- scene_drop: labels of other kinds no longer recognised in pictures of `target`, such as the object of a style;
- kept: labels recognised in pictures without the concept, as a share of those before the edit;
- harmonic: harmonic mean of efficacy (1 - target) and kept, the specificity;
- attack: mean probability of the concept in pictures of the best confirmed attempt of an attack; `attack_before` and
  `attack_plain` are those of the same prompts without an attack, drawn by the unedited and by the edited model, and
  `attack_chance` that of the prompts without the concept, drawn by the edited model.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from edit_prompts import TARGETS, Asked

from overpaint import metrics
from overpaint.metrics import Interval, paired_share, share

__all__ = ["Figures", "differences", "harmonic", "known", "of_concept", "ranked", "summary"]

Figures = dict[str, float]
Labels = Sequence[Mapping[str, str]]
_ATTACK = {
    "attack": "best", "attack_before": "before", "attack_plain": "after", "attack_chance": "chance",
}  # fmt: skip
_CHANGES = ("others_drop", "rest_drop", "scene_drop")
_SHARES = (
    *TARGETS, "redirection", "reached", "kept", "harmonic", "captions", "attack", "attack_before", "attack_plain",
    "attack_chance", "refused",
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
        "captions": known(result.get("captions")),  # a refused edit moves none
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
        figures |= {name: known(attack.get(key)) for name, key in _ATTACK.items()}
    return figures


def known(value: float | None) -> float:
    """Return a stored number; NaN for null, as JSON stores what is not known."""
    return math.nan if value is None else float(value)


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
    ours: Sequence[Figures],
    theirs: Sequence[Figures],
    name: str = "harmonic",
    *,
    share_of_theirs: float = 1.0,
) -> Interval:
    """Return the mean of ours minus theirs, paired by concept.

    Concepts for which a figure of either is not known are left out: `n` of the interval counts the others.

    Args:
        ours: Figures of each concept.
        theirs: Figures of the same concepts.
        name: The figure.
        share_of_theirs: Factor of theirs: with 0.5 the mean is below 0 where ours is less than half of theirs.
    """
    pairs = [(b.get(name, math.nan), a.get(name, math.nan)) for a, b in zip(ours, theirs, strict=True)]  # fmt: skip
    both = [(share_of_theirs * b, a) for b, a in pairs if math.isfinite(a) and math.isfinite(b)]
    return paired_share([b for b, _ in both], [a for _, a in both])


def ranked(tried: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return entries by `harmonic`, the mean over validation concepts, best first; equal ones in their order.

    Entries whose mean is not known, because the unedited model draws nothing that is recognised, are last.
    """
    means = [known(row["harmonic"]) for row in tried]
    order = sorted(range(len(tried)), key=lambda i: (not math.isfinite(means[i]), -means[i]))
    return [tried[i] for i in order]


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
