"""Token rows: which rows move, that no other prompt moves, files, stacks and bad input."""

import copy

import accelerate
import pytest
import torch

from overpaint import demo, edit, probes
from overpaint.edit import Change, stack, token_rules
from overpaint.edit.methods import token_rows
from overpaint.edit.weights import find_weight
from overpaint.errors import UnknownSite

SMALL = {
    "tokens": True,
    "collateral": False,
    "contexts": 24,
    "background": 32,
    "vocabulary": ["monet", "snoopy", "van dyck"],
}
DOG = {"dog": "cat"}
SITE = "text.token_embedding"


@pytest.fixture(autouse=True, scope="module")
def rare_words():
    """Take the words of the tiny vocabulary off the lists of English, so that their rows may move."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probes, "frequent_words", lambda: frozenset({"and", "style"}))
        patch.setattr(probes, "names", dict)
        yield


@pytest.fixture(scope="module")
def change(tiny_shallow):
    return edit.auto(tiny_shallow, DOG, **SMALL)


def token_id(model, word):
    (token,) = model.tokenizer(word, add_special_tokens=False).input_ids
    return token


def test_an_exclusive_word_gets_the_row_of_its_replacement(tiny_shallow, change):
    assert change.sites == (SITE,)
    assert change.report["tokens"] == {"dog": ["dog</w>"]}
    before = find_weight(tiny_shallow, SITE).parameter.detach().clone()
    dog, cat = token_id(tiny_shallow, "dog"), token_id(tiny_shallow, "cat")
    with change.applied(tiny_shallow):
        after = find_weight(tiny_shallow, SITE).parameter.detach()
        assert torch.equal(after[dog], before[cat])
        rest = torch.arange(len(before)) != dog
        assert torch.equal(after[rest], before[rest])
    assert torch.equal(find_weight(tiny_shallow, SITE).parameter, before)


def test_the_prompt_reads_as_the_other_one_and_no_third_one_moves(tiny_shallow, change):
    others = ["", "a red bird", "van gogh, snoopy"]
    target, still = tiny_shallow.encode(["a cat on the beach"]), tiny_shallow.encode(others)
    with change.applied(tiny_shallow):
        assert torch.allclose(tiny_shallow.encode(["a dog on the beach"]), target, atol=1e-9)
        assert torch.equal(tiny_shallow.encode(others), still)


@pytest.mark.parametrize(
    ("pairs", "options", "why"),
    [
        ({"van bird": "fish"}, {"vocabulary": ["van dyck", "red bird"]}, "known concepts do"),
        ({"van bird": "fish"}, {"vocabulary": ["van dyck"], "preserve": ["a bird"]}, "so do both"),
        ({"dog": "red dog"}, {}, "the replacement holds it"),
        ({"and": "cat"}, {}, "a small word of the captions"),
        (DOG, {"tokens": False}, "said so"),
    ],
)
def test_concepts_with_shared_tokens_are_edited_in_the_layer(tiny_shallow, pairs, options, why):
    edited = edit.auto(tiny_shallow, pairs, **{**SMALL, "repair": False, **options})
    assert edited.sites == ("text.0.self_attn.out_proj",), why
    assert "tokens" not in edited.report


@pytest.mark.parametrize(
    ("pairs", "options", "moved"),
    [
        ({"van gogh": "painting"}, {}, {"van gogh": ["gogh</w>"]}),
        ({"red bird": "fish"}, {"vocabulary": ["red cat"]}, {"red bird": ["bird</w>"]}),
        ({"red bird": "fish"}, {"preserve": ["a red cat"]}, {"red bird": ["bird</w>"]}),
        (
            {"red dog": "cat", "red bird": "fish"},
            {},
            {"red dog": ["dog</w>"], "red bird": ["bird</w>"]},
        ),
        ({"red dog": "cat", "bird": "fish"}, {}, {"red dog": ["red</w>", "dog</w>"], "bird": ["bird</w>"]}),
    ],
)  # fmt: skip
def test_exclusive_tokens_move_and_the_layer_is_edited_for_the_others(
    tiny_shallow, pairs, options, moved
):
    edited = edit.auto(tiny_shallow, pairs, **{**SMALL, "repair": False, **options})
    assert edited.report["tokens"] == moved
    shared = [old for old in pairs if len(moved[old]) < len(old.split())]
    assert edited.report["in_layer"] == shared
    assert edited.sites == (*["text.0.self_attn.out_proj"][: len(shared)], SITE)


def test_the_layer_is_fitted_with_the_replaced_rows_as_its_input(tiny_shallow):
    edited = edit.auto(tiny_shallow, {"van gogh": "painting"}, **{**SMALL, "repair": False})
    exclusive = token_rows.exclusive_rows(
        tiny_shallow, {"van gogh": "painting"}, SMALL["vocabulary"]
    )
    rows = token_rows.movement(tiny_shallow, exclusive["van gogh"].rows)
    before = find_weight(tiny_shallow, SITE).parameter.detach().clone()
    with Change((rows,), {"pairs": {}}, {}).applied(tiny_shallow):
        alone = edit.auto(
            tiny_shallow, {"van gogh": "painting"}, **{**SMALL, "tokens": False, "repair": False}
        )
    assert torch.equal(edited.movements[0].keys, alone.movements[0].keys)
    assert torch.equal(edited.movements[0].delta, alone.movements[0].delta)
    unmoved = edit.auto(
        tiny_shallow, {"van gogh": "painting"}, **{**SMALL, "tokens": False, "repair": False}
    )
    assert not torch.equal(edited.movements[0].keys, unmoved.movements[0].keys)
    assert torch.equal(find_weight(tiny_shallow, SITE).parameter, before)


def test_a_model_that_shares_the_weights_is_not_affected_during_the_edit(tiny_shallow):
    from overpaint.studio.model_copy import copy_model

    twin, texts, seen = copy_model(tiny_shallow), ["a van gogh", "a gogh"], []
    before, weight = tiny_shallow.encode(texts), find_weight(twin, SITE).parameter
    edit.auto(
        twin, {"van gogh": "painting"}, **{**SMALL, "repair": False},
        on_progress=lambda done, total, what: seen.append(
            (tiny_shallow.encode(texts), twin.encode(texts))
        ),
    )  # fmt: skip
    assert all(torch.equal(theirs, before) for theirs, _ in seen)
    assert not any(torch.equal(mine, before) for _, mine in seen[:-1])
    assert find_weight(twin, SITE).parameter is weight

    def stop(done, total, what):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        edit.auto(twin, {"van gogh": "painting"}, **SMALL, on_progress=stop)
    assert find_weight(twin, SITE).parameter is weight


def test_rows_are_replaced_in_an_offloaded_model_too(tiny_shallow):
    mine, options = copy.deepcopy(tiny_shallow), {**SMALL, "repair": False}
    accelerate.cpu_offload(mine.text_encoder, execution_device=torch.device("cpu"))
    offloaded, plain = (
        edit.auto(m, {"van gogh": "painting"}, **options) for m in (mine, tiny_shallow)
    )
    assert offloaded.digest == plain.digest
    assert mine.text_encoder.get_input_embeddings().weight.device.type == "meta"


def test_a_concept_whose_replacement_is_edited_has_no_exclusive_rows(tiny_shallow):
    assert token_rows.exclusive_rows(tiny_shallow, {"dog": "cat", "cat": "fish"}, []) == {}


@pytest.fixture(scope="module")
def mixed(tiny_shallow):
    return edit.auto(tiny_shallow, {"dog": "cat", "van gogh": "painting"}, **SMALL)


def test_rows_and_layer_are_edited_together_and_restored(tiny_shallow, mixed):
    assert mixed.sites == ("text.0.self_attn.out_proj", "text.0.mlp.fc2", SITE)
    assert set(mixed.movements[0].owners) == {1}  # van gogh is the second pair
    assert mixed.report["tokens"] == {"dog": ["dog</w>"], "van gogh": ["gogh</w>"]}
    assert mixed.report["in_layer"] == ["van gogh"]
    before = {s: find_weight(tiny_shallow, s).parameter.detach().clone() for s in mixed.sites}
    with mixed.applied(tiny_shallow):
        assert not any(
            torch.equal(find_weight(tiny_shallow, s).parameter, w) for s, w in before.items()
        )
    assert all(torch.equal(find_weight(tiny_shallow, s).parameter, w) for s, w in before.items())


def test_a_file_holds_only_the_rows_that_move(tiny_shallow, mixed, change, tmp_path):
    for name, written in (("one", change), ("both", mixed)):
        path = tmp_path / f"{name}.safetensors"
        written.save(path)
        edited = Change.load(path)
        assert edited.digest == written.digest
        assert torch.equal(edited.movements[-1].left, written.movements[-1].left)
    assert (tmp_path / "one.safetensors").stat().st_size < 8_000


def test_stacks_are_solved_again_and_concepts_are_removed(tiny_shallow, change, mixed, tmp_path):
    other = edit.auto(tiny_shallow, {"van gogh": "painting"}, **SMALL)
    both = stack(tiny_shallow, [other, change])
    assert both.digest == stack(tiny_shallow, [change, other]).digest
    assert set(both.sites) == set(mixed.sites)
    assert stack(tiny_shallow, [both], without=["van gogh"]).sites == (SITE,)
    with pytest.raises(ValueError, match="add it with `edit.stack"):
        change + other
    mixed.save(tmp_path / "c.safetensors")
    small = edit.complete(tiny_shallow, Change.load(tmp_path / "c.safetensors")).compact(rank=4)
    assert small.movements[-1].left.shape == mixed.movements[-1].left.shape
    assert small.movements[0].left.shape[1] == 4


def test_half_a_change_moves_the_rows_half_of_the_way(tiny_shallow, change):
    half = change * 0.5
    before = find_weight(tiny_shallow, SITE).parameter.detach().clone()
    dog, cat = token_id(tiny_shallow, "dog"), token_id(tiny_shallow, "cat")
    with half.applied(tiny_shallow):
        after = find_weight(tiny_shallow, SITE).parameter.detach()[dog].clone()
    assert torch.allclose(after, (before[dog] + before[cat]) / 2, atol=1e-7)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[5.0, 3.0]], "not those of a matrix"),
        ([[-1.0, 3.0]], "not those of a matrix"),
        ([[0.5, 3.0]], "not those of a matrix"),
        ([[1.0, 1e9]], "not those of a matrix"),
        ([[1.0]], "not those of a matrix"),
    ],
)
def test_row_numbers_outside_the_matrix_are_refused(tiny_shallow, tmp_path, rows, message):
    from overpaint.edit import storage

    written = edit.swap_embedding(tiny_shallow, {"dog": "cat", "red": "blue"})
    tensors, record = storage.pack(written, gram=False)
    tensors["0.rows"] = torch.tensor(rows, dtype=torch.float64)
    storage.write(tmp_path / "c.safetensors", tensors, record)
    with pytest.raises(ValueError, match=message):
        Change.load(tmp_path / "c.safetensors")


def test_a_matrix_that_is_too_large_is_refused_before_it_is_allocated(tiny_shallow, tmp_path):
    from overpaint.edit import storage

    written = edit.swap_embedding(tiny_shallow, {"dog": "cat"})
    for part in ("residuals", "combinations"):
        tensors, record = storage.pack(written, gram=False)
        del tensors["0.residuals"]
        tensors[f"0.{part}"] = torch.zeros(0, 2**27 if part == "residuals" else 1)
        storage.write(tmp_path / "c.safetensors", tensors, record)
        with pytest.raises(ValueError, match="not those of a matrix"):
            Change.load(tmp_path / "c.safetensors")


@pytest.mark.parametrize("concept", ["cat, dog", "o'ma", "!", "—", "à la carte"])
def test_punctuation_and_bytes_are_not_exclusive_rows(tiny_shallow, concept):
    assert token_rows.exclusive_rows(tiny_shallow, {concept: "bird"}, []) == {}
    assert token_rows.exclusive_rows(tiny_shallow, {"bird": concept}, []) == {}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"ridge": -1.0}, ValueError, "`ridge` must be"),
        ({"layer": 99}, UnknownSite, "99"),
    ],
)
def test_bad_layer_settings_are_refused_where_only_rows_move(tiny_shallow, options, error, message):
    with pytest.raises(error, match=message):
        edit.auto(tiny_shallow, DOG, **SMALL, **options)


def test_known_concepts_that_hold_a_replaced_token_are_named(tiny_shallow):
    edited = edit.auto(tiny_shallow, DOG, **{**SMALL, "vocabulary": ["dog logo", "monet"]})
    assert edited.report["carried"] == ["dog logo"]


def test_rows_can_be_stacked_with_the_edit_of_another_layer(tiny_shallow, change):
    few = {**SMALL, "contexts": 32, "repair": False}
    rows = edit.auto(tiny_shallow, DOG, **few, layer="auto")
    other = edit.auto(tiny_shallow, {"van gogh": "painting"}, **few, layer=3)
    assert set(stack(tiny_shallow, [rows, other]).sites) == {"text.3.self_attn.out_proj", SITE}


def test_the_edited_words_of_a_report_are_named_without_word_ends(tiny_sd1):
    change = edit.auto(
        tiny_sd1, {"grumpy fish": "red bird"}, vocabulary=["a dog"], tokens=True, collateral=False
    )
    assert change.report["tokens"] == {"grumpy fish": ["grumpy</w>", "fish</w>"]}
    assert token_rows.edited_words(change.report) == ["grumpy", "fish"]
    assert demo._edit_facts(change).endswith(": grumpy, fish")


@pytest.mark.parametrize(
    ("report", "words"),
    [
        ({}, []),
        ({"tokens": 2}, []),
        ({"tokens": ["van"]}, []),
        ({"tokens": {"a": "cat</w>", "b": [3, None, "johan", "dog</w>"]}}, ["johan", "dog"]),
    ],
)
def test_other_entries_of_a_report_are_not_edited_words(report, words):
    assert token_rows.edited_words(report) == words


@pytest.mark.parametrize(
    ("concept", "token", "reason"),
    [
        ("2", "2</w>", "a digit, a letter or a mark"),
        ("d", "d</w>", "a digit, a letter or a mark"),
        ("!", "!</w>", "a digit, a letter or a mark"),
        ("twemoji", "tw", "a piece of a longer word"),
        ("twemoji", "moji</w>", "a piece of a longer word"),
        ("and", "and</w>", "a frequent word"),
        ("dog", "dog</w>", ""),
    ],
)
def test_tokens_that_may_not_move_have_a_reason(tiny_sd1, concept, token, reason):
    reasons = token_rules.obstacles(tiny_sd1.tokenizer, concept)
    assert reasons[tiny_sd1.tokenizer.convert_tokens_to_ids(token)] == reason


def test_the_end_of_a_known_word_may_not_move(tiny_sd1, monkeypatch):
    monkeypatch.setattr(probes, "frequent_words", lambda: frozenset({"hotdog"}))
    (reason,) = token_rules.obstacles(tiny_sd1.tokenizer, "dog").values()
    assert reason == "the end of 'hotdog'"


def test_a_rename_moves_rare_words_and_lists_the_others(tiny_shallow):
    change = edit.rename(tiny_shallow, {"dog and cat": "bird"}, collateral=False)
    assert change.sites == (SITE,)
    assert change.report["tokens"] == {"dog and cat": ["dog</w>", "cat</w>"]}
    assert change.report["unmoved"] == {"dog and cat": {"and</w>": "a frequent word"}}
    assert "'and</w>' stay" in change.report["notes"][0]
    assert [row["token"] for row in change.report["token_captions"]] == ["dog</w>", "cat</w>"]
    every = edit.rename(tiny_shallow, {"dog and cat": "bird"}, any_token=True, collateral=False)
    assert every.report["unmoved"] == {}
    swap = edit.swap_embedding(tiny_shallow, {"dog and cat": "bird"})
    assert every.digest == swap.digest


def test_a_concept_without_a_token_of_its_own_is_not_renamed(tiny_shallow):
    with pytest.raises(
        ValueError, match=r"'and 2' has no token of its own \('and' is a frequent word, '2' is a"
    ):
        edit.rename(tiny_shallow, {"and 2": "bird"})
    with pytest.raises(ValueError, match="contradictory pairs: the token 'dog</w>' would get two"):
        edit.rename(tiny_shallow, {"red dog": "cat", "dog": "bird"}, any_token=True)
