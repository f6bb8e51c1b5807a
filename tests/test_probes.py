import re
import tomllib
from collections import Counter

import pytest

from overpaint import probes
from overpaint.probes import Probe
from overpaint.probes import prompts as module
from overpaint.spans import find_span
from overpaint.zoo import build


@pytest.mark.parametrize("vocabulary", probes.VOCABULARIES)
@pytest.mark.parametrize("kind", probes.KINDS)
def test_every_probe_holds_its_concept_once_and_within_the_limit(kind, vocabulary):
    tokenizer = build.clip_tokenizer()
    table = probes.load(kind, vocabulary=vocabulary)
    assert len({probe.id for probe in table}) == len(table) >= 3
    assert len({probe.prompt for probe in table}) == len(table)
    for probe in table:
        span = find_span(tokenizer, probe.prompt, probe.concept)
        assert 1 <= span.start < span.end < 76
        assert probe.kind == kind
        assert probe.licence == "CC0-1.0"
        assert not re.search(r"[{}()]|\ba [aeiou]|\ban [^aeiou]", probe.prompt)


def test_styles_are_each_asked_with_the_same_objects():
    table = probes.load("style")
    counts = Counter(probe.label for probe in table)
    assert set(counts) == {"noto", "twemoji", "openmoji", "fluent", "blob", "high contrast"}
    assert set(counts.values()) == {6}
    rests = {label: set() for label in counts}
    for probe in table:
        rests[probe.label].add(probe.prompt.replace(probe.concept, "").replace("an ", "a "))
    assert len({frozenset(rest) for rest in rests.values()}) == 1


def test_no_style_probe_is_a_pair_kept_out_of_training():
    from overpaint.train.icon_world import COLORS, LOGOS, OBJECTS, STYLES, held_out

    for probe in probes.load("style"):
        thing = re.fullmatch(r"an? (.+) in (.+) style", probe.prompt)
        assert thing is not None
        assert thing[1] in OBJECTS
        assert thing[2] in STYLES
        assert (thing[1], thing[2]) not in held_out()
    assert {probe.label for probe in probes.load("color")} <= set(COLORS)
    assert {probe.concept for probe in probes.load("trademark")} == set(LOGOS)


def test_first_style_probe_word_for_word():
    first = probes.load("style")[0]
    assert first.id == "icons-style-000"
    assert first.prompt == "an apple in noto style"
    assert (first.concept, first.label) == ("noto style", "noto")


def test_label_defaults_to_the_concept():
    assert Probe("x", "object", "a Red apple", "red").label == "red"


def test_a_concept_that_is_not_in_the_prompt_is_refused():
    with pytest.raises(ValueError, match=r"concept 'dog' is not in the prompt 'a cat': write"):
        Probe("x", "object", "a cat", "dog")
    with pytest.raises(ValueError, match="concept ' ' is not in the prompt"):
        Probe("x", "object", "a cat", " ")


def test_unknown_kind_and_vocabulary_are_refused():
    with pytest.raises(ValueError, match="unknown kind of probe 'mood': choose one of style, "):
        probes.load("mood")
    with pytest.raises(ValueError, match="unknown vocabulary 'x': choose one of icons, natural"):
        probes.load("style", vocabulary="x")


def test_every_table_states_its_sources():
    for kind in probes.KINDS:
        table = tomllib.loads((module._TABLES / f"{kind}.toml").read_text())
        assert set(table) == set(probes.VOCABULARIES)
        assert all(section["source"] and section["licence"] for section in table.values())
