"""The concepts of `quality_edit`: which pairs it tunes on, which it is tested on, and the draw that chose them.

    python benchmarks/edit_concepts.py      # writes edit_concepts.toml again; a test compares the two

`SEEN` are the thirty pairs that earlier versions of the benchmark showed four times; three of each kind are drawn for
validation. Test pairs come from labels that no earlier benchmark of edits lists, as far as there are any. The others
were only a replacement before, or were erased before and now get another replacement; the file marks both. `many` has
fifty pairs that are edited at once. There is no choice by eye: a seeded generator draws all of them.
"""

import random
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from overpaint import files
from overpaint.probes.questions import family
from overpaint.train import icon_world

__all__ = [
    "COUNTS",
    "FILE",
    "KINDS",
    "SEEN",
    "bare",
    "draw",
    "labels",
    "listed_before",
    "load",
    "spelled",
    "text",
]

FILE = Path(__file__).with_name("edit_concepts.toml")
SEED = "concepts of quality_edit, draw 1"  # another one for another look at a test
COUNTS = {"style": 6, "object": 15, "trademark": 6, "color": 6, "action": 6, "fact": 6}
KINDS = tuple(COUNTS)
VALIDATION, MANY = 3, 50  # pairs of each kind, pairs edited at once
Pairs = dict[str, str]

SEEN: dict[str, Pairs] = {
    "style": {
        "openmoji style": "noto style", "high contrast style": "twemoji style", "fluent style": "blob style",
        "blob style": "fluent style", "twemoji style": "openmoji style",
    },
    "object": {
        "cat": "dog", "banana": "lemon", "rocket": "airplane", "umbrella": "balloon", "castle": "house",
    },
    "trademark": {
        "apple logo": "twitter logo", "python logo": "swift logo", "facebook logo": "dropbox logo",
        "chrome logo": "opera logo", "ubuntu logo": "vue logo",
    },
    "color": {
        "red background": "blue background", "green background": "white background",
        "yellow background": "gray background", "purple background": "orange background",
        "pink background": "green background",
    },
    "action": {
        "person running": "person walking", "person biking": "person golfing", "person surfing": "person swimming",
        "person bowing": "person juggling", "person golfing": "person running",
    },
    "fact": {
        "flag of france": "flag of italy", "flag of japan": "flag of china", "flag of canada": "flag of switzerland",
        "flag of brazil": "flag of india", "flag of greece": "flag of finland",
    },
}  # fmt: skip
FRONT = {"noto style": "openmoji style", "dog": "bear"}  # the pairs of quality_front
_SUFFIXES = {"style": " style", "color": " background"}
_NOTES = ("", "a replacement before", "erased before, with another replacement")


def labels() -> dict[str, list[str]]:
    """Return every concept of the icon world as in a prompt, by kind."""
    return {
        "style": [f"{name} style" for name in icon_world.STYLES],
        "object": list(icon_world.OBJECTS),
        "trademark": [f"{name} logo" for name in icon_world.LOGOS],
        "color": [f"{name} background" for name in icon_world.COLORS],
        "action": [f"person {verb}" for verb in icon_world.ACTIONS],
        "fact": [f"flag of {country}" for country in icon_world.FLAGS],
    }


def bare(kind: str, concept: str) -> str:
    """Return the name of a style or a color without "style" or "background"; other concepts as they are."""
    return concept.removesuffix(_SUFFIXES.get(kind, "\0"))


def spelled(pairs: Mapping[str, str], kinds: Mapping[str, str], subject: str) -> Pairs:
    """Return the pairs with their concepts whole or bare.

    Args:
        pairs: Old concept to new.
        kinds: The kind of each old concept.
        subject: `"whole"` or `"bare"`.
    """
    if subject == "whole":
        return dict(pairs)
    return {bare(kinds[old], old): bare(kinds[old], new) for old, new in pairs.items()}


def listed_before(concept: str) -> int:
    """Return 2 for a concept that an earlier benchmark erased, 1 for one that was only a replacement, 0 for others."""
    tables = [*SEEN.values(), FRONT]
    if any(concept in pairs for pairs in tables):
        return 2
    return int(any(concept in pairs.values() for pairs in tables))


def draw(seed: str = SEED) -> dict[str, dict[str, Pairs]]:
    """Return the pairs by list (`"validation"`, `"test"`, `"many"`) and kind; `many` has the one kind `"all"`."""
    validation = {
        kind: dict(sorted(_generator(seed, f"validation {kind}").sample(list(pairs.items()), VALIDATION)))
        for kind, pairs in SEEN.items()
    }  # fmt: skip
    known = labels()
    test = {
        kind: _fresh(known[kind], count, validation[kind], _generator(seed, f"test {kind}"))
        for kind, count in COUNTS.items()
    }
    return {"validation": validation, "test": test, "many": {"all": _many(seed, known)}}


def load(path: Path = FILE) -> dict[str, dict[str, Pairs]]:
    """Return the pairs of the file, in the form of `draw`."""
    return tomllib.loads(path.read_text("utf-8"))


def text(lists: Mapping[str, Mapping[str, Mapping[str, str]]]) -> str:
    """Return the contents of the file for these pairs."""
    lines = [
        "# Pairs of quality_edit, old = new; `python benchmarks/edit_concepts.py` draws and writes them.",
        "# `validation` may be looked at at any time. `test` is run once for given weights; a second look is recorded.",
        "# Labels that no earlier benchmark of edits lists: enough objects, trademarks and flags, but no style, color",
        "# or action. A remark marks the concepts of these three kinds: the pairs are new, the concepts are not.",
    ]
    for name, kinds in lists.items():
        for kind, pairs in kinds.items():
            lines += ["", f"[{name}.{kind}]"]
            for old, new in pairs.items():
                note = _NOTES[listed_before(old)] if name == "test" else ""
                if note and old in lists["validation"][kind]:
                    note += ", in validation too"
                lines.append(f'"{old}" = "{new}"' + (f"  # {note}" if note else ""))
    return "\n".join(lines) + "\n"


def _generator(seed: str, part: str) -> random.Random:
    return random.Random(f"{seed}: {part}")


def _fresh(
    known: Sequence[str], count: int, validation: Mapping[str, str], rng: random.Random
) -> Pairs:
    """Return `count` pairs that were not listed before, of the labels that were listed least."""
    olds = sorted(_least_listed(known, rng), key=lambda c: c in validation)[:count]
    pairs: Pairs = {}
    for old in olds:
        others = [c for c in _least_listed(known, rng) if c != old and not _was_listed(old, c)]
        others.sort(key=lambda c: (listed_before(c) > 0, c in pairs.values(), c in olds))
        pairs[old] = others[0]
    return pairs


def _least_listed(known: Sequence[str], rng: random.Random) -> list[str]:
    return sorted(rng.sample(known, len(known)), key=listed_before)


def _was_listed(old: str, new: str) -> bool:
    return any(pairs.get(old) == new for pairs in (*SEEN.values(), FRONT))


def _many(seed: str, known: Mapping[str, Sequence[str]]) -> Pairs:
    """Return pairs of objects, logos, persons and flags; no concept stands in two of them."""
    rng = _generator(seed, "many")
    pairs: Pairs = {}
    for names in _families(c for kind in known if kind not in _SUFFIXES for c in known[kind]):
        mixed = rng.sample(names, len(names))
        half = len(mixed) // 2
        pairs |= dict(zip(mixed[:half], mixed[half:], strict=False))
    return dict(rng.sample(list(pairs.items()), MANY))


def _families(names: Iterable[str]) -> list[list[str]]:
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(family(name), []).append(name)
    return list(groups.values())


if __name__ == "__main__":
    files.write_text(FILE, text(draw()))
