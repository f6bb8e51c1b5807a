import re
import tomllib
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest
from transformers import CLIPTokenizerFast

import overpaint
from overpaint import probes
from overpaint.model.token_spans import find_span
from overpaint.probes import Probe
from overpaint.probes import probe as module
from overpaint.zoo import builders

SIZES = {
    "style": (36, 80), "object": (32, 168), "color": (24, 160), "action": (32, 160),
    "viewpoint": (0, 80), "fact": (32, 24), "count": (24, 80), "trademark": (32, 32),
}  # fmt: skip
TABLES = [
    (kind, vocabulary)
    for kind, sizes in SIZES.items()
    for vocabulary, size in zip(probes.VOCABULARIES, sizes, strict=True)
    if size
]


def test_sizes_of_the_tables():
    assert tuple(SIZES) == probes.KINDS
    for kind, vocabulary in TABLES:
        size = len(probes.load(kind, vocabulary=vocabulary))
        assert size == SIZES[kind][probes.VOCABULARIES.index(vocabulary)]


@pytest.mark.parametrize(("kind", "vocabulary"), TABLES)
def test_every_probe_contains_its_concept_once_within_the_token_limit(kind, vocabulary):
    tokenizer = builders.clip_tokenizer()
    table = probes.load(kind, vocabulary=vocabulary)
    assert len({probe.id for probe in table}) == len(table)
    assert len({probe.prompt for probe in table}) == len(table)
    for probe in table:
        span = find_span(tokenizer, probe.prompt, probe.concept)
        assert 1 <= span.start < span.end < 76
        assert probe.kind == kind
        assert probe.licence == "CC0-1.0"
        assert probe.source
        assert probe.seed is None
        assert not re.search(r"[{}()]|\ba [aeiou]|\ban [^aeiou]", probe.prompt)


def test_icon_concepts_have_one_to_five_tokens():
    folder = Path(overpaint.__file__).parent / "zoo" / "weights" / "icons" / "tokenizer"
    tokenizer = CLIPTokenizerFast.from_pretrained(folder)
    lengths = {
        kind: {len(find_span(tokenizer, p.prompt, p.concept)) for p in probes.load(kind)}
        for kind, vocabulary in TABLES
        if vocabulary == "icons"
    }
    assert lengths["object"] >= {1, 2, 3}
    assert lengths["fact"] >= {1, 2}
    assert lengths["trademark"] >= {1, 2, 3}
    assert lengths["style"] == {3, 4, 5}


def test_the_first_eight_probes_have_at_least_three_labels():
    for kind, vocabulary in TABLES:
        assert len({p.label for p in probes.load(kind, vocabulary=vocabulary)[:8]}) >= 3


def test_all_styles_have_the_same_objects():
    table = probes.load("style")
    counts = Counter(probe.label for probe in table)
    assert set(counts) == {"noto", "twemoji", "openmoji", "fluent", "blob", "high contrast"}
    assert set(counts.values()) == {6}
    rests = {label: set() for label in counts}
    for probe in table:
        rests[probe.label].add(probe.prompt.replace(probe.concept, "").replace("an ", "a "))
    assert len({frozenset(rest) for rest in rests.values()}) == 1


def test_icon_probes_contain_no_held_out_pair():
    from overpaint.train import icon_world as world

    singular = {world._PLURALS.get(name, f"{name}s"): name for name in world.OBJECTS}
    for kind in ("style", "object", "color", "count"):
        for probe in probes.load(kind):
            form = r"(?:an? )?(?:(two|three|four) )?(.+) in (.+) style(?: on an? (.+) background)?"
            match = re.fullmatch(form, probe.prompt)
            assert match is not None
            number, thing, style, color = match.groups()
            thing = singular[thing] if number else thing
            assert thing in world.OBJECTS
            assert style in world.STYLES
            assert (thing, style) not in world.held_out()
            assert color is None or color in world.COLORS
            assert (thing, color) not in world.held_out_colors()
    for probe in probes.load("action"):
        match = re.fullmatch(r"a person (.+) in (.+) style", probe.prompt)
        assert match is not None
        assert match[1] in world.ACTIONS
        assert match[2] in world.STYLES
    assert {probe.concept for probe in probes.load("fact")} == set(world.FLAGS)
    assert {probe.concept for probe in probes.load("trademark")} == set(world.LOGOS)
    labels = {
        p.label for kind in ("object", "action", "fact", "trademark") for p in probes.load(kind)
    }
    assert labels <= set(world.subjects())


def test_the_first_style_probe():
    first = probes.load("style")[0]
    assert first.id == "icons-style-000"
    assert first.prompt == "an apple in noto style"
    assert (first.concept, first.label) == ("noto style", "noto")


def test_the_label_is_the_concept_by_default():
    assert Probe("x", "object", "a Red apple", "red").label == "red"


def test_a_concept_that_is_not_in_the_prompt_raises():
    with pytest.raises(ValueError, match=r"concept 'dog' is not in the prompt 'a cat': write"):
        Probe("x", "object", "a cat", "dog")
    with pytest.raises(ValueError, match="concept ' ' is not in the prompt"):
        Probe("x", "object", "a cat", " ")


def test_an_unknown_kind_or_vocabulary_raises():
    with pytest.raises(ValueError, match="unknown kind of probe 'mood': choose one of style, "):
        probes.load("mood")
    with pytest.raises(ValueError, match="unknown vocabulary 'x': choose one of icons, natural"):
        probes.load("style", vocabulary="x")
    with pytest.raises(
        ValueError, match="no 'icons' probes of kind 'viewpoint': choose vocabulary natural"
    ):
        probes.load("viewpoint")


def test_every_table_states_source_and_licence():
    for kind in probes.KINDS:
        table = tomllib.loads((module._TABLES / f"{kind}.toml").read_text())
        assert [(kind, name) for name in table] == [t for t in TABLES if t[0] == kind]
        assert all(section["source"] and section["licence"] for section in table.values())


CSV = """\ufeffcase_number,Prompt,evaluation_seed,artist
3,"a house by Van Gogh, at night",1234,x
7,a field by van gogh,99.0,x

9,"van gogh's
room",,x
"""


def write(folder, text, name="user.csv"):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_csv_of_the_erasure_benchmarks(tmp_path):
    first, second, third = probes.load_file(write(tmp_path, CSV), kind="style", concept="van gogh")
    assert first == Probe(
        "user-style-3", "style", "a house by Van Gogh, at night", "van gogh", source="user.csv", seed=1234
    )  # fmt: skip
    assert (second.seed, third.seed) == (99, None)
    assert third.prompt == "van gogh's\nroom"
    assert third.id == "user-style-9"


@pytest.mark.parametrize("column", ["concept", "subject"])
def test_columns_for_concept_and_label(column, tmp_path):
    text = f"prompt,{column},label\na cat on a mat,cat,kitten\na dog,dog,\na mouse,,\n"
    loaded = probes.load_file(write(tmp_path, text), kind="object", concept="mouse")
    assert [(p.concept, p.label) for p in loaded] == [
        ("cat", "kitten"), ("dog", "dog"), ("mouse", "mouse"),
    ]  # fmt: skip
    assert [p.id for p in loaded] == ["user-object-0", "user-object-1", "user-object-2"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: no column 'prompt' among none; begin the file with case_number"),
        ("case,text\n1,a cat\n", "line 1: no column 'prompt' among case, text"),
        ("prompt,seed\na cat,1\na cat, big,2\n", "line 3: 3 fields under 2 columns; put a text"),
        ('prompt\na cat\n"a cat', "line 3: unexpected end of data; close every quote"),
        ("prompt\na cat\na dog\n", "line 3: concept 'cat' occurs 0 times as whole words in 'a dog'"),
        ("prompt\na cat, a cat\n", "line 2: 2 fields under 1 columns"),
        ("prompt\na cat and a Cat\n", "line 2: concept 'cat' occurs 2 times as whole words"),
        ("prompt\ncats\n", "line 2: concept 'cat' occurs 0 times"),
        ("prompt,case_number\n,1\n", "line 2: the prompt is empty: write one"),
        ("prompt,case_number\na cat,1\nmy cat,1\n", "line 3: `case_number` '1' occurs twice: number"),
        ("prompt,evaluation_seed\na cat,-1\n", r"line 2: `evaluation_seed` must be .* 0 to 2\*\*63 - 1, got '-1'"),
        ("prompt,evaluation_seed\na cat,1e3\n", "line 2: `evaluation_seed` must be an integer .*, got '1e3'"),
        ("prompt\n", "holds no prompts: give it at least one"),
    ],
)  # fmt: skip
def test_a_malformed_csv_raises_with_the_line_number(text, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        probes.load_file(write(tmp_path, text), kind="object", concept="cat")


def test_a_csv_without_a_concept_raises(tmp_path):
    path = write(tmp_path, "prompt\na cat\n")
    with pytest.raises(
        ValueError, match="line 2: the words that carry the attribute are not .*pass `concept=`"
    ):
        probes.load_file(path, kind="object")


def test_load_file_reads_a_toml_table(tmp_path):
    text = (Path(module.__file__).parent / "style.toml").read_text()
    loaded = probes.load_file(write(tmp_path, text, "user.toml"), kind="style")
    both = (*probes.load("style"), *probes.load("style", vocabulary="natural"))
    assert loaded == both
    for bad in (
        "[",
        "[a]\nsource = 'x'",
        "a = 1",
        "[a]\nsource='x'\nlicence='y'\nprompts=[{template='{x}'}]",
    ):
        with pytest.raises(
            ValueError, match=r"user.toml' is not a table of probes .*: write `source`"
        ):
            probes.load_file(write(tmp_path, bad, "user.toml"), kind="style")
    with pytest.raises(ValueError, match="`concept` is for CSV files: a table states it"):
        probes.load_file(tmp_path / "user.toml", kind="style", concept="x")


def test_unreadable_files_raise(tmp_path):
    with pytest.raises(FileNotFoundError, match="no probes at .*none.csv': name a"):
        probes.load_file(tmp_path / "none.csv", kind="style")
    with pytest.raises(ValueError, match="cannot read probes from 'user.xlsx': name a .csv"):
        probes.load_file(write(tmp_path, "", "user.xlsx"), kind="style")
    (tmp_path / "old.csv").write_bytes("prompt\ncaf\u00e9\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"old.csv' is not UTF-8 text: save it as UTF-8"):
        probes.load_file(tmp_path / "old.csv", kind="style", concept="caf")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a" + ".a" * 5000 + " = 1\n", "a key has more than 16 parts"),
        ("[" + '"x" . ' * 5000 + "x]\n", "a key has more than 16 parts"),
        ("a = " + "[" * 5000, "nested too deeply"),
        ('[m]\n[[m.prompts]]\ntemplate = "{a:>99999999}"\nconcept = "a"\na = ["b"]\n', "no words, or a format"),
        ('[m]\n[[m.prompts]]\ntemplate = "{a.__class__}"\nconcept = "a"\na = ["b"]\n', "no words, or a format"),
        ("[m]\n[[m.prompts]]\ntemplate = ''\nconcept = ''\n" + "".join(f"s{i} = {['w'] * 9}\n" for i in range(9)),
         "more than 100000 combinations"),
    ],
)  # fmt: skip
def test_a_small_table_takes_little_memory(tmp_path, text, message):
    path = tmp_path / "a.toml"
    path.write_text(text)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=message):
            probes.load_file(path, kind="style")
        assert tracemalloc.get_traced_memory()[1] < 5e6
    finally:
        tracemalloc.stop()


def test_a_seed_that_no_generator_takes_is_refused(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(f"prompt,concept,evaluation_seed\na cat,cat,{10**20}\n")
    with pytest.raises(
        ValueError, match=r"`evaluation_seed` must be an integer from 0 to 2\*\*63 - 1, got '1000"
    ):
        probes.load_file(path, kind="object")
