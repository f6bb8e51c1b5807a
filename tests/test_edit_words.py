"""The words that a change's report says move: as `auto` writes them, and whatever a file may hold."""

import pytest

from overpaint import demo, edit
from overpaint.edit import words


def test_the_words_of_an_automatic_change_are_named_without_their_ends(tiny_sd1):
    change = edit.auto(tiny_sd1, {"grumpy fish": "red bird"}, vocabulary=["a dog"])
    assert change.report["tokens"] == {"grumpy fish": ["grumpy</w>", "fish</w>"]}
    assert words.moved(change.report) == ["grumpy", "fish"]
    assert demo._edit_facts(change).endswith(
        "nothing else that is looked after reads: grumpy, fish"
    )


@pytest.mark.parametrize(
    ("report", "found"),
    [
        ({}, []),
        ({"tokens": 2}, []),
        ({"tokens": ["van"]}, []),
        ({"tokens": {"a": "cat</w>", "b": [3, None, "johan", "dog</w>"]}}, ["johan", "dog"]),
    ],
)
def test_what_a_file_says_instead_is_passed_over(report, found):
    assert words.moved(report) == found
