"""Captions of everyday English."""

import re
from pathlib import Path

import pytest

from overpaint import probes
from overpaint.train import captions, icon_world, language

PARTS = ("validation", "test")
PACKAGES = Path(__file__).parent.parent / "runs" / "packages"


def test_both_lists_have_5000_captions_and_share_none() -> None:
    lists = [probes.everyday(part) for part in PARTS]
    assert [len(set(captions)) for captions in lists] == [5000, 5000]
    assert not set(lists[0]) & set(lists[1])
    assert all(line.strip() == line != "" for captions in lists for line in captions)


def test_no_caption_names_something_of_the_icon_world() -> None:
    names = {*icon_world.subjects(), *captions.more_objects()}
    names |= {s for others in captions.synonyms().values() for s in others}
    names |= {icon_world.plural(name) for name in names}
    words = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, sorted(names)))})(?!\w)")
    for part in PARTS:
        assert [line for line in probes.everyday(part) if words.search(line)] == []


def test_no_caption_is_coarse() -> None:
    for part in PARTS:
        assert [line for line in probes.everyday(part) if language._COARSE.search(line)] == []


def test_another_part_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`part` must be 'validation' or 'test', got 'train'\. "):
        probes.everyday("train")  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_lists_are_what_the_recipe_writes() -> None:
    if not (PACKAGES / language.WORDNET[0]).exists():
        pytest.skip("runs/packages has no WordNet: `overpaint train icons` downloads it")
    lists = language.everyday_captions(PACKAGES, 5000)
    assert [tuple(lines) for lines in lists] == [probes.everyday(part) for part in PARTS]
