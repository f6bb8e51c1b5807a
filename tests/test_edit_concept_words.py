"""Words of concepts as CLIP reads them: aliases, special tokens, unknown words."""

import unicodedata

import pytest

import overpaint
from overpaint import edit, probes
from overpaint.edit import concept_words, vocabulary
from overpaint.edit.concept_words import check_special, find_aliases, unknown_words
from overpaint.edit.methods.token_rows import edited_words

ALIASES = [  # an erased concept and a known one that is erased with it
    ("van gogh style", "van gogh"),
    ("the van gogh style", "van gogh"),
    ("in the style of monet", "monet"),
    ("monet's style", "monet"),
    ("Monet paintings", "monet"),
    ("a painting by rembrandt", "rembrandt"),
    ("art by andy warhol", "andy warhol"),
    ("drawings of snoopy", "snoopy"),
    ("a cat", "cat"),
    ("the red", "red"),
]
OTHERS = [  # an erased concept and a known one that it contains, which stays
    ("apple logo", "apple"),
    ("flag of france", "france"),
    ("mickey mouse", "mouse"),
    ("ice cream", "cream"),
    ("apple style", "apple"),
    ("a cat drawing", "cat"),
    ("red painting", "red"),
    ("grumpy cat", "cat"),
    ("van gogh museum", "van gogh"),
    ("vincent van gogh", "van gogh"),
]


@pytest.mark.parametrize(("old", "known"), ALIASES)
def test_a_known_concept_that_means_the_same_is_an_alias(old, known):
    assert find_aliases({old: "noto style"}, [known]) == ({known: old}, {})


@pytest.mark.parametrize(("old", "known"), OTHERS)
def test_a_known_concept_that_means_something_else_stays(old, known):
    assert find_aliases({old: "noto style"}, [known]) == ({}, {known: old})


def test_parts_of_words_replacements_and_preserved_concepts_are_no_aliases():
    assert find_aliases({"monetary style": "x"}, ["monet"]) == ({}, {})
    assert find_aliases({"monet style": "monet"}, ["monet"]) == ({}, {})
    preserved = find_aliases({"monet style": "x"}, ["monet"], preserve=["a monet on a wall"])
    assert preserved == ({}, {"monet": "monet style"})


def test_aliases_can_be_listed_or_left_out():
    pairs = {"apple logo": "x", "van gogh style": "y"}
    known = ["apple", "van gogh"]
    listed = find_aliases(pairs, known, aliases=["apple"])
    assert listed == ({"apple": "apple logo"}, {"van gogh": "van gogh style"})
    assert find_aliases(pairs, known, aliases=())[0] == {}
    named = find_aliases(pairs, known, aliases={"the starry night": "van gogh style"})
    assert named[0] == {"the starry night": "van gogh style"}
    with pytest.raises(ValueError, match="the alias 'cat' belongs to 0 of the erased concepts"):
        find_aliases(pairs, known, aliases={"cat": "dog"})
    with pytest.raises(TypeError, match="`aliases` is 'auto' or a list of concepts: write"):
        find_aliases(pairs, known, aliases="apple")


@pytest.mark.parametrize(
    ("new", "target"),
    [
        ("noto style", "noto"),
        ("Salvador Dalí's style", "Salvador Dalí"),
        ("painting", "painting"),
        ("a dog", "dog"),
        ("", ""),
        ("r2-d2", "r2-d2"),
    ],
)
def test_an_alias_gets_the_replacement_without_words_for_styles(new, target):
    assert concept_words.alias_target(new) == target


AUTO = {
    "contexts": 8,
    "background": 8,
    "preserve_weight": 5.0,
    "repair": False,
    "collateral": False,
}


@pytest.mark.parametrize("layout", ["sd1", "sd2", "sdxl"])
def test_the_automatic_edit_erases_aliases_too(real_vocabulary, layout, monkeypatch):
    monkeypatch.setattr(probes, "frequent_words", lambda: frozenset({"van", "apple"}))
    model = overpaint.load(real_vocabulary(layout))
    known = ["van gogh", "monet", "apple", "snoopy"]
    pairs = {"van gogh style": "noto style", "apple logo": "pear logo"}
    change = edit.auto(model, pairs, vocabulary=known, tokens=True, **AUTO)
    assert change.report["aliases"] == {"van gogh": "van gogh style"}
    assert change.report["contained_kept"] == {"apple": "apple logo"}
    assert change.pairs == {**pairs, "van gogh": "noto"}
    assert "'apple' is part of 'apple logo' and stays" in change.report["notes"][0]
    assert "gogh</w>" in change.report["tokens"]["van gogh"]
    assert "apple</w>" not in change.report["tokens"].get("apple logo", [])
    ids = model.tokenizer("gogh", add_special_tokens=False).input_ids
    before = model.text_encoder.get_input_embeddings().weight[ids].clone()
    with change.applied(model):
        assert not model.text_encoder.get_input_embeddings().weight[ids].equal(before)
    without = edit.stack(model, [change], without=["van gogh style"])
    assert set(without.pairs) == {"apple logo"} and without.protocol["aliases"] == {}


def test_without_aliases_the_contained_concept_is_preserved(real_vocabulary):
    model = overpaint.load(real_vocabulary("sd1"))
    pairs = {"van gogh style": "noto style"}
    kept = edit.auto(model, pairs, vocabulary=["van gogh", "monet"], aliases=(), **AUTO)
    assert kept.pairs == pairs and kept.report["aliases"] == {}
    assert kept.report["contained_kept"] == {"van gogh": "van gogh style"}
    assert "tokens" not in kept.report or "gogh</w>" not in str(kept.report["tokens"])


def test_without_removes_the_aliases_of_a_concept(real_vocabulary):
    model = overpaint.load(real_vocabulary("sd1"))
    pairs = {"van gogh style": "noto style", "snoopy": "dog"}
    change = edit.auto(model, pairs, vocabulary=["van gogh"], tokens=False, **AUTO)
    assert set(change.pairs) == {*pairs, "van gogh"}
    rest = change.without("van gogh style")
    assert set(rest.pairs) == {"snoopy"} and rest.protocol["aliases"] == {}


@pytest.mark.parametrize("text", ["<|endoftext|>", "a <|startoftext|> cat", "<|EndOfText|>"])
@pytest.mark.parametrize("layout", ["sd1", "sd2", "sdxl"])
def test_special_tokens_are_refused_by_every_method(real_vocabulary, layout, text):
    model = overpaint.load(real_vocabulary(layout))
    with pytest.raises(ValueError, match="holds the special token .*: name the concept in words"):
        check_special(model.tokenizer, ["a cat", text])
    methods = [edit.quickfix, edit.auto, edit.swap_embedding, edit.uce, edit.time, edit.loco]
    for method in [*methods, edit.finetune]:
        for pairs in ({text: "dog"}, {"dog": text}):
            with pytest.raises(ValueError, match="holds the special token"):
                method(model, pairs)


def test_words_without_larger_pieces_are_unknown(real_vocabulary):
    tokenizer = overpaint.load(real_vocabulary("sd1")).tokenizer
    assert unknown_words(tokenizer, ["xqzvbl style", "梵高", "пикассо"]) == [
        "xqzvbl",
        "梵高",
        "пикассо",
    ]
    common = ["van gogh style", "greg rutkowski", "salvador dalí", "pikachu", "r2d2", "3d", "tv"]
    assert unknown_words(tokenizer, [*common, *vocabulary.concepts("natural")]) == []


def test_unknown_words_are_noted_in_the_report(real_vocabulary):
    model = overpaint.load(real_vocabulary("sd1"))
    pairs = {"xqzvbl style": "monet"}
    for method in (edit.quickfix, edit.swap_embedding, edit.uce, edit.time, edit.loco):
        (note,) = method(model, pairs).report["notes"]
        assert note.startswith("the tokenizer splits 'xqzvbl' almost into single letters")
    assert "xqzvbl" in edit.auto(model, pairs, vocabulary=["monet"], **AUTO).report["notes"][0]
    assert "notes" not in edit.quickfix(model, {"van gogh": "monet"}).report


def test_concepts_in_another_unicode_form_or_case_are_the_same(real_vocabulary):
    model = overpaint.load(real_vocabulary("sd1"))
    composed, split = unicodedata.normalize("NFC", "café"), unicodedata.normalize("NFD", "café")
    assert concept_words.words(f"A {split}") == concept_words.words(f"a  {composed.upper()}")
    with pytest.raises(ValueError, match="equals its target"):
        edit.quickfix(model, {composed: split})
    with pytest.raises(ValueError, match="which is edited: take it off"):
        edit.auto(model, {composed: "bar"}, preserve=[f"a {split}"], **AUTO)
    a, b = (edit.quickfix(model, {text: "bar"}).delta for text in (composed, split))
    assert a.equal(b)


@pytest.mark.parametrize("new", ["", "monet", "watercolor"])
def test_words_for_styles_keep_their_rows(real_vocabulary, new, monkeypatch):
    """Erasing "van gogh style" must not change every prompt with the word "style"."""
    monkeypatch.setattr(probes, "frequent_words", lambda: frozenset({"style"}))
    monkeypatch.setattr(probes, "names", dict)
    model = overpaint.load(real_vocabulary("sd1"))
    known = ["van gogh", "monet", "snoopy"]
    change = edit.auto(model, {"van gogh style": new}, vocabulary=known, tokens=True, **AUTO)
    rows = change.movements[-1]
    assert rows.site == "text.token_embedding"
    van, gogh, style = model.tokenizer("van gogh style", add_special_tokens=False).input_ids
    assert (rows.left.abs().amax(1) > 0).nonzero().flatten().tolist() == sorted([van, gogh])
    assert edited_words(change.report) == ["van", "gogh"]
