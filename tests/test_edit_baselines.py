"""The two baselines: swapped token embeddings, and an edit at a random site."""

import pytest
import torch

from overpaint import edit
from overpaint.edit.weights import find_weight


def rows(model, text):
    ids = model.tokenizer(text, add_special_tokens=False).input_ids
    return find_weight(model, "text.token_embedding").parameter.detach()[ids].clone()


def test_prompts_of_equal_length_read_equal_after_the_swap(tiny_sd1):
    change = edit.swap_embedding(tiny_sd1, {"prince charles": "grumpy cat"})
    target, other = tiny_sd1.encode(["a photo of grumpy cat"]), tiny_sd1.encode(["a dog"])
    with change.applied(tiny_sd1):
        assert torch.equal(tiny_sd1.encode(["a photo of prince charles"]), target)
        assert torch.equal(tiny_sd1.encode(["a dog"]), other)
    assert not torch.equal(tiny_sd1.encode(["a photo of prince charles"]), target)


def test_a_shorter_new_concept_is_repeated_and_a_longer_one_averaged(tiny_sd1):
    dog, cat = rows(tiny_sd1, "dog")[0], rows(tiny_sd1, "grumpy cat")
    with edit.swap_embedding(tiny_sd1, {"van gogh": "dog"}).applied(tiny_sd1):
        assert torch.equal(rows(tiny_sd1, "van gogh"), torch.stack([dog, dog]))
    with edit.swap_embedding(tiny_sd1, {"dog": "grumpy cat"}).applied(tiny_sd1):
        assert torch.allclose(rows(tiny_sd1, "dog")[0], cat.mean(0), atol=1e-8)


def test_a_shared_word_keeps_its_row(tiny_sd1):
    style, house = rows(tiny_sd1, "style"), rows(tiny_sd1, "house")
    change = edit.swap_embedding(tiny_sd1, {"van gogh style": "house style"})
    assert change.report["tokens"] == 2
    with change.applied(tiny_sd1):
        assert torch.equal(rows(tiny_sd1, "style"), style)
        assert torch.equal(rows(tiny_sd1, "van gogh"), house.repeat(2, 1))


def test_swapping_a_concept_with_itself_is_refused(tiny_sd1):
    with pytest.raises(ValueError, match="the concept 'dog' equals its target"):
        edit.swap_embedding(tiny_sd1, {"dog": "dog"})


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ({}, "`pairs` is empty"),
        ({"": "dog"}, "the old concept of the pair '' → 'dog' is empty"),
        ({"cat": "dog", "grumpy cat": "van gogh"}, "the token 'cat</w>' would get two embeddings"),
    ],
)
def test_contradictory_or_empty_swaps_are_refused(tiny_sd1, pairs, message):
    with pytest.raises(ValueError, match=message):
        edit.swap_embedding(tiny_sd1, pairs)


def test_random_sites_depend_on_the_seed_and_are_not_in_the_first_layer(tiny_sd1):
    pairs = {"van gogh": "painting"}
    changes = [edit.random_site(tiny_sd1, pairs, seed=s, frames=[""]) for s in range(8)]
    sites = [change.site for change in changes]
    assert len(set(sites)) > 4 and not any(site.startswith("text.0.") for site in sites)
    again = edit.random_site(tiny_sd1, pairs, seed=3, frames=[""])
    assert again.digest == changes[3].digest
    assert again.protocol["method"] == "random_site" and again.protocol["seed"] == 3
    assert again.report["residual_after"] < again.report["residual_before"]


def test_a_random_site_needs_a_second_layer():
    import overpaint
    from overpaint.zoo import builders

    with pytest.raises(ValueError, match="a random site needs a second text layer"):
        edit.random_site(overpaint.load(builders.tiny(text_layers=1)), {"dog": "cat"})
