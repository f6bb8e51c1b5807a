from collections import Counter

import pytest

from overpaint.probes import questions

LABELS = {
    "object": ("apple", "cat", "rocket", "python logo", "flag of japan"),
    "style": ("noto", "openmoji", "blob"),
    "color": ("white", "red", "blue"),
}
HELD_OUT = frozenset({("apple", "openmoji"), ("cat", "noto")})


def build(kind="style", erase="openmoji", **options):
    return questions.build(kind, erase, labels=LABELS, held_out=HELD_OUT, **options)


@pytest.mark.parametrize(
    ("text", "label"),
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
def test_parse_concept_returns_kind_and_label(text, label):
    assert questions.parse_concept(text, LABELS) == label


def test_an_unknown_concept_raises_and_lists_the_labels():
    with pytest.raises(
        ValueError, match=r"has no label for 'van gogh'.*style: noto, openmoji, blob"
    ):
        questions.parse_concept("van gogh", LABELS)


def test_an_unknown_concept_lists_few_labels_and_names_the_options_for_other_models(judge):
    with pytest.raises(ValueError, match="has no label for 'openmoij style'") as caught:
        questions.parse_concept("openmoij style", judge.labels)
    text = str(caught.value)
    assert "--set natural --scorer CLIP" in text
    assert sum(name in text for names in judge.labels.values() for name in names) <= 12
    assert len(text) < 500
    with pytest.raises(ValueError, match="Did you mean 'umbrella'"):
        questions.parse_concept("umbrela", judge.labels)


def test_captions():
    assert questions.caption("apple", "noto", "") == "an apple in noto style"
    assert questions.caption("cat", "noto", "orange", frame=1) == (
        "a drawing of a cat in noto style on an orange background"
    )
    assert questions.caption("cat", "noto", "", unseen=True) == "the cat is in noto style"
    assert questions.caption("python logo", "", "red") == "the python logo on a red background"


def test_all_styles_have_the_same_scenes_and_seeds():
    evaluated = build(size=6)
    by_style = {
        style: [
            (q.object, q.color, q.seed) for q in evaluated if q.role == role and q.style == style
        ]
        for style, role in (("openmoji", "target"), ("noto", "other"), ("blob", "other"))
    }
    assert by_style["openmoji"] == by_style["noto"] == by_style["blob"]
    assert len(by_style["noto"]) == 6


def test_roles():
    evaluated = build(size=6)
    assert Counter(q.role for q in evaluated) == {
        "target": 6, "unseen": 3, "other": 12, "plain": 3, "held out": 1, "other held out": 1,
    }  # fmt: skip
    pairs = {(q.object, q.style) for q in evaluated if "held out" not in q.role}
    assert not pairs & HELD_OUT
    assert all(
        q.style == "openmoji" for q in evaluated if q.role in ("target", "unseen", "held out")
    )
    assert all(q.style == "" for q in evaluated if q.role == "plain")
    assert not {q.prompt for q in evaluated if q.role == "target"} & {
        q.prompt for q in evaluated if q.role == "unseen"
    }


def test_questions_about_logos_and_colors():
    logo = build("object", "python logo", size=4)
    assert {q.prompt for q in logo if q.role == "target"} >= {"the python logo"}
    assert {q.object for q in logo if q.role == "other"} == {"apple", "cat", "rocket"}
    red = build("color", "red", size=4)
    assert all(q.prompt.endswith("on a red background") for q in red if q.role == "target")
    assert all("background" not in q.prompt for q in red if q.role == "plain")


def test_questions_depend_on_the_seed():
    assert build(seed=3) == build(seed=3)
    assert build(seed=3) != build(seed=4)


def test_bad_arguments_raise():
    with pytest.raises(ValueError, match="`size` must be at least 1, got 0"):
        build(size=0)
    with pytest.raises(ValueError, match="'monet' is not a label of kind 'style'"):
        build("style", "monet")


WIDE = {
    "object": (*(f"thing {i}" for i in range(60)), "python logo", "redis logo", "flag of japan", "person running"),
    "style": ("noto", "openmoji", "blob"),
    "color": ("white", "red", "blue"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "erase"), [("style", "openmoji"), ("object", "thing 3"), ("color", "red")]
)
def test_preserved_prompts_share_nothing_with_the_questions(kind, erase):
    held_out = {(f"thing {i}", "noto") for i in range(0, 60, 7)}
    preserved = questions.preserve_prompts(kind, erase, labels=WIDE, held_out=held_out, size=60)
    evaluated = questions.build(kind, erase, labels=WIDE, held_out=held_out, size=12)
    assert preserved[0] == ""
    assert len(set(preserved)) == len(preserved) <= 60
    assert not any(
        erase in prompt.replace("thing 3", "thing 3.").split(",")[0]
        for prompt in preserved
        if kind != "object"
    )
    # A causal encoder computes the same features for a common beginning.
    assert not [q.prompt for q in evaluated for p in preserved if p and q.prompt.startswith(p)]
    if kind != "object":
        scenes = {p.split(",")[0] for p in preserved if "," in p}
        assert scenes
        assert not scenes & {q.object for q in evaluated if "held out" not in q.role}
        assert not scenes & {thing for thing, _ in held_out}


def test_no_question_begins_with_its_concept():
    for kind, erase in (("style", "openmoji"), ("color", "red")):
        evaluated = questions.build(kind, erase, labels=WIDE, size=12)
        assert not [q.prompt for q in evaluated if q.prompt.startswith(erase)]


def test_preserve_prompts_of_a_logo_begin_with_logos():
    preserved = questions.preserve_prompts("object", "python logo", labels=WIDE, size=40)
    assert preserved[1] == "redis logo"
    assert sum("," in prompt for prompt in preserved) >= 5


def test_preserve_prompts_contain_neither_the_concept_nor_a_question():
    for kind, erase in (("style", "openmoji"), ("object", "apple"), ("color", "red")):
        preserved = questions.preserve_prompts(kind, erase, labels=LABELS, size=30)
        evaluated = {q.prompt for q in build(kind, erase, size=12)}
        assert preserved[0] == ""
        assert not any(erase in prompt for prompt in preserved)
        assert not set(preserved) & evaluated
        assert len(set(preserved)) == len(preserved) <= 30
    assert "noto style" in questions.preserve_prompts("style", "openmoji", labels=LABELS)
