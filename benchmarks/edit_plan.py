"""Plan of a run of `quality_edit`: edits, pictures and expected minutes of each part."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edit_cost import ATTACK, LAYERS, QUICK, RATE, SECONDS, edit_cost, pictures
from edit_methods import METHODS, PLAIN
from edit_more import many_pictures, untouched
from edit_prompts import Asked
from edit_run import Run
from edit_tune import edits, rounds

__all__ = ["Part", "test_parts", "text", "tuning_parts"]


@dataclass(frozen=True)
class Part:
    """One part of a run: how many edits, attacks and the like, how many pictures, and the expected seconds."""

    name: str
    number: int
    pictures: int
    seconds: float


def tuning_parts(asked: Sequence[Asked], names: Sequence[str]) -> list[Part]:
    """Return the parts of the tuning of methods on validation concepts."""
    sizes = [len(part) for part in rounds(asked)]
    parts = [_plain(asked)]
    if "loco" in names:
        kinds = len({one.kind for one in asked})
        parts.append(Part("layers for LocoEdit", kinds, 0, kinds * LAYERS))
    for name in (n for n in names if n != PLAIN):
        number = edits(name, sizes)
        cost = edit_cost(asked[0], name, 0)
        parts.append(Part(name, number, number * pictures(asked[0], name), number * cost))
    return parts


def test_parts(
    run: Run,
    asked: Sequence[Asked],
    names: Sequence[str],
    together: Mapping[str, str],
    counts: Sequence[int],
    limit: int | None,
    unrelated: int,
) -> list[Part]:
    """Return the parts of a test run.

    Args:
        run: Its captions and attacked concepts count; nothing is drawn.
        asked: The concepts and their prompts.
        names: The methods.
        together: The pairs that are edited at once.
        counts: How many of them.
        limit: Largest number of untouched concepts that are drawn for each; all if `None`.
        unrelated: Pictures of each set of the kernel distance.
    """
    parts = [_plain(asked)]
    for name in (n for n in names if n != PLAIN):
        drawn = sum(pictures(one, name) for one in asked)
        seconds = sum(edit_cost(one, name, run.captions) for one in asked)
        parts.append(Part(name, len(asked), drawn, seconds))
    attacks = sum(run.attacks(one, name) for one in asked for name in names)
    parts.append(Part("attacks", attacks, 0, attacks * ATTACK))
    others = len(untouched(run.bench.judge.labels, together, limit))
    many = [(count, name) for count in counts for name in names if METHODS[name].many]
    drawn = others + sum(many_pictures(name, min(c, len(together)), others) for c, name in many)
    seconds = drawn / RATE + sum(SECONDS.get(name, QUICK) for _, name in many)
    parts.append(Part("several at once", len(many), drawn, seconds))
    sets = 3 + len({one.kind for one in asked})
    parts.append(Part("KID", sets, sets * unrelated, sets * unrelated / RATE))
    return parts


def text(parts: Sequence[Part]) -> str:
    """Return the parts and their sum as a table of plain text."""
    total = Part(
        "all",
        sum(p.number for p in parts),
        sum(p.pictures for p in parts),
        sum(p.seconds for p in parts),
    )
    lines = [f"{'part':22} {'number':>7} {'pictures':>9} {'minutes':>8}"]
    for part in (*parts, total):
        minutes = math.ceil(part.seconds / 6) / 10
        lines.append(f"{part.name:22} {part.number:7,} {part.pictures:9,} {minutes:8.1f}")
    return "\n".join(lines)


def _plain(asked: Sequence[Asked]) -> Part:
    drawn = sum(pictures(one, PLAIN) for one in asked)
    return Part("unedited model", len(asked), drawn, drawn / RATE)
