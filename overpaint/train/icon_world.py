"""The icon world: public icon artwork, composed into captioned pictures.

An **object** has the name of an emoji and can be drawn in six **styles**. A picture shows one to four icons on a plain
background that has a **color**. Icons of persons stand for **actions**, icons of flags for **facts**, and logos for
**trademarks**. Pictures of several icons show **counts** and **positions**. A tenth of the (object, style) pairs and a
tenth of the (object, color) pairs are never shown in training. They test if a model combines objects with styles and
colors, or only memorises pictures.

The artwork comes from the npm packages `@iconify-json/<set>` at pinned versions. The SHA-256 of each archive is checked
before the archive is read. Only the training recipes run `npm pack`; they switch its install scripts off.

Sources and licences: noto, noto-v1 Apache-2.0; twemoji CC-BY-4.0; openmoji CC-BY-SA-4.0; fluent-emoji-flat,
fluent-emoji-high-contrast, circle-flags MIT; logos CC0-1.0.
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from overpaint.errors import MissingExtra
from overpaint.probes import text as english
from overpaint.train import programs

__all__ = [
    "ACTIONS",
    "COLORS",
    "FLAGS",
    "LOGOS",
    "OBJECTS",
    "SIZE",
    "STYLES",
    "Picture",
    "World",
    "captions_corpus",
    "fetch",
    "held_out",
    "held_out_colors",
    "layout",
    "place",
    "plural",
    "subjects",
]

SIZE = 64  # pixels, square

# Version of the package and SHA-256 of the archive that `npm pack` writes.
PACKAGES = {
    "twemoji": ("1.2.5", "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7"),
    "noto": ("1.2.9", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad"),
    "openmoji": ("1.2.29", "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5"),
    "fluent-emoji-flat": (
        "1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
    ),
    "noto-v1": ("1.2.5", "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37"),
    "fluent-emoji-high-contrast": (
        "1.2.6",
        "0b92d48c90d2200bd499e3cdd09a127ca6a8c8ddefd34c35eb5a1e4994012ae0",
    ),
    "circle-flags": ("1.2.11", "ee9a03f6a6fdd79cc6325bdcb7bb93b83d331e60b16e226188f154a64b6bb4a9"),
    "logos": ("1.2.19", "1e8907c088bbf02eab8ee1b28f37e68ef22c380f2fb579ff99736b8ce5abf13a"),
}

# From the name of a style in captions to its icon set.
STYLES = {
    "noto": "noto",
    "twemoji": "twemoji",
    "openmoji": "openmoji",
    "fluent": "fluent-emoji-flat",
    "blob": "noto-v1",
    "high contrast": "fluent-emoji-high-contrast",
}

COLORS = {
    "white": (255, 255, 255),
    "red": (232, 100, 96),
    "orange": (250, 176, 92),
    "yellow": (250, 228, 120),
    "green": (136, 204, 128),
    "blue": (124, 176, 240),
    "purple": (176, 140, 220),
    "pink": (250, 180, 208),
    "gray": (168, 172, 178),
}

# Name of an object in captions, and after = the name of its icon if that is another one.
_OBJECTS = """
apple=red-apple banana cherries grapes pineapple strawberry watermelon lemon carrot eggplant mushroom bread croissant
hamburger pizza doughnut ice-cream lollipop cat=cat-face dog=dog-face bear cow=cow-face horse=horse-face lion
monkey=monkey-face panda pig=pig-face rabbit=rabbit-face tiger=tiger-face frog fox koala elephant camel penguin owl duck
eagle fish dolphin octopus crab snail turtle butterfly bee=honeybee ladybug=lady-beetle car=automobile bus bicycle
helicopter airplane rocket sailboat tractor house castle church tent pine-tree=evergreen-tree palm-tree cactus rose
tulip sunflower maple-leaf star sun rainbow snowman fire umbrella key bell balloon bomb camera crown anchor guitar
hammer light-bulb envelope soccer-ball ghost skull trophy gift=wrapped-gift top-hat
"""
OBJECTS = {
    name.replace("-", " "): icon or name
    for name, _, icon in (entry.partition("=") for entry in _OBJECTS.split())
}

ACTIONS = {
    verb: f"person-{verb.replace(' ', '-')}"
    for verb in (
        "biking",
        "bowing",
        "golfing",
        "juggling",
        "running",
        "surfing",
        "swimming",
        "walking",
    )
}

FLAGS = {
    "brazil": "br", "canada": "ca", "china": "cn", "finland": "fi", "france": "fr", "germany": "de", "greece": "gr",
    "india": "in", "italy": "it", "japan": "jp", "kenya": "ke", "norway": "no", "south korea": "kr", "sweden": "se",
    "switzerland": "ch", "turkey": "tr",
}  # fmt: skip

LOGOS = (
    "apple", "bitcoin", "chrome", "dropbox", "facebook", "javascript", "opera", "pinterest", "python", "redis",
    "swift", "telegram", "tensorflow", "twitter", "ubuntu", "vue",
)  # fmt: skip

COUNTS = {"two": 2, "three": 3, "four": 4}
POSITIONS = ("to the left of", "to the right of", "above", "below")

# From the number of icons to the position of each: left and top as fractions of the free space.
_LAYOUTS = {
    2: ((0.06, 0.5), (0.94, 0.5)),
    3: ((0.5, 0.06), (0.06, 0.94), (0.94, 0.94)),
    4: ((0.06, 0.06), (0.94, 0.06), (0.06, 0.94), (0.94, 0.94)),
}
_PLURALS = {"cherries": "cherries", "grapes": "grapes", "fish": "fish", "fox": "foxes", "bus": "buses",
              "octopus": "octopuses", "church": "churches", "butterfly": "butterflies", "ladybug": "ladybugs",
              "maple leaf": "maple leaves", "strawberry": "strawberries", "fire": "fires"}  # fmt: skip


@dataclass(frozen=True)
class Picture:
    """A captioned picture: pixels, uint8 (64, 64, 3), caption, and labels; a label that does not apply is empty."""

    pixels: np.ndarray
    caption: str
    object: str
    style: str
    color: str


def subjects() -> tuple[str, ...]:
    """Return every subject that a picture can show: objects, persons with an action, flags, logos."""
    return (
        *OBJECTS,
        *(f"person {verb}" for verb in ACTIONS),
        *(f"flag of {country}" for country in FLAGS),
        *(f"{logo} logo" for logo in LOGOS),
    )


def _smallest_tenth(
    names: Sequence[str], others: Sequence[str], salt: str
) -> frozenset[tuple[str, str]]:
    """Return the tenth of the pairs that have the smallest hashes; adding a name changes few of them."""
    pairs = [(a, b) for a in names for b in others]
    order = sorted(pairs, key=lambda p: hashlib.sha256(f"{salt}:{p[0]}:{p[1]}".encode()).digest())
    return frozenset(order[: len(pairs) // 10])


def held_out() -> frozenset[tuple[str, str]]:
    """Return the (object, style) pairs that are not shown in training."""
    return _smallest_tenth(tuple(OBJECTS), tuple(STYLES), "object-style")


def held_out_colors() -> frozenset[tuple[str, str]]:
    """Return the (object, color) pairs that are not shown in training."""
    return _smallest_tenth(tuple(OBJECTS), tuple(c for c in COLORS if c != "white"), "object-color")


def fetch(folder: Path) -> dict[str, dict]:
    """Download the icon sets that `folder` lacks, and return the parsed `icons.json` of each set.

    Raises:
        ValueError: An archive does not have the pinned SHA-256.
        OSError: `npm` is not installed, or cannot reach its registry.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sets = {}
    for name, (version, digest) in PACKAGES.items():
        archive = folder / f"iconify-json-{name}-{version}.tgz"
        if not archive.exists():
            _pack(f"@iconify-json/{name}@{version}", archive)
        data = archive.read_bytes()
        computed = hashlib.sha256(data).hexdigest()
        if computed != digest:
            raise ValueError(
                f"{archive.name} has SHA-256 {computed}, expected {digest}: delete the file and run the recipe again."
            )
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            member = tar.extractfile("package/icons.json")
            assert member is not None
            sets[name] = json.load(member)
    return sets


def _pack(package: str, archive: Path) -> None:
    """Download an npm package to the file `archive`."""
    messages = programs.Messages(
        absent="the artwork comes from npm, which is not installed: install Node.js, or put the archives into "
        f"{str(archive.parent)!r} yourself.",
        failed=f"npm could not fetch {package}",
        remedy="check the connection and the registry that npm is set to.",
    )
    programs.fetch(["npm", "pack", "--silent", "--ignore-scripts", package], archive, messages)


class World:
    """Draws captioned pictures: `World(fetch(folder)).sample(rng)`.

    Rendered icons are cached for each size, so drawing a picture takes half a millisecond.
    """

    def __init__(self, sets: dict[str, dict], *, hold_out: bool = True) -> None:
        self.sets = sets
        self._icon_cache: dict[tuple[str, str, int], np.ndarray] = {}
        self.held_out = held_out() if hold_out else frozenset()
        self.held_out_colors = held_out_colors() if hold_out else frozenset()

    def icon(self, name: str, set_: str, size: int) -> np.ndarray:
        """Return icon `name` of the icon set `set_`, float32 RGBA in [0, 1], shape (size, size, 4)."""
        key = (name, set_, size)
        if key not in self._icon_cache:
            self._icon_cache[key] = _rasterise(self.sets[set_], name, size)
        return self._icon_cache[key]

    def compose(self, icons: Sequence[tuple[np.ndarray, int, int]], color: str) -> np.ndarray:
        """Return `icons` (RGBA, left, top) on a plain background `color`, uint8 (64, 64, 3)."""
        canvas = np.empty((SIZE, SIZE, 3), np.float32)
        canvas[:] = np.array(COLORS[color], np.float32) / 255
        for rgba, left, top in icons:
            place(canvas, rgba, left, top)
        return (canvas * 255 + 0.5).astype(np.uint8)

    def single(self, object_: str, style: str, color: str, rng: np.random.Generator) -> np.ndarray:
        """Return a picture of one object, at most two pixels from the centre, uint8 (64, 64, 3)."""
        return self.centred(OBJECTS[object_], STYLES[style], color, rng)

    def sample(self, rng: np.random.Generator) -> Picture:
        """Return a random training picture; if `hold_out` is true, it shows no held-out pair."""
        kind = rng.choice(6, p=(0.80, 0.05, 0.05, 0.04, 0.03, 0.03))
        color = "white" if rng.random() < 0.3 else str(rng.choice(list(COLORS)))
        if kind == 0:
            return self._sample_single(color, rng)
        if kind == 1:
            return self._sample_count(color, rng)
        if kind == 2:
            return self._sample_position(color, rng)
        return self._sample_named(int(kind), color, rng)

    def centred(self, name: str, set_: str, color: str, rng: np.random.Generator) -> np.ndarray:
        """Return a picture of one icon, at most two pixels from the centre, uint8 (64, 64, 3)."""
        size = int(rng.choice((48, 50, 52)))
        left, top = (int((SIZE - size) / 2 + rng.integers(-2, 3)) for _ in range(2))
        return self.compose([(self.icon(name, set_, size), left, top)], color)

    def _pair(self, rng: np.random.Generator, color: str) -> tuple[str, str]:
        """Return a random (object, style) pair that training may show on `color`."""
        while True:
            pair = str(rng.choice(list(OBJECTS))), str(rng.choice(list(STYLES)))
            if pair not in self.held_out and (pair[0], color) not in self.held_out_colors:
                return pair

    def _sample_single(self, color: str, rng: np.random.Generator) -> Picture:
        object_, style = self._pair(rng, color)
        pixels = self.single(object_, style, color, rng)
        names_style = rng.random() < 0.9
        thing = object_ if rng.random() < 0.95 else "thing"
        caption = _caption(thing, style if names_style else "", color, rng)
        return Picture(pixels, caption, object_, style, color)

    def _sample_count(self, color: str, rng: np.random.Generator) -> Picture:
        object_, style = self._pair(rng, color)
        word = str(rng.choice(list(COUNTS)))
        number = COUNTS[word]
        size = 30 if number == 2 else 28
        positions = _LAYOUTS[number]
        icon = self.icon(OBJECTS[object_], STYLES[style], size)
        pixels = self.compose([(icon, *_corner(p, size)) for p in positions], color)
        plural = _PLURALS.get(object_, object_ + "s")
        return Picture(pixels, _caption(plural, style, color, rng, article=word), "", style, color)

    def _sample_position(self, color: str, rng: np.random.Generator) -> Picture:
        first, style = self._pair(rng, color)
        second = first
        while (
            second == first
            or (second, style) in self.held_out
            or (second, color) in self.held_out_colors
        ):
            second = str(rng.choice(list(OBJECTS)))
        relation = str(rng.choice(POSITIONS))
        positions = (
            ((0.06, 0.5), (0.94, 0.5)) if relation.startswith("to") else ((0.5, 0.06), (0.5, 0.94))
        )
        if relation in ("to the right of", "below"):
            positions = positions[::-1]
        icons = [
            (self.icon(OBJECTS[name], STYLES[style], 30), *_corner(position, 30))
            for name, position in zip((first, second), positions, strict=True)
        ]
        thing = f"{first} {relation} {english.article(second)} {second}"
        return Picture(
            self.compose(icons, color), _caption(thing, style, color, rng), "", style, color
        )

    def _sample_named(self, kind: int, color: str, rng: np.random.Generator) -> Picture:
        label, icon, set_, style = _named(self.sets, kind, rng)
        pixels = self.centred(icon, set_, color, rng)
        caption = _caption(label, style, color, rng, article=None if kind == 3 else "the")
        return Picture(pixels, caption, label, style, color)

    def named(self, rng: np.random.Generator) -> tuple[str, str, str, str]:
        """Return a random person, flag or logo: its label, its icon, its icon set, and its style or an empty text."""
        return _named(self.sets, int(rng.choice((3, 4, 5), p=(0.4, 0.3, 0.3))), rng)


def _named(sets: dict[str, dict], kind: int, rng: np.random.Generator) -> tuple[str, str, str, str]:
    if kind == 3:
        verb, style = str(rng.choice(list(ACTIONS))), str(rng.choice(list(STYLES)))
        return f"person {verb}", ACTIONS[verb], STYLES[style], style
    if kind == 4:
        country = str(rng.choice(list(FLAGS)))
        return f"flag of {country}", FLAGS[country], "circle-flags", ""
    logo = str(rng.choice(LOGOS))
    icons = sets["logos"]["icons"]
    return f"{logo} logo", f"{logo}-icon" if f"{logo}-icon" in icons else logo, "logos", ""


def place(canvas: np.ndarray, rgba: np.ndarray, left: int, top: int) -> None:
    """Draw the icon `rgba`, float32 (S, S, 4), onto `canvas`, floats (H, W, 3), in place."""
    size = rgba.shape[0]
    patch = canvas[top : top + size, left : left + size]
    patch *= 1 - rgba[..., 3:]
    patch += rgba[..., :3] * rgba[..., 3:]


def layout(number: int, size: int) -> list[tuple[int, int]]:
    """Return left and top of each of two to four icons of `size` pixels in a picture of 64 pixels."""
    return [_corner(position, size) for position in _LAYOUTS[number]]


def plural(name: str) -> str:
    """Return the plural of an object's name."""
    return _PLURALS.get(name, name + "s")


def captions_corpus(sets: dict[str, dict], captions: Sequence[str]) -> list[str]:
    """Return the texts to train the tokenizer on: the names of all icons, and training captions."""
    names = {name.replace("-", " ") for icons in sets.values() for name in icons["icons"]}
    return sorted(names) + list(captions)


def _caption(
    thing: str, style: str, color: str, rng: np.random.Generator, article: str | None = None
) -> str:
    """Return a random caption; it names the color with probability 0.9, or 0.3 if the color is white."""
    article = english.article(thing) if article is None else article
    form = rng.random()
    if not style:
        text = f"{article} {thing}"
    elif form < 0.6:
        text = f"{article} {thing} in {style} style"
    elif form < 0.8:
        text = f"{style} style {thing}"
    else:
        text = f"{article} {thing}, {style} style"
    if rng.random() < (0.3 if color == "white" else 0.9):
        text += f" on {english.article(color)} {color} background"
    lead = ("", "a picture of ", "an image of ", "a drawing of ", "a photo of ")[
        int(rng.choice(5, p=(0.5, 0.125, 0.125, 0.125, 0.125)))
    ]
    return lead + text


def _corner(position: tuple[float, float], size: int) -> tuple[int, int]:
    return round(position[0] * (SIZE - size)), round(position[1] * (SIZE - size))


def _rasterise(icons: dict, name: str, size: int) -> np.ndarray:
    try:
        import resvg_py
    except ImportError as error:
        raise MissingExtra(
            "drawing icons needs resvg-py. Install it with: pip install resvg-py."
        ) from error
    while name not in icons["icons"]:
        name = icons["aliases"][name]["parent"]
    icon = icons["icons"][name]
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    side = max(width, height)
    box = f"{(width - side) / 2} {(height - side) / 2} {side} {side}"
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{box}" width="{size}" height="{size}">{icon["body"]}</svg>'
    )
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg))
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"), np.float32) / 255
