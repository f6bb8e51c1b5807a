"""Evaluation sets: every file format of the field, compared case by case."""

import pytest

from overpaint import probes
from overpaint.probes import Case

TIMED = """old,new,positive1,gt1,positive2,gt2,negative1,gn1
A tree,A blue tree,A tall tree,A tall blue tree,"Trees, far off","Blue trees, far off",A bush,A blue bush
A cup,A glass cup,A cup of tea,A glass cup of tea,,,A pot,A glass pot
"""
ROAD = """prompt,old,new,positive1,positive_old1,positive_new1,negative1,negative_new1
The mayor,Ann,Bob,The mayor at work,Ann at work,Bob at work,The baker,Bob
"""
UCE = """,case_number,prompt,evaluation_seed,artist
0,0,Boats by Ada Ray,12,Ada Ray
1,1,"Rain, by Kim Lo",7.0,Kim Lo
"""


@pytest.fixture
def file(tmp_path):
    def write(name, text, encoding="utf-8"):
        (tmp_path / name).write_bytes(text.encode(encoding))
        return tmp_path / name

    return write


def test_form_ablation_has_one_prompt_a_line(file):
    path = file("x_eval.txt", "a snoopy in the rain\r\n\r\n  A dog\nSnoopys\n")
    loaded = probes.load_set(path, erase="Snoopy", replace="dog")
    old, new = "A photo depicts Snoopy", "A photo depicts dog"
    assert loaded.cases == (
        Case("a snoopy in the rain", "target", old, new, "Snoopy"),
        Case("A dog", "other", "A dog"),
        Case("Snoopys", "other", "Snoopys"),
    )
    assert (loaded.form, loaded.erase, loaded.replace) == ("ablation", "Snoopy", "dog")
    style = probes.load_set(file("y.txt", "a lake by monet"), erase="monet", kind="style").cases[0]
    assert (style.old, style.new) == ("A photo depicts monet style", "")


def test_form_csv_has_seeds_and_artists(file):
    loaded = probes.load_set(file("uce.csv", UCE), erase="ada ray", replace="an oak")
    assert loaded.cases == (
        Case("Boats by Ada Ray", "target", "Boats by Ada Ray", "Boats by an oak", "Ada Ray", 12),
        Case("Rain, by Kim Lo", "other", "Rain, by Kim Lo", "Rain, by an oak", "Kim Lo", 7),
    )
    bare = probes.load_set(
        file("b.csv", "prompt\nan  old cat\na dog\n"), erase="old cat", replace="owl"
    )
    assert [(c.role, c.new, c.seed) for c in bare.cases] == [
        ("target", "an owl", None),
        ("other", "", None),
    ]


def test_form_timed_has_one_edit_a_row(file):
    path = file("timed.csv", TIMED, encoding="utf-8-sig")
    loaded = probes.load_set(path, erase="a TREE")
    assert (loaded.form, loaded.erase, loaded.replace) == ("timed", "A tree", "A blue tree")
    assert loaded.name == "timed.csv: A tree"
    assert loaded.cases == (
        Case("A tree", "target", "A tree", "A blue tree", "A tree"),
        Case("A tall tree", "general", "A tall tree", "A tall blue tree"),
        Case("Trees, far off", "general", "Trees, far off", "Blue trees, far off"),
        Case("A bush", "other", "A bush", "A blue bush"),
    )
    assert [c.role for c in probes.load_set(path, erase="cup").cases] == [
        "target",
        "general",
        "other",
    ]


def test_form_road_has_one_edit_a_row(file):
    loaded = probes.load_set(file("road.csv", ROAD), erase="Ann")
    assert loaded.form == "road"
    assert loaded.cases == (
        Case("The mayor", "target", "Ann", "Bob", "Ann"),
        Case("The mayor at work", "general", "Ann at work", "Bob at work"),
        Case("The baker", "other", "The baker", "Bob"),
    )


def test_shipped_tables_fill_their_slots_and_omit_the_concept_from_others(file):
    loaded = probes.load_shipped_set("style", "openmoji style", "noto style")
    assert loaded.cases[0] == Case(
        "an apple in openmoji style", "target", "an apple in openmoji style",
        "an apple in noto style", "openmoji style",
    )  # fmt: skip
    roles = [c.role for c in loaded.cases]
    assert [roles.count(role) for role in ("target", "general", "other")] == [16, 16, 40]
    assert not any("openmoji" in c.prompt for c in loaded.cases if c.role == "other")
    assert {c.new == "" for c in loaded.cases if c.concept == "noto style"} == {True}
    for vocabulary in probes.VOCABULARIES:
        for kind in ("style", "object"):
            cases = probes.load_shipped_set(kind, "cat", "owl", vocabulary=vocabulary).cases
            assert len({c.prompt for c in cases}) == len(cases)
            assert not any("{" in c.prompt + c.new or "(n)" in c.prompt + c.new for c in cases)
    table = 'target = ["a(n) {concept} {where}"]\nothers = []\n[slots]\nwhere = ["here", "there"]\n'
    mine = probes.load_set(file("t.toml", table), erase="owl", replace="cat")
    assert [(c.prompt, c.new) for c in mine.cases] == [
        ("an owl here", "a cat here"),
        ("an owl there", "a cat there"),
    ]


def test_others_related_to_the_concept_are_omitted(file):
    table = 'target = ["{concept}"]\nother = ["by {concept}"]\nothers = ["van gogh", "gogh", "vincent"]\n'
    path = file("t.toml", table)
    prompts = [
        [c.prompt for c in probes.load_set(path, erase=name).cases if c.role == "other"]
        for name in ("vincent van gogh", "van gogh", "ada ray")
    ]
    assert prompts == [[], ["by vincent"], ["by van gogh", "by gogh", "by vincent"]]


def test_a_prompt_without_its_concept_has_no_new_text(file):
    rows = "prompt,artist\nBoats by Ada,Ada Ray\nRain by Kim,Kim Lo\n"
    loaded = probes.load_set(file("a.csv", rows), erase="ada ray", replace="an oak")
    assert [(c.role, c.new) for c in loaded.cases] == [("target", ""), ("other", "")]


def test_thinned_keeps_evenly_spaced_cases_of_each_role():
    loaded = probes.load_shipped_set("style", "openmoji style").thinned(2)
    assert [c.role for c in loaded.cases] == ["target"] * 2 + ["general"] * 2 + ["other"] * 2
    assert [c.concept for c in loaded.cases[4:]] == ["noto style", "fluent style"]
    whole = probes.load_shipped_set("style", "openmoji style")
    assert whole.thinned(999) == whole
    with pytest.raises(ValueError, match="`size` must be at least 1, got 0"):
        whole.thinned(0)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "name\nx\n", "unknown form of 'a.csv': give a .txt"),
        ("a.json", "{}", "unknown form of 'a.json'"),
        ("a.txt", "\n", "holds no prompts"),
        (
            "a.csv",
            "prompt,evaluation_seed\na cat,x\n",
            r"line 2: `evaluation_seed` must be an integer from 0 to 2\*\*63 - 1, got 'x'",
        ),
        ("a.csv", "prompt\na cat, or two\n", "line 2: 2 fields under 1 columns; put a text"),
        ("a.csv", 'prompt\n"a cat\n', "close every quote"),
        ("a.csv", "case_number,prompt\n1,\n", "line 2: the prompt is empty"),
        ("a.csv", TIMED, "holds 0 edits of 'cat', not one: .* holds 'A tree', 'A cup'"),
        ("a.toml", "target = 3", "is not a table of cases"),
        (
            "a.toml",
            'target = ["{x}"]\nothers = []',
            "is not a table of cases .the slot .x. of '.x.' has no words",
        ),
        (
            "a.toml",
            'target = ["a {}"]\nothers = []',
            "is not a table of cases .the slot .. of 'a ..' has no words",
        ),
    ],
)
def test_files_without_a_known_form_raise(file, name, text, message):
    with pytest.raises(ValueError, match=message):
        probes.load_set(file(name, text), erase="cat")


def test_other_bad_arguments_raise(file, tmp_path):
    with pytest.raises(FileNotFoundError, match="no evaluation set at .*nowhere.csv"):
        probes.load_set(tmp_path / "nowhere.csv", erase="cat")
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        probes.load_set(file("a.txt", "é", encoding="latin-1"), erase="cat")
    with pytest.raises(ValueError, match="unknown form of evaluation set 'coco': choose one of"):
        probes.load_set(file("b.txt", "a cat"), erase="cat", form="coco")
    with pytest.raises(ValueError, match="no evaluation set ships for 'icons' 'fact'"):
        probes.load_shipped_set("fact", "japan")
