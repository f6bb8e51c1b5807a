"""Pictures of `icons`: held-out words and pairs, places, sizes, counts, and scenes of 128 pixels."""

import re
from collections.abc import Sequence

import icon_worlds
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from overpaint.train import captions, icon_scenes, icon_world
from overpaint.train.icon_scenes import GROUNDS, LARGE, Scenes
from overpaint.train.icon_world import COLORS, COUNTS, OBJECTS, STYLES, Picture

OBJECT_OF = {icon: name for name, icon in {**OBJECTS, **captions.more_objects()}.items()}
STYLE_OF = {set_: style for style, set_ in STYLES.items()}
STYLE_NAMES = "|".join([*STYLES, *captions._words()["aliases"].values()])
COLOR = (
    rf"(?:textured )?(?:{'|'.join(COLORS)})(?: and (?:{'|'.join(COLORS)}) (?:gradient|striped))?"
)
UNSEEN: tuple[captions.Part, ...] = ("validation", "held out")
OPPOSITE = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return Scenes(icon_worlds.build(colored=True))


class OneObject(Scenes):
    """Scenes of a fixed object, or of two, in a fixed style."""

    def _names(self, number: int, color: str, rng: np.random.Generator) -> tuple[list[str], str]:
        return ["cat", "dog"][:number], "noto"


@pytest.fixture(scope="module")
def fixed() -> OneObject:
    return OneObject(icon_worlds.build(colored=True))


def colored(ground: str) -> str:
    """Return the pattern of a way to name the background, in any color."""
    return ground.replace("a {color}", f"an? {COLOR}").replace("{color}", COLOR)


def patterns() -> dict[str, re.Pattern[str]]:
    """Return what no training caption may match: held-out synonyms, requests, asides, styles, grounds, orders."""

    def entries(name: str) -> Sequence[str]:
        return [e for part in UNSEEN for e in captions._entries(name, part)]

    plurals = {icon_world.plural(name) for name in OBJECTS}  # "two carrots" must be said
    texts = {s: rf"\b{re.escape(s)}\b" for s in captions.unseen_synonyms() if s not in plurals}
    texts |= {r: rf"(?:^|[,:] ){re.escape(r)}" for r in entries("requests")}
    texts |= {a: rf"{re.escape(a)}\b" for a in entries("asides")}
    texts |= {g: colored(g) for g in entries("grounds")}
    # The name alone is a part of every other way to name a style.
    styles = [s for s in entries("styles") if s != "{style}"]
    texts |= {s: s.format(style=rf"(?:{STYLE_NAMES})") for s in styles}
    assert set(entries("orders")) == {
        "{thing}, {ground}, {style}",
        "{ground}: {request}{thing} {style}{aside}",
        "{request}{thing}. {style}. {ground}.{aside}",
        "{style}, {thing}, {ground}",
    }
    grounds = "|".join(colored(g) for g in captions._entries("grounds", "trained"))
    texts |= {
        "{thing}, {ground}, {style}": rf", (?:{grounds}), [^,]*(?:{STYLE_NAMES})",
        "{ground}: {thing}": rf"^(?:{grounds}): ",
        "{thing}. {style}": rf"\. [^.]*(?:{STYLE_NAMES})[^.]*(?:\.|$)",
        "{style}, {thing}, {ground}": rf"^[^,]*(?:{STYLE_NAMES})[^,]*, [^,]+, (?:{grounds})$",
    }
    return {name: re.compile(text) for name, text in texts.items()}


@pytest.mark.parametrize("draws", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_no_training_caption_holds_what_is_held_out(draws: int) -> None:
    world = icon_worlds.Recorded()
    rng, forbidden = np.random.default_rng(draws), patterns()
    reserved, reserved_colors = icon_world.held_out(), icon_world.held_out_colors()
    scenes, pairs = Scenes(world), set()
    for _ in range(draws):
        for draw in (scenes.small, scenes.large):
            world.shown.clear()
            picture = draw(rng)
            assert [n for n, p in forbidden.items() if p.search(picture.caption)] == [], picture
            shown = {(OBJECT_OF[i], STYLE_OF[s]) for i, s in world.shown if i in OBJECT_OF}
            pairs |= shown
            assert not shown & reserved
            assert not {(name, picture.color) for name, _ in shown} & reserved_colors
    assert len(pairs) > 300


def test_the_patterns_find_what_is_held_out() -> None:
    """The test above would notice a caption of the held-out parts."""
    rng, forbidden = np.random.default_rng(0), patterns()
    for part in UNSEEN:
        words, names = captions.Captions(part), set[str]()
        for _ in range(100):
            text = words.frame("a cat", "noto", "red", rng)
            names |= {name for name, p in forbidden.items() if p.search(text)}
        assert {*captions._entries("styles", part)} - {"{style}"} <= names
        assert {*captions._entries("grounds", part)} <= names
    for part in ("requests", "asides"):
        for entry in (e for of in UNSEEN for e in captions._entries(part, of)):
            written = (
                f"{entry}a cat, like noto" if part == "requests" else f"a cat, like noto{entry}"
            )
            assert forbidden[entry].search(written)
    assert forbidden["hound"].search("draw me a hound, please")
    order = forbidden["{thing}, {ground}, {style}"]
    assert order.search("a cat, on an orange card, noto style")
    assert not order.search("a cat on red, noto style, please")
    assert not order.search("a cat, noto style, on red, please")
    assert forbidden["{thing}. {style}"].search("a cat. noto style. on red.")
    assert forbidden["{style}, {thing}, {ground}"].search("noto style, a cat, on red")
    assert not forbidden["{style}, {thing}, {ground}"].search("noto style, draw a cat, please")
    assert forbidden["{ground}: {thing}"].search("on red: draw a cat in noto style")


def test_a_label_is_named_by_the_caption_with_the_name_or_a_synonym_of_training(
    scenes: Scenes,
) -> None:
    rng = np.random.default_rng(1)
    pictures = [draw(rng) for _ in range(200) for draw in (scenes.small, scenes.large)]
    labelled = [p for p in pictures if p.object in OBJECTS and "thing" not in p.caption]
    assert len(labelled) > 100
    for picture in labelled:
        names = {picture.object, *captions._trained_synonyms()[picture.object]}
        assert any(name in picture.caption for name in names), picture
    assert {p.object for p in pictures} & {"", *icon_world.subjects()[len(OBJECTS) :]} > {""}


def test_the_same_seed_draws_the_same_picture(scenes: Scenes) -> None:
    for draw in (scenes.small, scenes.large):
        first, second = (draw(np.random.default_rng(5)) for _ in range(2))
        assert first.caption == second.caption and np.array_equal(first.pixels, second.pixels)


def test_pictures_have_bytes_of_two_sizes(scenes: Scenes) -> None:
    rng = np.random.default_rng(2)
    for draw, size in ((scenes.small, icon_world.SIZE), (scenes.large, LARGE)):
        pixels = draw(rng).pixels
        assert pixels.shape == (size, size, 3) and pixels.dtype == np.uint8


def mask(picture: Picture, name: str) -> np.ndarray:
    """Return where the dot of `name` is, bool (H, W)."""
    color = icon_worlds.color_of(OBJECTS[name])
    return (np.abs(picture.pixels.astype(int) - color) <= 1).all(2)


def side_of(where: np.ndarray) -> tuple[str, float]:
    """Return the side of the picture's middle where the mask's centre is, and its distance from the middle."""
    rows, columns = ndimage.center_of_mass(where)
    y, x = rows - (len(where) - 1) / 2, columns - (len(where) - 1) / 2
    if abs(x) > abs(y):
        return ("right" if x > 0 else "left"), abs(x)
    return ("bottom" if y > 0 else "top"), abs(y)


def test_an_icon_stands_where_the_caption_says(fixed: OneObject) -> None:
    rng = np.random.default_rng(3)
    places = "|".join(captions._words()["places"]).replace("{side}", "(left|right|top|bottom)")
    seen = set()
    for _ in range(60):
        picture = fixed._placed("white", rng)
        named = {s for m in re.finditer(places, picture.caption) for s in m.groups() if s}
        side, distance = side_of(mask(picture, "cat"))
        assert named == {side} and distance >= 8, picture.caption
        seen |= named
    assert seen == set(captions.SIDES)


def test_two_icons_stand_on_opposite_sides_as_the_caption_says(fixed: OneObject) -> None:
    rng = np.random.default_rng(4)
    relations = {
        "to the left of": "left",
        "to the right of": "right",
        "above": "top",
        "below": "bottom",
    }
    placed = 0
    for _ in range(80):
        picture = fixed._two("white", rng)
        side, distance = side_of(mask(picture, "cat"))
        other, opposite = side_of(mask(picture, "dog"))
        assert other == OPPOSITE[side] and min(distance, opposite) >= 8
        said = [s for words, s in relations.items() if f" {words} " in picture.caption]
        said += re.findall(r" on the (left|right|top|bottom) and ", picture.caption)
        assert said in ([], [side]), picture.caption
        placed += len(said)
    assert 25 < placed < 55  # half of them


def test_a_big_icon_is_big_and_a_small_one_small(fixed: OneObject) -> None:
    rng = np.random.default_rng(5)
    for _ in range(40):
        picture = fixed._sized("white", rng)
        words = set(re.findall(r"\w+", picture.caption))
        side = np.flatnonzero(mask(picture, "cat").any(0))
        width = (side[-1] - side[0] + 1) * 16 / 14  # the dot fills 14 of 16 units
        big = bool(words & {"big", "large", "huge"})
        assert big != bool(words & {"small", "tiny", "little"}) or "open" in words
        assert 53 <= width <= 66 if big else 17 <= width <= 31


def test_as_many_icons_are_shown_as_the_caption_counts(fixed: OneObject) -> None:
    rng = np.random.default_rng(6)
    for _ in range(30):
        picture = fixed._count("white", rng)
        (word,) = [w for w in COUNTS if re.search(rf"\b{w} (\S+ )?cats\b", picture.caption)]
        _, number = ndimage.label(mask(picture, "cat"))
        assert number == COUNTS[word]


def test_scenes_have_one_to_four_icons_of_16_to_80_pixels_inside_them_on_each_ground(
    scenes: Scenes, monkeypatch: pytest.MonkeyPatch
) -> None:
    boxes: list[tuple[int, int, int]] = []
    kinds: list[str] = []
    place, ground = icon_scenes.place, icon_scenes.ground

    def record_place(canvas: np.ndarray, rgba: np.ndarray, left: int, top: int) -> None:
        boxes.append((len(rgba), left, top))
        place(canvas, rgba, left, top)

    def record_ground(kind: str, *arguments) -> np.ndarray:
        kinds.append(kind)
        return ground(kind, *arguments)

    monkeypatch.setattr(icon_scenes, "place", record_place)
    monkeypatch.setattr(icon_scenes, "ground", record_ground)
    rng, counts = np.random.default_rng(7), []
    sizes = []
    for _ in range(150):
        boxes.clear()
        scenes.large(rng)
        counts.append(len(boxes))
        sizes += [size for size, *_ in boxes]
        for size, left, top in boxes:
            assert min(left, top) >= 0 and max(left, top) + size <= LARGE
    assert set(counts) == {1, 2, 3, 4} and set(kinds) == set(GROUNDS)
    assert 16 <= min(sizes) < 24 and 60 < max(sizes) <= 80


@settings(max_examples=100, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32), number=st.integers(1, 6), largest=st.integers(16, 128))
def test_a_free_box_is_inside_the_scene(seed: int, number: int, largest: int) -> None:
    rng, taken = np.random.default_rng(seed), []
    for _ in range(number):
        size, left, top = icon_scenes._free_box(taken, largest, rng)
        assert 16 <= size <= max(16, largest)
        assert min(left, top) >= 0 and max(left, top) + size <= LARGE
        taken.append((size, left, top))


def test_a_free_box_avoids_the_taken_ones_where_there_is_room() -> None:
    for seed in range(20):
        taken = [(64, 0, 0)]
        size, left, top = icon_scenes._free_box(taken, 40, np.random.default_rng(seed))
        assert left >= 64 or top >= 64 or size == 0


def test_grounds_are_made_of_their_colors() -> None:
    red, blue = (np.array(COLORS[c]) / 255 for c in ("red", "blue"))

    def draw(kind: str) -> np.ndarray:
        canvas = icon_scenes.ground(kind, "red", "blue", np.random.default_rng(0), 64)
        assert canvas.shape == (64, 64, 3) and canvas.dtype.kind == "f"
        return canvas.reshape(-1, 3)

    assert np.allclose(draw("plain"), red)
    striped = draw("striped")
    ends = np.stack([np.abs(striped - color).max(1) < 1e-6 for color in (red, blue)])
    assert ends.any(0).all() and 0.2 < ends[0].mean() < 0.8
    mixed = draw("gradient")
    share = (mixed - red) @ (blue - red) / ((blue - red) @ (blue - red))
    assert np.allclose(mixed, red + share[:, None] * (blue - red), atol=1e-6)
    assert share.min() == pytest.approx(0, abs=1e-6) and share.max() == pytest.approx(1, abs=1e-6)
    ratio = draw("textured")[:, 1:] / red[1:]
    assert 0.75 - 1e-6 <= ratio.min() < 0.9 and 1 < ratio.max() <= 1.1 + 1e-6


def test_an_icon_is_drawn_by_its_opacity() -> None:
    canvas = np.full((4, 4, 3), 0.5, np.float32)
    rgba = np.zeros((2, 2, 4), np.float32)
    rgba[0, 0], rgba[0, 1] = (1, 0, 0, 1), (1, 1, 1, 0.5)
    icon_scenes.place(canvas, rgba, 1, 2)
    assert canvas[2, 1].tolist() == [1, 0, 0] and canvas[2, 2].tolist() == [0.75] * 3
    canvas[2, 1:3] = 0.5
    assert (canvas == 0.5).all()
