"""Captions of `icons`: a grammar of frames, names and synonyms, two tenths of each of which training never shows.

One tenth is for validation and may be looked at; the other is for the test.

The words lie in `captions.toml`. A **frame** is an order of the parts with one request, one aside, one way to name the
style and one way to name the background. Synonyms come from the keywords of Unicode CLDR and emojibase (npm
`emojibase-data`, MIT), cleaned by hand, and from common use.
"""

import hashlib
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

__all__ = [
    "HELD_OUT",
    "SIDES",
    "Captions",
    "Part",
    "adjectives",
    "frame_count",
    "held_out_synonyms",
    "more_objects",
    "synonyms",
    "unseen_synonyms",
]

Part = Literal["trained", "validation", "held out"]
SIDES = ("left", "right", "top", "bottom")
# The tenth of the test is drawn again whenever it has been looked at; the old one is then for validation. It is the
# next draw of which no other name holds a held-out synonym and which leaves the wording of the probes, "in {style}
# style", "{style} style" and "on a {color} background", to training.
_DRAWS = {"validation": "draw 3", "held out": "draw 7"}
HELD_OUT = ", ".join(_DRAWS.values())
_LISTS = ("orders", "requests", "asides", "adjectives", "styles", "grounds")


@cache
def _words() -> dict[str, Any]:
    return tomllib.loads(Path(__file__).with_name("captions.toml").read_text("utf-8"))


def synonyms() -> dict[str, tuple[str, ...]]:
    """Return the synonyms of each object, in training or held out."""
    return {name: tuple(others) for name, others in _words()["synonyms"].items()}


def more_objects() -> dict[str, str]:
    """Return objects that are drawn beside `icon_world.OBJECTS`, name to icon: their names have two meanings."""
    return dict(_words()["more_objects"])


def adjectives() -> tuple[str, ...]:
    """Return the adjectives of the captions, in training or held out."""
    return tuple(_words()["adjectives"])


@cache
def _reserved(items: tuple[str, ...], salt: str, part: Part) -> frozenset[str]:
    """Return the tenth of the different `items` that is held out for `part`: those with the smallest hashes.

    Of the orders, a tenth of those with a request and a tenth of those without: lists of tags are easier to read.
    """
    earlier = _reserved(items, salt, "validation") if part == "held out" else frozenset()
    different = sorted(
        {item for item in items if item},
        key=lambda item: hashlib.sha256(f"{_DRAWS[part]}:{salt}:{item}".encode()).digest(),
    )
    groups = [different]
    if salt == "orders":
        groups = [[o for o in different if ("{request}" in o) == named] for named in (True, False)]
    chosen = []
    for group in groups:
        number = max(1, len(group) // 10)
        chosen += [item for item in group if item not in earlier][:number]
    return frozenset(chosen)


@cache
def held_out_synonyms(part: Part = "held out") -> dict[str, str]:
    """Return the synonyms that no training caption holds and that are for `part`: synonym to object."""
    owners = {s: name for name, others in synonyms().items() for s in others}
    return {s: owners[s] for s in sorted(_reserved(tuple(owners), "synonyms", part))}


@cache
def unseen_synonyms() -> dict[str, str]:
    """Return all synonyms that no training caption holds, for validation and for the test: synonym to object."""
    return {**held_out_synonyms("validation"), **held_out_synonyms()}


def frame_count() -> int:
    """Return the number of frames: orders times requests, asides, and ways to name style and background."""
    return int(np.prod([len(set(_words()[name])) for name in _LISTS if name != "adjectives"]))


@dataclass(frozen=True)
class Captions:
    """Writes captions whose frames are those of training, or one of the two tenths that it never shows."""

    part: Part = "trained"
    kinds: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # more names of objects

    def pick(self, name: str, rng: np.random.Generator) -> str:
        """Return a random entry of the list `name` that belongs to this part."""
        return str(rng.choice(_entries(name, self.part)))

    def name(self, object_: str, rng: np.random.Generator) -> str:
        """Return the object's name or, in half of the captions, a synonym of training or the name of a kind of it."""
        draw = rng.random()
        known = _trained_synonyms().get(object_, ()) if draw < 0.3 else ()
        if 0.3 <= draw < 0.5:
            known = self.kinds.get(object_, ())
        return str(rng.choice(known)) if known else object_

    def noun_phrase(
        self, noun: str, rng: np.random.Generator, *, size: str = "", determiner: str | None = None
    ) -> str:
        """Return `noun` with a determiner and, in one of three, an adjective; `size` names a size."""
        adjective = self.pick("adjectives", rng) if rng.random() < 0.33 else ""
        words = [size, adjective, noun] if rng.random() < 0.5 else [adjective, size, noun]
        rest = " ".join(word for word in words if word)
        chosen = str(rng.choice(_words()["determiners"])) if determiner is None else determiner
        if chosen == "a" and rest[0] in "aeiou" and not rest.startswith("uk"):
            chosen = "an"
        return f"{chosen} {rest}".strip()

    def frame(self, thing: str, style: str, ground: str, rng: np.random.Generator) -> str:
        """Return a caption of `thing`; an empty `style` or `ground` is not named."""
        order = self.pick("orders", rng)
        if style and rng.random() < 0.15:
            style = _words()["aliases"].get(style, style)
        filled = order.format(
            request=self.pick("requests", rng),
            thing=thing,
            style=self.pick("styles", rng).format(style=style) if style else "",
            ground=self.pick("grounds", rng).format(color=ground) if ground else "",
            aside=self.pick("asides", rng),
        )
        return _tidy(filled)

    def placed(self, phrase: str, side: str, rng: np.random.Generator) -> str:
        """Return `phrase` with words for a side of the picture."""
        return f"{phrase} {str(rng.choice(_words()['places'])).format(side=side)}"

    def pair(self, one: str, other: str, rng: np.random.Generator) -> str:
        """Return words for two things, without saying where they are."""
        return str(rng.choice(_words()["pairs"])).format(one=one, other=other)


@cache
def _entries(name: str, part: Part) -> tuple[str, ...]:
    items = tuple(_words()[name])
    validation, test = (_reserved(items, name, of) for of in ("validation", "held out"))
    if part == "trained":
        return tuple(item for item in items if item not in validation | test)
    return tuple(sorted(test if part == "held out" else validation))


@cache
def _trained_synonyms() -> dict[str, tuple[str, ...]]:
    reserved = unseen_synonyms()
    return {
        name: tuple(s for s in others if s not in reserved) for name, others in synonyms().items()
    }


def _tidy(text: str) -> str:
    """Return a filled order without the marks that stood beside parts left out."""
    text = re.sub(r"\(\s*,?\s*|\s*,?\s*\)", lambda m: "(" if "(" in m[0] else ")", text)
    text = text.replace("()", " ")
    text = re.sub(r"\s+", " ", text)
    text = re.sub(r"(?:\s*([,;|.:-])(?=\s|$))(?:\s*[,;|.:-](?=\s|$))+", r"\1", text)
    text = re.sub(r"\s+([,;.:])", r"\1", text)
    text = re.sub(r"\.+(?=[,.])", "", text)
    text = re.sub(r"\ba (?=[aeio])", "an ", text)
    return re.sub(r"^[\s,;|.:-]+|[\s,;|:-]+$", "", text)
