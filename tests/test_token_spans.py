"""Token spans, compared with the token counts of CLIP's vocabulary."""

import unicodedata
from types import SimpleNamespace

import layouts
import pytest
import torch

from overpaint.errors import UnsupportedModel
from overpaint.model.token_spans import Span, end_of_text, find_span, span_at
from overpaint.zoo import builders

# Token counts of CLIP's BPE; the tiny tokenizer has the same merges for these words.
COUNTS = {
    "van gogh": 2,
    "monet": 1,
    "pablo picasso": 2,
    "greg rutkowski": 3,
    "johannes vermeer": 3,
    "r2d2": 4,
    "snoopy": 1,
    "nemo": 1,
    "grumpy cat": 2,
    "the british monarch": 3,
    "the president of the united states": 6,
    "prince charles": 2,
}


@pytest.fixture(scope="module")
def words():
    return builders.clip_tokenizer()


@pytest.mark.parametrize(("concept", "tokens"), COUNTS.items())
def test_span_length_equals_clips_token_count(words, concept, tokens):
    span = find_span(words, f"a photo of {concept} on a beach", concept)
    assert (span.start, len(span), span.last) == (4, tokens, 3 + tokens)


def test_a_full_stop_is_not_part_of_the_span(words):
    span = find_span(words, "van gogh.", "van gogh")
    assert span == Span(1, 3)
    assert words.convert_ids_to_tokens(words("van gogh.").input_ids)[span.last] == "gogh</w>"
    assert list(span.positions) == [1, 2]


def test_case_and_white_space_are_ignored(words):
    assert find_span(words, "A photo of Van   GOGH", "van gogh") == Span(4, 6)


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("concept_form", ["NFC", "NFD"])
def test_the_unicode_form_is_ignored_as_the_tokenizer_ignores_it(form, concept_form):
    tokenizer = layouts.tokenizer()
    prompt = unicodedata.normalize(form, "a naïve  Salvador DALÍ in a café")
    concept = unicodedata.normalize(concept_form, "salvador dalí")
    span = find_span(tokenizer, prompt, concept)
    ids = tokenizer(prompt).input_ids[span.start : span.end]
    assert ids == tokenizer(concept, add_special_tokens=False).input_ids


def test_a_form_that_the_tokenizer_reads_differently_does_not_match():
    with pytest.raises(ValueError, match="concept 'cat' is not in the prompt"):
        find_span(layouts.tokenizer(), "a ＣＡＴ", "cat")


def test_an_accent_before_the_concept_does_not_shift_the_span(words):
    span = find_span(words, "café cat", "cat")
    assert words.convert_ids_to_tokens(words("café cat").input_ids)[span.start] == "cat</w>"
    assert len(span) == 1


@pytest.mark.parametrize("concept", ["", "  \n"])
def test_an_empty_concept_raises(words, concept):
    with pytest.raises(ValueError, match="the concept is empty: name the words of the prompt"):
        find_span(words, "a cat", concept)


@pytest.mark.parametrize("prompt", ["a dog", "", "cats in a cathedral"])
def test_an_absent_concept_raises(words, prompt):
    with pytest.raises(ValueError, match=r"concept 'cat' is not in the prompt .*: write it there"):
        find_span(words, prompt, "cat")


def test_a_concept_that_occurs_twice_raises(words):
    with pytest.raises(ValueError, match=r"concept 'cat' occurs 2 times .*: reword the prompt"):
        find_span(words, "a cat and a Cat", "cat")


def test_a_concept_past_the_token_limit_raises(words):
    fits = "a " * 74 + "cat"
    assert find_span(words, fits, "cat") == Span(75, 76)
    with pytest.raises(ValueError, match=r"cut off by the limit of 77 tokens: shorten the prompt"):
        find_span(words, "a " + fits, "cat")


def test_characters_without_a_token_raise(words):
    with pytest.raises(ValueError, match="no token of the prompt 'a cat' contains ' '"):
        span_at(words, "a cat", 1, 2)


def test_a_slow_tokenizer_raises():
    with pytest.raises(UnsupportedModel, match="SimpleNamespace does not return the characters"):
        find_span(SimpleNamespace(is_fast=False), "a cat", "cat")


@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])
def test_end_of_text_returns_the_first_position_for_both_paddings(pad):
    tokenizer = builders.clip_tokenizer(pad=pad)
    ids = tokenizer(["a cat"], padding="max_length", return_tensors="pt").input_ids[0]
    assert len(ids) == 77
    assert end_of_text(tokenizer, ids) == 3


def test_ids_without_end_of_text_raise(words):
    with pytest.raises(ValueError, match="no end-of-text token .* in the ids: pass ids"):
        end_of_text(words, torch.tensor([1, 2, 3]))


def test_the_two_tokenizers_of_sdxl_differ_only_in_the_padding(tiny_xl):
    """A position is the same token in both halves of the packed features."""
    prompt = "a house in van gogh style"
    spans = [find_span(tokenizer, prompt, "van gogh") for tokenizer in tiny_xl.tokenizers]
    assert spans == [Span(4, 6)] * 2
    first, second = (tiny_xl.tokenize([prompt], encoder=i)[0] for i in (0, 1))
    ends = [end_of_text(t, ids) for t, ids in zip(tiny_xl.tokenizers, (first, second), strict=True)]
    assert ends == [7, 7]
    assert torch.equal(first[:8], second[:8])
    assert not (first[8:] == second[8:]).any()
