"""Captioned pictures that `icons` is trained on: of 64x64 pixels, and scenes of 128x128 pixels.

`icon_world` holds the artwork and the pairs that are held out; `captions` the words. The pictures show one icon in the
middle, an icon at a side of the picture or of another size, two to four icons, and, at 128 pixels, one to four icons of
16 to 80 pixels on plain, gradient, striped and textured grounds.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from overpaint.train import captions, icon_world
from overpaint.train.icon_world import COLORS, COUNTS, OBJECTS, STYLES, Picture, World, place

__all__ = ["GROUNDS", "LARGE", "Scenes", "ground"]

LARGE = 128  # pixels, square
GROUNDS = ("plain", "gradient", "striped", "textured")
_BIG, _SMALL = ("big", "large", "huge"), ("small", "tiny", "little")
_RELATIONS = {
    "to the left of": "left",
    "to the right of": "right",
    "above": "top",
    "below": "bottom",
}


@dataclass(frozen=True)
class Scenes:
    """Draws captioned pictures: `Scenes(world).small(rng)` of 64 pixels, `.large(rng)` of 128."""

    world: World
    words: captions.Captions = field(default_factory=captions.Captions)

    def small(self, rng: np.random.Generator) -> Picture:
        """Return a random picture of 64x64 pixels; it shows no held-out pair."""
        kind = int(rng.choice(6, p=(0.54, 0.1, 0.04, 0.06, 0.2, 0.06)))
        color = _color(rng)
        draws = (self._single, self._placed, self._sized, self._count, self._two)
        return draws[kind](color, rng) if kind < 5 else self._named(color, rng)

    def large(self, rng: np.random.Generator) -> Picture:
        """Return a random scene of 128x128 pixels: one to four icons of 16 to 80 pixels on a ground."""
        number = int(rng.choice(4, p=(0.3, 0.46, 0.14, 0.1))) + 1
        if number == 2 and rng.random() < 0.6:
            return self._large_two(rng)
        color, kind = _color(rng), str(rng.choice(GROUNDS, p=(0.4, 0.2, 0.2, 0.2)))
        names, style = self._names(number, color, rng)
        second = [
            c
            for c in COLORS
            if c != color and not any((name, c) in self.world.held_out_colors for name in names)
        ]
        other = str(rng.choice(second))
        canvas = ground(kind, color, other, rng, LARGE)
        boxes: list[tuple[int, int, int]] = []
        largest = {1: 80, 2: 60, 3: 52, 4: 48}[number]
        for _ in names:
            boxes.append(_free_box(boxes, largest, rng))
        boxes.sort(key=lambda box: box[1] + box[0] / 2)  # things are named from left to right
        for name, (size, left, top) in zip(names, boxes, strict=True):
            place(canvas, self.world.icon(_icon(name), STYLES[style], size), left, top)
        phrases = [self._phrase(name, rng) for name in names]
        thing = ", ".join(phrases[:-1]) + " and " + phrases[-1] if number > 1 else phrases[0]
        words = {"plain": color, "gradient": f"{color} and {other} gradient", "striped": f"{color} and {other} striped",
                 "textured": f"textured {color}"}[kind]  # fmt: skip
        text = self._frame(thing, style, words, rng)
        pixels = (np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8)
        return Picture(pixels, text, names[0] if number == 1 else "", style, color)

    def _large_two(self, rng: np.random.Generator) -> Picture:
        """Return a picture of two objects as `_two` draws them, of 128 pixels."""
        color = _color(rng)
        names, style = self._names(2, color, rng)
        thing, sides = self._pair(names, rng)
        size = int(rng.integers(50, 62))
        canvas = ground("plain", color, color, rng, LARGE)
        for name, side in zip(names, sides, strict=True):
            left, top = _at(side, size, rng, LARGE)
            place(canvas, self.world.icon(_icon(name), STYLES[style], size), left, top)
        pixels = (np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8)
        return Picture(pixels, self._frame(thing, style, color, rng), "", style, color)

    def _frame(self, thing: str, style: str, color: str, rng: np.random.Generator) -> str:
        named = rng.random() < (0.3 if color == "white" else 0.9)
        shown_style = style if rng.random() < 0.92 else ""
        return self.words.frame(thing, shown_style, color if named else "", rng)

    def _phrase(self, name: str, rng: np.random.Generator, size: str = "") -> str:
        return self.words.noun_phrase(self.words.name(name, rng), rng, size=size)

    def _names(self, number: int, color: str, rng: np.random.Generator) -> tuple[list[str], str]:
        """Return different objects and one style, which training may show together on `color`."""
        style = str(rng.choice(list(STYLES)))
        choice = [*OBJECTS, *captions.more_objects()]
        allowed = [
            name
            for name in choice
            if (name, style) not in self.world.held_out
            and (name, color) not in self.world.held_out_colors
            and not (name == "bell pepper" and style == "blob")  # has no such icon
        ]
        return [str(n) for n in rng.choice(allowed, number, replace=False)], style

    def _single(self, color: str, rng: np.random.Generator) -> Picture:
        (name,), style = self._names(1, color, rng)
        pixels = self.world.centred(_icon(name), STYLES[style], color, rng)
        shown = self._phrase(name, rng) if rng.random() < 0.97 else "a thing"
        return Picture(pixels, self._frame(shown, style, color, rng), name, style, color)

    def _placed(self, color: str, rng: np.random.Generator) -> Picture:
        (name,), style = self._names(1, color, rng)
        side = str(rng.choice(captions.SIDES))
        size = int(rng.integers(26, 37))
        left, top = _at(side, size, rng)
        thing = self.words.placed(self._phrase(name, rng), side, rng)
        return Picture(
            self._draw([(name, size, left, top)], style, color), self._frame(thing, style, color, rng), "", style, color
        )  # fmt: skip

    def _sized(self, color: str, rng: np.random.Generator) -> Picture:
        (name,), style = self._names(1, color, rng)
        big = rng.random() < 0.5
        size = int(rng.integers(57, 63) if big else rng.integers(20, 29))
        corner = (icon_world.SIZE - size) // 2
        thing = self._phrase(name, rng, size=str(rng.choice(_BIG if big else _SMALL)))
        pixels = self._draw([(name, size, corner, corner)], style, color)
        return Picture(pixels, self._frame(thing, style, color, rng), name, style, color)

    def _count(self, color: str, rng: np.random.Generator) -> Picture:
        (name,), style = self._names(1, color, rng)
        while icon_world.plural(name) in captions.unseen_synonyms():
            (name,), style = self._names(1, color, rng)
        word = str(rng.choice(list(COUNTS)))
        size = 30 if word == "two" else 28
        corners = icon_world.layout(COUNTS[word], size)
        pixels = self._draw([(name, size, *corner) for corner in corners], style, color)
        thing = self.words.noun_phrase(icon_world.plural(name), rng, determiner=word)
        return Picture(pixels, self._frame(thing, style, color, rng), "", style, color)

    def _two(self, color: str, rng: np.random.Generator) -> Picture:
        """Return a picture of two objects."""
        names, style = self._names(2, color, rng)
        thing, sides = self._pair(names, rng)
        size = int(rng.integers(28, 33))
        icons = [
            (name, size, *_at(side, size, rng)) for name, side in zip(names, sides, strict=True)
        ]
        return Picture(
            self._draw(icons, style, color), self._frame(thing, style, color, rng), "", style, color
        )

    def _pair(self, names: Sequence[str], rng: np.random.Generator) -> tuple[str, tuple[str, str]]:
        """Return words for two objects, and the side of each; without words for places the first is on the left."""
        one, other = (self._phrase(name, rng) for name in names)
        if rng.random() < 0.6:
            return self.words.pair(one, other, rng), ("left", "right")
        relation = str(rng.choice(list(_RELATIONS)))
        side = _RELATIONS[relation]
        opposite = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}[side]
        form = rng.random() < 0.7
        thing = (
            f"{one} {relation} {other}"
            if form
            else f"{one} on the {side} and {other} on the {opposite}"
        )
        return thing, (side, opposite)

    def _named(self, color: str, rng: np.random.Generator) -> Picture:
        """Return a person, a flag or a logo, with a caption of the frames."""
        label, icon, set_, style = self.world.named(rng)
        pixels = self.world.centred(icon, set_, color, rng)
        thing = self.words.noun_phrase(label, rng, determiner="a" if style else "the")
        return Picture(pixels, self._frame(thing, style, color, rng), label, style, color)

    def _draw(
        self, icons: Sequence[tuple[str, int, int, int]], style: str, color: str
    ) -> np.ndarray:
        placed = [
            (self.world.icon(_icon(name), STYLES[style], size), left, top)
            for name, size, left, top in icons
        ]
        return self.world.compose(placed, color)


def ground(kind: str, color: str, other: str, rng: np.random.Generator, size: int) -> np.ndarray:
    """Return a background of one of `GROUNDS`, floats (size, size, 3) in [0, 1]."""
    first, second = (np.array(COLORS[c], np.float32) / 255 for c in (color, other))
    rows, columns = np.mgrid[0:size, 0:size].astype(np.float32) / size
    angle = rng.uniform(0, 2 * np.pi)
    along = rows * np.sin(angle) + columns * np.cos(angle)
    if kind == "gradient":
        mix = (along - along.min()) / (along.max() - along.min())
    elif kind == "striped":
        mix = (np.floor(along * rng.integers(5, 13)) % 2).astype(np.float32)
    elif kind == "textured":
        coarse = rng.normal(size=(size // 8 + 1, size // 8 + 1)).astype(np.float32)
        mix = np.kron(coarse, np.ones((8, 8), np.float32))[:size, :size]
        for axis in (0, 1):
            mix = np.mean([np.roll(mix, shift, axis) for shift in range(-4, 5)], axis=0)
        shade = np.clip(0.95 + 0.06 * mix / max(float(mix.std()), 1e-6), 0.75, 1.1)
        return np.clip(first * shade[..., None], 0, 1).astype(np.float32)
    else:
        mix = np.zeros_like(rows)
    return first * (1 - mix[..., None]) + second * mix[..., None]


def _icon(name: str) -> str:
    return OBJECTS.get(name) or captions.more_objects()[name]


def _color(rng: np.random.Generator) -> str:
    return "white" if rng.random() < 0.3 else str(rng.choice(list(COLORS)))


def _at(
    side: str, size: int, rng: np.random.Generator, width: int = icon_world.SIZE
) -> tuple[int, int]:
    """Return left and top of an icon at a side of a picture, at most two pixels from its place."""
    free = width - size
    x, y = {"left": (0.06, 0.5), "right": (0.94, 0.5), "top": (0.5, 0.06), "bottom": (0.5, 0.94)}[
        side
    ]
    moved = (round(f * free) + int(rng.integers(-2, 3)) for f in (x, y))
    left, top = (min(max(value, 0), free) for value in moved)
    return left, top


def _free_box(
    taken: Sequence[tuple[int, int, int]], largest: int, rng: np.random.Generator
) -> tuple[int, int, int]:
    """Return size, left and top of a square in the scene that overlaps the taken ones little, or not at all."""
    best, least = (0, 0, 0), np.inf
    for attempt in range(20):
        size = int(rng.integers(16, max(17, largest - attempt)))
        left, top = (int(rng.integers(0, LARGE - size + 1)) for _ in range(2))
        overlap = sum(
            max(0, min(left + size, b[1] + b[0]) - max(left, b[1]))
            * max(0, min(top + size, b[2] + b[0]) - max(top, b[2]))
            for b in taken
        )
        if overlap < least:
            best, least = (size, left, top), overlap
        if overlap == 0:
            break
    return best
