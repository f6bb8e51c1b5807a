"""Characters, instructions and tokens of lettering."""

import pytest
import torch

from overpaint.scene_text import alphabet
from overpaint.scene_text.alphabet import CutTextWarning
from overpaint.scene_text.instructions import Tokenizer, compose, font_name, is_mix, pieces_of_names


def test_the_alphabet_has_95_symbols_and_0_is_space_padding_and_unknown():
    assert len(alphabet.CHARACTERS) == len(set(alphabet.CHARACTERS)) == 95
    numbers, counts = alphabet.encode(["a Zé", "10"], 6)
    assert numbers.tolist() == [[11, 0, 62, 0, 0, 0], [2, 1, 0, 0, 0, 0]] and counts.tolist() == [
        4,
        2,
    ]


def test_a_text_that_is_too_long_is_cut_with_a_warning():
    with pytest.warns(CutTextWarning, match="has 21 characters, and the encoder holds 20"):
        numbers, counts = alphabet.encode(["a" * 21], 20)
    assert numbers.shape == (1, 20) and counts.tolist() == [20]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "at least one visible character"),
        ("  ", "at least one visible character"),
        ("Käse", "ASCII punctuation, got 'Käse' with 'ä': replace"),
        ("abcdefghi", "may have 8 characters, got 'abcdefghi' with 9: write it in parts"),
    ],
)
def test_texts_that_cannot_be_written_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        alphabet.check(text, 8)


@pytest.mark.parametrize(
    ("font", "color", "instruction"),
    [
        ("Courgette", "red", 'Write "wizards" in font: Courgette and color: red'),
        (None, "red", 'Write "wizards" in color: red'),
        ("Courgette", None, 'Write "wizards" in font: Courgette'),
        (None, None, 'Write "wizards"'),
        ("Allura and Mohave", "red", "in font: Allura and Mohave"),
        ("Podkova[wght]", None, 'Write "wizards" in font: Podkova'),
    ],
)
def test_the_templates_are_those_of_diffste(font, color, instruction):
    assert compose("wizards", font, color) == instruction


@pytest.mark.parametrize("name", ["GochiHand", "Grandstander", "Quicksand", "MrDeHaviland"])
def test_and_inside_of_a_name_is_no_mix(name):
    assert not is_mix(name) and is_mix(f"{name} and Allura")
    assert f'"and" in font: {name}' in compose("and", name)


def test_a_file_suffix_is_removed_as_a_whole():
    names = ("BadScript.ttf", "Sansita-Light.otf", "Lato.woff2", "Soft.woff", "Print")
    assert [font_name(n) for n in names] == ["BadScript", "Sansita-Light", "Lato", "Soft", "Print"]


def test_names_are_split_into_pieces_that_the_tokenizer_uses():
    pieces = sorted(pieces_of_names(["BadScript-BoldItalic", "PTSans", "Exo2", "sky blue"]))
    assert pieces == ["2", "bad", "blue", "bold", "exo", "italic", "pt", "sans", "script", "sky"]
    tokenizer = Tokenizer([*pieces, "write", "red", "color"], 24)
    split = tokenizer.split('Write "red" in color: BadScript-Bold x')
    assert split == [
        *["write", '"', *"red", '"', "i", "n"],
        *["color", ":", "bad", "script", "-", "bold", "x"],
    ]


def test_tokens_are_padded_cut_and_unlisted_characters_are_1():
    tokenizer = Tokenizer(["red"], 4)
    tokens = tokenizer.encode(["red é", "abcdefg", ""])
    assert tokens.shape == (3, 4) and tokens[0, 1:].tolist() == [1, 0, 0]
    assert (
        tokens[0, 0] == tokenizer.numbers["red"] and (tokens[1] > 1).all() and not tokens[2].any()
    )
    assert len(tokenizer) == int(max(tokenizer.numbers.values())) + 1
    assert tokens.dtype == torch.int64
