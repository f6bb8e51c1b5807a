from collections import Counter

import pytest

from overpaint.probes import questions

LABELS = {
    "object": ("apple", "cat", "rocket", "python logo", "flag of japan"),
    "style": ("noto", "openmoji", "blob"),
    "color": ("white", "red", "blue"),
}
HELD_OUT = frozenset({("apple", "openmoji"), ("cat", "noto")})


def ask(kind="style", erase="openmoji", **options):
    return questions.build(kind, erase, labels=LABELS, held_out=HELD_OUT, **options)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("openmoji style", ("style", "openmoji")),
        ("OpenMoji  Style", ("style", "openmoji")),
        ("apple", ("object", "apple")),
        ("the python logo", ("object", "python logo")),
        ("flag of japan", ("object", "flag of japan")),
        ("japan", ("object", "flag of japan")),
        ("red background", ("color", "red")),
    ],
)
def test_a_concept_is_read_as_the_judge_names_it(text, found):
    assert questions.parse_concept(text, LABELS) == found


def test_an_unknown_concept_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"does not know 'van gogh'.*style: noto, openmoji, blob"):
        questions.parse_concept("van gogh", LABELS)


def test_captions_in_full():
    assert questions.caption("apple", "noto", "") == "an apple in noto style"
    assert questions.caption("cat", "noto", "orange", frame=1) == (
        "a drawing of a cat in noto style on an orange background"
    )
    assert questions.caption("cat", "noto", "", unseen=True) == "the cat is in noto style"
    assert questions.caption("python logo", "", "red") == "the python logo on a red background"


def test_each_style_is_asked_with_the_same_scenes_and_seeds():
    asked = ask(size=6)
    by_style = {
        style: [(q.object, q.color, q.seed) for q in asked if q.role == role and q.style == style]
        for style, role in (("openmoji", "target"), ("noto", "other"), ("blob", "other"))
    }
    assert by_style["openmoji"] == by_style["noto"] == by_style["blob"]
    assert len(by_style["noto"]) == 6


def test_the_roles_are_told_apart():
    asked = ask(size=6)
    assert Counter(q.role for q in asked) == {
        "target": 6, "unseen": 3, "other": 12, "plain": 3, "held out": 1, "other held out": 1,
    }  # fmt: skip
    pairs = {(q.object, q.style) for q in asked if "held out" not in q.role}
    assert not pairs & HELD_OUT
    assert all(q.style == "openmoji" for q in asked if q.role in ("target", "unseen", "held out"))
    assert all(q.style == "" for q in asked if q.role == "plain")
    assert not {q.prompt for q in asked if q.role == "target"} & {
        q.prompt for q in asked if q.role == "unseen"
    }


def test_objects_signs_and_colors_can_be_erased_too():
    logo = ask("object", "python logo", size=4)
    assert {q.prompt for q in logo if q.role == "target"} >= {"the python logo"}
    assert {q.object for q in logo if q.role == "other"} == {"apple", "cat", "rocket"}
    red = ask("color", "red", size=4)
    assert all(q.prompt.endswith("on a red background") for q in red if q.role == "target")
    assert all("background" not in q.prompt for q in red if q.role == "plain")


def test_the_same_seed_asks_the_same_questions():
    assert ask(seed=3) == ask(seed=3)
    assert ask(seed=3) != ask(seed=4)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="`size` must be at least 1, got 0"):
        ask(size=0)
    with pytest.raises(ValueError, match="'monet' is no style the judge knows"):
        ask("style", "monet")


WIDE = {
    "object": (*(f"thing {i}" for i in range(60)), "python logo", "redis logo", "flag of japan", "person running"),
    "style": ("noto", "openmoji", "blob"),
    "color": ("white", "red", "blue"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "erase"), [("style", "openmoji"), ("object", "thing 3"), ("color", "red")]
)
def test_what_is_preserved_is_not_what_is_judged(kind, erase):
    held_out = {(f"thing {i}", "noto") for i in range(0, 60, 7)}
    kept = questions.preserve_prompts(kind, erase, labels=WIDE, held_out=held_out, size=60)
    asked = questions.build(kind, erase, labels=WIDE, held_out=held_out, size=12)
    assert kept[0] == ""
    assert len(set(kept)) == len(kept) <= 60
    assert not any(
        erase in prompt.replace("thing 3", "thing 3.").split(",")[0]
        for prompt in kept
        if kind != "object"
    )
    # To a causal encoder a prompt that begins with another holds it.
    assert not [q.prompt for q in asked for p in kept if p and q.prompt.startswith(p)]
    if kind != "object":
        scenes = {p.split(",")[0] for p in kept if "," in p}
        assert scenes
        assert not scenes & {q.object for q in asked if "held out" not in q.role}
        assert not scenes & {thing for thing, _ in held_out}


def test_no_question_begins_with_its_concept():
    for kind, erase in (("style", "openmoji"), ("color", "red")):
        asked = questions.build(kind, erase, labels=WIDE, size=12)
        assert not [q.prompt for q in asked if q.prompt.startswith(erase)]


def test_neighbours_of_a_logo_are_logos_first():
    kept = questions.preserve_prompts("object", "python logo", labels=WIDE, size=40)
    assert kept[1] == "redis logo"
    assert sum("," in prompt for prompt in kept) >= 5


def test_neighbours_never_name_the_erased_concept_nor_an_asked_prompt():
    for kind, erase in (("style", "openmoji"), ("object", "apple"), ("color", "red")):
        kept = questions.preserve_prompts(kind, erase, labels=LABELS, size=30)
        asked = {q.prompt for q in ask(kind, erase, size=12)}
        assert kept[0] == ""
        assert not any(erase in prompt for prompt in kept)
        assert not set(kept) & asked
        assert len(set(kept)) == len(kept) <= 30
    assert "noto style" in questions.preserve_prompts("style", "openmoji", labels=LABELS)
