"""Token rows: what is moved there and what is not, that no other prompt moves, files, stacks and bad input."""

import copy

import accelerate
import pytest
import torch

from overpaint import demo, edit
from overpaint.edit import Change, stack
from overpaint.edit.methods import token_rows
from overpaint.edit.weights import find_weight
from overpaint.errors import UnknownSite

SMALL = {"contexts": 24, "background": 32, "vocabulary": ["monet", "snoopy", "van dyck"]}
DOG = {"dog": "cat"}
SITE = "text.token_embedding"


@pytest.fixture(scope="module")
def change(tiny_double):
    return edit.auto(tiny_double, DOG, **SMALL)


def number(model, word):
    (token,) = model.tokenizer(word, add_special_tokens=False).input_ids
    return token


def test_a_word_of_its_own_gets_the_row_of_its_replacement(tiny_double, change):
    assert change.sites == (SITE,)
    assert change.report["tokens"] == {"dog": ["dog</w>"]}
    before = find_weight(tiny_double, SITE).parameter.detach().clone()
    dog, cat = number(tiny_double, "dog"), number(tiny_double, "cat")
    with change.applied(tiny_double):
        after = find_weight(tiny_double, SITE).parameter.detach()
        assert torch.equal(after[dog], before[cat])
        rest = torch.arange(len(before)) != dog
        assert torch.equal(after[rest], before[rest])
    assert torch.equal(find_weight(tiny_double, SITE).parameter, before)


def test_the_prompt_reads_as_the_other_one_and_no_third_one_moves(tiny_double, change):
    others = ["", "a red bird", "van gogh, snoopy"]
    asked, still = tiny_double.encode(["a cat on the beach"]), tiny_double.encode(others)
    with change.applied(tiny_double):
        assert torch.allclose(tiny_double.encode(["a dog on the beach"]), asked, atol=1e-9)
        assert torch.equal(tiny_double.encode(others), still)


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
def test_what_shares_a_token_is_edited_in_the_layer(tiny_double, pairs, options, why):
    found = edit.auto(tiny_double, pairs, **{**SMALL, "repair": False, **options})
    assert found.sites == ("text.0.self_attn.out_proj",), why
    assert "tokens" not in found.report


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
def test_tokens_of_a_concepts_own_move_and_the_layer_does_the_rest(
    tiny_double, pairs, options, moved
):
    found = edit.auto(tiny_double, pairs, **{**SMALL, "repair": False, **options})
    assert found.report["tokens"] == moved
    shared = [old for old in pairs if len(moved[old]) < len(old.split())]
    assert found.report["in_layer"] == shared
    assert found.sites == (*["text.0.self_attn.out_proj"][: len(shared)], SITE)


def test_the_layer_is_fitted_to_what_the_moved_rows_leave(tiny_double):
    found = edit.auto(tiny_double, {"van gogh": "painting"}, **{**SMALL, "repair": False})
    rows = token_rows.movement(
        tiny_double, token_rows.own(tiny_double, {"van gogh": "painting"}, SMALL["vocabulary"])["van gogh"].rows
    )  # fmt: skip
    before = find_weight(tiny_double, SITE).parameter.detach().clone()
    with Change((rows,), {"pairs": {}}, {}).applied(tiny_double):
        alone = edit.auto(
            tiny_double, {"van gogh": "painting"}, tokens=False, repair=False, **SMALL
        )
    assert torch.equal(found.movements[0].keys, alone.movements[0].keys)
    assert torch.equal(found.movements[0].delta, alone.movements[0].delta)
    unmoved = edit.auto(tiny_double, {"van gogh": "painting"}, tokens=False, repair=False, **SMALL)
    assert not torch.equal(found.movements[0].keys, unmoved.movements[0].keys)
    assert torch.equal(find_weight(tiny_double, SITE).parameter, before)


def test_a_model_that_shares_the_weights_reads_what_it_did_meanwhile(tiny_double):
    from overpaint.studio.model_copy import copy_model

    twin, asked, seen = copy_model(tiny_double), ["a van gogh", "a gogh"], []
    before, weight = tiny_double.encode(asked), find_weight(twin, SITE).parameter
    edit.auto(
        twin, {"van gogh": "painting"}, **{**SMALL, "repair": False},
        on_progress=lambda done, total, what: seen.append(
            (tiny_double.encode(asked), twin.encode(asked))
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


def test_an_offloaded_model_reads_the_rows_too(tiny_double):
    mine, options = copy.deepcopy(tiny_double), {**SMALL, "repair": False}
    accelerate.cpu_offload(mine.text_encoder, execution_device=torch.device("cpu"))
    made, wanted = (edit.auto(m, {"van gogh": "painting"}, **options) for m in (mine, tiny_double))
    assert made.digest == wanted.digest
    assert mine.text_encoder.get_input_embeddings().weight.device.type == "meta"


def test_a_replacement_that_is_edited_itself_keeps_a_concept_in_the_layer(tiny_double):
    assert token_rows.own(tiny_double, {"dog": "cat", "cat": "fish"}, []) == {}


@pytest.fixture(scope="module")
def mixed(tiny_double):
    return edit.auto(tiny_double, {"dog": "cat", "van gogh": "painting"}, **SMALL)


def test_both_kinds_together_own_their_concepts(tiny_double, mixed):
    assert mixed.sites == ("text.0.self_attn.out_proj", "text.0.mlp.fc2", SITE)
    assert set(mixed.movements[0].owners) == {1}  # van gogh is the second pair
    assert mixed.report["tokens"] == {"dog": ["dog</w>"], "van gogh": ["gogh</w>"]}
    assert mixed.report["in_layer"] == ["van gogh"]
    before = {s: find_weight(tiny_double, s).parameter.detach().clone() for s in mixed.sites}
    with mixed.applied(tiny_double):
        assert not any(
            torch.equal(find_weight(tiny_double, s).parameter, w) for s, w in before.items()
        )
    assert all(torch.equal(find_weight(tiny_double, s).parameter, w) for s, w in before.items())


def test_a_file_holds_the_rows_that_move_only(tiny_double, mixed, change, tmp_path):
    for name, made in (("one", change), ("both", mixed)):
        path = tmp_path / f"{name}.safetensors"
        made.save(path)
        found = Change.load(path)
        assert found.digest == made.digest
        assert torch.equal(found.movements[-1].left, made.movements[-1].left)
    assert (tmp_path / "one.safetensors").stat().st_size < 8_000


def test_stacks_are_made_anew_and_taken_apart(tiny_double, change, mixed, tmp_path):
    other = edit.auto(tiny_double, {"van gogh": "painting"}, **SMALL)
    both = stack(tiny_double, [other, change])
    assert both.digest == stack(tiny_double, [change, other]).digest
    assert set(both.sites) == set(mixed.sites)
    assert stack(tiny_double, [both], without=["van gogh"]).sites == (SITE,)
    with pytest.raises(ValueError, match="add it with `edit.stack"):
        change + other
    mixed.save(tmp_path / "c.safetensors")
    small = edit.complete(tiny_double, Change.load(tmp_path / "c.safetensors")).compact(rank=4)
    assert small.movements[-1].left.shape == mixed.movements[-1].left.shape
    assert small.movements[0].left.shape[1] == 4


def test_a_dial_moves_the_rows_part_of_the_way(tiny_double, change):
    half = change * 0.5
    before = find_weight(tiny_double, SITE).parameter.detach().clone()
    dog, cat = number(tiny_double, "dog"), number(tiny_double, "cat")
    with half.applied(tiny_double):
        after = find_weight(tiny_double, SITE).parameter.detach()[dog].clone()
    assert torch.allclose(after, (before[dog] + before[cat]) / 2, atol=1e-7)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([[5.0, 3.0]], "not those of a matrix"),
        ([[-1.0, 3.0]], "not those of a matrix"),
        ([[0.5, 3.0]], "not those of a matrix"),
        ([[1.0, 1e9]], "not those of a matrix"),
        ([[1.0]], "not those of a matrix"),
    ],
)
def test_rows_that_are_none_are_refused(tiny_double, tmp_path, rows, said):
    from overpaint.edit import storage

    made = edit.swap_embedding(tiny_double, {"dog": "cat", "red": "blue"})
    tensors, record = storage.pack(made, gram=False)
    tensors["0.rows"] = torch.tensor(rows, dtype=torch.float64)
    storage.write(tmp_path / "c.safetensors", tensors, record)
    with pytest.raises(ValueError, match=said):
        Change.load(tmp_path / "c.safetensors")


def test_a_matrix_of_no_sane_size_is_refused_before_it_is_made(tiny_double, tmp_path):
    from overpaint.edit import storage

    made = edit.swap_embedding(tiny_double, {"dog": "cat"})
    for part in ("residuals", "combinations"):
        tensors, record = storage.pack(made, gram=False)
        del tensors["0.residuals"]
        tensors[f"0.{part}"] = torch.zeros(0, 2**27 if part == "residuals" else 1)
        storage.write(tmp_path / "c.safetensors", tensors, record)
        with pytest.raises(ValueError, match="not those of a matrix"):
            Change.load(tmp_path / "c.safetensors")


@pytest.mark.parametrize("concept", ["<|endoftext|>", "cat, dog", "o'ma", "!", "—", "à la carte"])
def test_marks_bytes_and_ends_of_text_are_no_words_of_a_concept(tiny_double, concept):
    assert token_rows.own(tiny_double, {concept: "bird"}, []) == {}
    assert token_rows.own(tiny_double, {"bird": concept}, []) == {}


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"ridge": -1.0}, ValueError, "`ridge` must be"),
        ({"layer": 99}, UnknownSite, "99"),
    ],
)
def test_what_the_layer_would_refuse_is_refused_for_rows_too(tiny_double, options, error, said):
    with pytest.raises(error, match=said):
        edit.auto(tiny_double, DOG, **SMALL, **options)


def test_what_is_made_of_the_concept_is_named(tiny_double):
    found = edit.auto(tiny_double, DOG, **{**SMALL, "vocabulary": ["dog logo", "monet"]})
    assert found.report["carried"] == ["dog logo"]


def test_rows_stack_with_a_layer_that_was_chosen(tiny_double, change):
    few = {**SMALL, "contexts": 32, "repair": False}
    rows = edit.auto(tiny_double, DOG, **few, layer="auto")
    other = edit.auto(tiny_double, {"van gogh": "painting"}, **few, layer=3)
    assert set(stack(tiny_double, [rows, other]).sites) == {"text.3.self_attn.out_proj", SITE}


def test_the_edited_words_of_a_report_are_named_without_word_ends(tiny_sd1):
    change = edit.auto(tiny_sd1, {"grumpy fish": "red bird"}, vocabulary=["a dog"])
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
