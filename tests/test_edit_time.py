"""TIME against its formula, and the alignment of words worked by hand."""

import pytest
import torch

from overpaint import edit
from overpaint.edit.captions import caption
from overpaint.edit.methods.time_edit import align
from overpaint.edit.weights import find_weight, fingerprint

APPLE = {"a apple tree": "a red apple tree"}


def bytes_of(model):
    return {name: fingerprint(p) for name, p in model.unet.named_parameters()}


def aligned(model, old, new, frame="", same=None):
    first, second = (caption(model, text, frame) for text in (old, new))
    return align(first, second, same=same or {})


@pytest.mark.parametrize("name", ["tiny_sd1", "tiny_sd2"])
def test_words_are_aligned_with_their_next_occurrence(request, name):
    """Positions from "apple" on are aligned one further, since "red" comes before it; the last one is repeated."""
    model = request.getfixturevalue(name)
    places = aligned(model, "a apple tree", "a red apple tree")
    assert places == [0, 1, *range(3, 77), 76]
    assert len(places) == 77


def test_an_is_aligned_with_a(tiny_sd1):
    a, an = (tiny_sd1.tokenizer(w, add_special_tokens=False).input_ids[0] for w in ("a", "an"))
    strict = aligned(tiny_sd1, "an apple", "a red apple")
    assert strict[:4] == [0, 2, 3, 4]  # not contained: aligned from the last word
    assert aligned(tiny_sd1, "an apple", "a red apple", same={an: a})[:4] == [0, 1, 3, 4]
    loose = edit.time(tiny_sd1, {"an apple": "a red apple"}, frames=("",), layers=[0])
    source = tiny_sd1.encode(["a red apple"])[0, 1].double()
    key = tiny_sd1.encode(["an apple"])[0, 1].double()
    w = find_weight(tiny_sd1, "unet.cross_attn.0.to_v").parameter.detach().double()
    assert torch.allclose(loose.movements[0].residuals[1], w @ (source - key), atol=1e-5)


def test_concepts_that_are_not_contained_are_aligned_from_their_last_word(tiny_sd1):
    """In "a photo of van gogh" → "a photo of painting" both words of the name are aligned with the one new word."""
    places = aligned(tiny_sd1, "van gogh", "painting", "a photo of ")
    assert places[:8] == [0, 1, 2, 3, 4, 4, 5, 6] and places[-1] == 75
    wider = aligned(tiny_sd1, "cat", "van gogh", "a photo of ")
    assert wider[:6] == [0, 1, 2, 3, 5, 6] and wider[-2:] == [76, 76]


@pytest.mark.parametrize("matrices", [("v",), ("k", "v")])
def test_every_weight_equals_the_formula(tiny_sd2, matrices):
    change = edit.time(tiny_sd2, APPLE, ridge=0.1, frames=("", "a photo of "), matrices=matrices)
    assert len(change.movements) == 16 * len(matrices)
    k, s = [], []
    for frame in ("", "a photo of "):
        old, new = (tiny_sd2.encode([frame + t])[0].double() for t in next(iter(APPLE.items())))
        places = aligned(tiny_sd2, *next(iter(APPLE.items())), frame)
        k.append(old), s.append(new[places])
    k, s = torch.cat(k).T, torch.cat(s).T
    for movement in change.movements:
        w = find_weight(tiny_sd2, movement.site).parameter.detach().double()
        system = 0.1 * torch.eye(64, dtype=torch.float64) + k @ k.T
        expected = torch.linalg.solve(system, 0.1 * w + (w @ s) @ k.T, left=False) - w
        assert float((movement.delta - expected).norm()) <= 2e-3 * float(expected.norm())


@pytest.mark.parametrize("name", ["tiny_sd1", "tiny_xl"])
def test_the_value_projections_of_all_layers_move_and_are_restored(request, name):
    model = request.getfixturevalue(name)
    before = bytes_of(model)
    change = edit.time(model, APPLE)
    count = 11 if name == "tiny_xl" else 16
    assert change.sites == tuple(f"unet.cross_attn.{i}.to_v" for i in range(count))
    with change.applied(model):
        after = bytes_of(model)
        moved = {n for n in before if before[n] != after[n]}
        assert len(moved) == count and all(n.endswith("attn2.to_v.weight") for n in moved)
    assert bytes_of(model) == before


def test_bad_arguments_are_refused(tiny_sd1):
    with pytest.raises(ValueError, match="the old concept .* is empty: name it in words"):
        edit.time(tiny_sd1, {"": "apple"})
    with pytest.raises(ValueError, match="moves 'k', 'v' or both"):
        edit.time(tiny_sd1, APPLE, matrices=())
    with pytest.raises(
        ValueError, match="`frames` is empty: give at least one caption; '' is the bare"
    ):
        edit.time(tiny_sd1, APPLE, frames=())
    with pytest.raises(ValueError, match="contradictory pairs: 'apple' → 'cat' and 'Apple' → 'dog"):
        edit.time(tiny_sd1, {"apple": "cat", "Apple": "dog"})
