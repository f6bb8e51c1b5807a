"""The caption grammar of `icons`: its parts, the tenths that training never shows, and orders with parts left out."""

import hashlib
import re
import string

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overpaint.train import captions, icon_world
from overpaint.train.captions import Captions

LISTS = ("orders", "requests", "asides", "adjectives", "styles", "grounds")
WORDS = captions._words()


@pytest.mark.parametrize("name", LISTS)
def test_a_tenth_of_each_list_is_held_out(name: str) -> None:
    different = {entry for entry in WORDS[name] if entry}
    trained, *reserved = (
        set(captions._entries(name, part)) for part in ("trained", "validation", "held out")
    )
    assert trained - {""} == different - reserved[0] - reserved[1]
    assert not reserved[0] & reserved[1]
    for part in reserved:
        assert part < different and len(part) == max(1, len(different) // 10)


@pytest.mark.parametrize(
    ("part", "expected"), [("validation", "cbc715474f3e"), ("held out", "7bf3cab81100")]
)
def test_what_is_held_out_never_changes(part: captions.Part, expected: str) -> None:
    """The shipped weights were trained without exactly these."""
    entries = {name: captions._entries(name, part) for name in LISTS}
    reserved = (captions.held_out_synonyms(part), sorted(entries.items()))
    digest = hashlib.sha256(repr(reserved).encode()).hexdigest()
    assert digest[:12] == expected


@pytest.mark.parametrize("part", ["validation", "held out"])
def test_a_tenth_of_the_synonyms_is_held_out_and_each_names_one_object(
    part: captions.Part,
) -> None:
    owners = [(s, name) for name, others in captions.synonyms().items() for s in others]
    assert len(dict(owners)) == len(owners) > 280
    assert not set(dict(owners)) & {*icon_world.OBJECTS, *captions.more_objects()}
    assert set(captions.synonyms()) == set(icon_world.OBJECTS)
    reserved = captions.held_out_synonyms(part)
    assert len(reserved) == len(owners) // 10
    assert len(captions.unseen_synonyms()) == 2 * len(reserved)
    assert all(dict(owners)[s] == name for s, name in reserved.items())


def test_no_other_name_holds_a_held_out_synonym() -> None:
    names = [*icon_world.subjects(), *captions.more_objects()]
    names += [s for others in captions.synonyms().values() for s in others]
    for synonym in captions.unseen_synonyms():
        words = re.compile(rf"\b{re.escape(synonym)}\b")
        assert [name for name in names if words.search(name)] in ([synonym], [])


def test_frames_are_the_product_of_their_parts() -> None:
    assert captions.frame_count() == 20 * 77 * 36 * 20 * 18  # the sixth list is of adjectives


def test_names_are_synonyms_of_training_or_kinds_in_half_of_the_captions() -> None:
    rng, words = np.random.default_rng(0), Captions(kinds={"dog": ("poodle",)})
    drawn = [words.name("dog", rng) for _ in range(1000)]
    synonyms = {*captions.synonyms()["dog"]} - set(captions.unseen_synonyms())
    assert set(drawn) == {"dog", "poodle"} | synonyms
    assert 0.45 < drawn.count("dog") / 1000 < 0.55
    assert 0.15 < drawn.count("poodle") / 1000 < 0.25
    assert words.name("orange", rng) == "orange"
    drawn = [Captions().name("dog", rng) for _ in range(1000)]
    assert set(drawn) == {"dog"} | synonyms and 0.65 < drawn.count("dog") / 1000 < 0.75


@pytest.mark.parametrize("part", ["trained", "validation", "held out"])
def test_a_caption_has_the_parts_of_its_side(part: captions.Part) -> None:
    rng, words = np.random.default_rng(0), Captions(part)
    for name in LISTS:
        assert {words.pick(name, rng) for _ in range(1500)} == set(captions._entries(name, part))


def test_noun_phrases_have_the_article_of_their_first_word() -> None:
    rng, words = np.random.default_rng(0), Captions()
    phrases = [words.noun_phrase("owl", rng, size="tiny", determiner="a") for _ in range(300)]
    assert {"a tiny owl"} < set(phrases)
    for phrase in phrases:
        article, rest = phrase.split(" ", 1)
        assert article == ("an" if rest[0] in "aeiou" else "a")
        assert sorted(rest.split())[-1] == "tiny" or "tiny" in rest.split()
    assert {len(phrase.split()) for phrase in phrases} == {3, 4}


def test_a_style_has_another_name_in_some_captions() -> None:
    rng, words = np.random.default_rng(0), Captions()
    drawn = [words.frame("a cat", "twemoji", "", rng) for _ in range(300)]
    named = [("twemoji" in text, "little bird" in text) for text in drawn]
    assert named.count((True, True)) == 0
    assert 0.05 < sum(alias for _, alias in named) / 300 < 0.25


def test_words_for_a_place_name_the_side() -> None:
    rng, words = np.random.default_rng(0), Captions()
    for side in captions.SIDES:
        phrase = words.placed("a cat", side, rng)
        assert phrase.startswith("a cat ") and side in phrase.split()


def leaves_marks(order: str, aside: str) -> bool:
    """Return whether the full stop before the aside stays: "a fox., please". Training began with such captions."""
    return ".{aside}" in order and aside.startswith(",")


@pytest.mark.parametrize("order", WORDS["orders"])
def test_an_order_with_parts_left_out_has_no_marks_left_over(order: str) -> None:
    for request in ("", "draw me ", "picture this: "):
        for style in ("", "in noto style"):
            for ground in ("", "on a red background"):
                for aside in ("", ", please", " as you like it"):
                    if not leaves_marks(order, aside):
                        check_tidy(order, request, "a close-up fox", style, ground, aside)


@pytest.mark.parametrize("order", [o for o in WORDS["orders"] if leaves_marks(o, ",")])
def test_a_full_stop_before_an_aside_is_removed(order: str) -> None:
    check_tidy(order, "", "a fox", "in noto style", "on a red background", ", please")


words = st.lists(st.text(string.ascii_lowercase, min_size=2, max_size=8), min_size=1, max_size=3)
parts = words.map(" ".join)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    order=st.sampled_from(sorted(set(WORDS["orders"]))),
    request=st.one_of(st.just(""), parts.map("{} ".format)),
    thing=parts,
    style=st.one_of(st.just(""), parts),
    ground=st.one_of(st.just(""), parts),
    aside=st.one_of(st.just(""), parts.map(" {}".format), parts.map(", {}".format)),
)
def test_any_words_stay_in_a_tidy_order(
    order: str, request: str, thing: str, style: str, ground: str, aside: str
) -> None:
    if not leaves_marks(order, aside):
        check_tidy(order, request, thing, style, ground, aside)


def check_tidy(order: str, request: str, thing: str, style: str, ground: str, aside: str) -> None:
    """Check that the caption is the words of the parts, in their order, with no marks of parts that are left out."""
    filled = order.format(request=request, thing=thing, style=style, ground=ground, aside=aside)
    text = captions._tidy(filled)
    assert re.findall(r"[\w'-]*\w", text) == re.findall(r"[\w'-]*\w", filled)
    assert not re.search(r"[,;|.:]\s*[,;|.:]|\s-\s+[,;|.:-]", text), text  # two marks
    assert not re.search(r"\(\s*\)|\(\s|\s\)|\(\s*[,;|.:-]|[,;|.:-]\s*\)", text), text
    assert not re.search(r"\s\s|\s[,;.:]|^[\s,;|.:-]|[\s,;|:-]$", text), text
    assert text.count("(") == text.count(")")
