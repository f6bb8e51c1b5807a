"""SPEED against its formula with Lagrange multipliers; equality constraints, filter and augmentation by plain loops."""

import numpy as np
import pytest
import torch

from overpaint import edit
from overpaint.edit.least_squares import factorise
from overpaint.edit.methods.speed import Refinement, held_keys
from overpaint.edit.methods.text_keys import feature_edit, read_features
from overpaint.edit.null_space import span
from overpaint.edit.weights import find_weight

PAIRS = {"van gogh": "painting", "snoopy": "dog"}
PRESERVE = ["monet", "a cat", "tree", "a red house", "a bird", "an apple", "a fish", "a car"]
FRAMES = ("", "photo of ")


def exact(model, site):
    return find_weight(model, site).parameter.detach().double()


def rows(model, pairs=PAIRS, preserve=PRESERVE):
    return feature_edit(model, pairs, preserve, frames=FRAMES)


def lagrange(w, edit_rows, held, empty, *, ridge, null_below):
    """Return the paper's movement: the null space of held keys as a projector, and multipliers for the empty prompt."""
    c1, target = edit_rows.keys.double().T, edit_rows.sources.double().T
    values, vectors = torch.linalg.eigh(held.T @ held)
    p = vectors[:, values < null_below] @ vectors[:, values < null_below].T
    inverse = torch.linalg.inv(c1 @ c1.T @ p + ridge * torch.eye(len(p)).double())
    c2 = empty.double().T
    q = (
        torch.eye(len(p)).double()
        - inverse @ c2 @ torch.linalg.inv(c2.T @ p @ inverse @ c2) @ c2.T @ p
    )
    return w @ (target - c1) @ c1.T @ p @ q @ inverse


@pytest.mark.parametrize("filtered", [True, False])
def test_every_weight_equals_the_formula_with_lagrange_multipliers(tiny_double, filtered):
    change = edit.speed(
        tiny_double, PAIRS, preserve=PRESERVE, frames=FRAMES, copies=0, influence_filter=filtered, empty_tokens=3,
        layers=[0, 8],
    )  # fmt: skip
    parts = rows(tiny_double)
    empty = read_features(tiny_double, [""])[""][:3]
    k = parts.keys.double()
    assert [site.rpartition(".")[2] for site in change.sites] == ["to_v", "to_v"]
    for m in change.movements:
        w = exact(tiny_double, m.site)
        alone = (
            w
            @ (parts.sources.double() - k).T
            @ k
            @ torch.linalg.inv(k.T @ k + torch.eye(64).double())
        )
        moved = [float((alone @ c.double()).norm()) for c in parts.preserve]
        mean = sum(moved) / len(moved)
        held = [c for c, by in zip(parts.preserve, moved, strict=True) if by > mean or not filtered]
        expected = lagrange(w, parts, torch.stack(held).double(), empty, ridge=1.0, null_below=0.1)
        assert 0 < len(held) <= len(moved)
        assert float((m.delta - expected).norm()) < 1e-6 * float(expected.norm())


@pytest.mark.parametrize("name", ["tiny_sd1", "tiny_sd2", "tiny_xl"])
def test_begin_of_text_and_the_empty_prompt_do_not_move(request, name):
    model = request.getfixturevalue(name)
    change = edit.speed(model, PAIRS, preserve=PRESERVE, empty_tokens=12, layers=[1, 6])
    features = read_features(model, ["", "a photo of a tree"])
    fixed = torch.cat([features[""][:12], features["a photo of a tree"][:1]]).double()
    old = read_features(model, ["snoopy"])["snoopy"][1].double()
    for m in change.movements:
        w = exact(model, m.site)
        moved = (fixed @ m.delta.T).norm(dim=1) / (fixed @ w.T).norm(dim=1)
        assert float(moved.max()) < 1e-6  # the features are float32
        assert float((m.delta @ old).norm()) > 0.1 * float((w @ old).norm())


def test_the_whole_empty_prompt_needs_a_wide_encoder(tiny_sd1):
    with pytest.raises(ValueError, match="leave no direction of 64 in which 'van gogh' could be"):
        edit.speed(tiny_sd1, PAIRS)


def test_copies_lie_along_the_least_direction_of_the_weight_and_are_filtered_again(tiny_sd1):
    parts = rows(tiny_sd1)
    w = exact(tiny_sd1, "unet.cross_attn.3.to_v")
    refinement = Refinement(
        parts, factorise(parts.keys, ridge=1.0), span(torch.zeros(0, 64)), influence_filter=True, copies=10,
        null_below=0.1,
    )  # fmt: skip
    held = held_keys(refinement, w, seed=3)
    k = parts.keys.double()
    alone = (
        w @ (parts.sources.double() - k).T @ k @ torch.linalg.inv(k.T @ k + torch.eye(64).double())
    )
    moved = (parts.preserve.double() @ alone.T).norm(dim=1)
    first = parts.preserve.double()[moved > moved.mean()]
    assert torch.equal(held[: len(first)], first)
    least = np.linalg.svd(w.numpy(), full_matrices=False)[2][-1]
    least *= np.sign(least[np.abs(least).argmax()])
    sizes = torch.randn(
        len(first), 10, 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64
    )
    copies = [
        c.numpy() + float(e) * least for c, row in zip(first, sizes, strict=True) for e in row
    ]
    by = [np.linalg.norm(alone.numpy() @ c) for c in copies]
    expected = [c for c, b in zip(copies, by, strict=True) if b > np.mean(by)]
    assert 0 < len(expected) < len(copies)
    assert np.allclose(held[len(first) :].numpy(), np.stack(expected), atol=1e-9)


def test_held_concepts_move_less_than_without_the_list(tiny_sd1):
    options = {"empty_tokens": 2, "copies": 0, "influence_filter": False}
    held = edit.speed(tiny_sd1, PAIRS, preserve=PRESERVE, null_below=0.0, **options)
    assert held.report["preserve_drift"] < 1e-6
    assert held.report["held_keys"] == [8] * 16 and held.report["held_directions"] == [10] * 16
    filtered = edit.speed(tiny_sd1, PAIRS, preserve=PRESERVE, empty_tokens=2)
    assert filtered.report["preserve_drift"] > 1e-3
    kept = feature_edit(tiny_sd1, PAIRS, PRESERVE, frames=("",)).preserve.double()
    free = edit.speed(tiny_sd1, PAIRS, empty_tokens=2)
    assert max(float((kept @ m.delta.T).norm(dim=1).max()) for m in free.movements) > 0.1


def test_equal_seeds_give_equal_changes_which_cannot_be_added(tiny_sd1, tmp_path):
    options = {"preserve": PRESERVE, "empty_tokens": 2, "layers": [0]}
    first, again, other = (edit.speed(tiny_sd1, PAIRS, seed=seed, **options) for seed in (3, 3, 4))
    assert first.digest == again.digest != other.digest
    with pytest.raises(ValueError, match="only changes that were solved can be added"):
        first + other
    first.save(tmp_path / "c.safetensors")
    assert edit.Change.load(tmp_path / "c.safetensors").digest == first.digest


def test_bad_arguments_are_refused(tiny_sd1):
    for name, value, message in (
        ("copies", -1, "`copies` must be 0 or more, got -1"),
        ("null_below", -0.1, "`null_below` must be 0 or more and finite, got -0.1"),
        ("empty_tokens", 0, "`empty_tokens` must be 1 or more, got 0"),
        ("seed", -1, "`seed` must be"),
        ("ridge", 0.0, "`ridge` must be positive and finite"),
        ("preserve", ["snoopy"], "has the same key as 'snoopy' → 'dog'"),
    ):
        with pytest.raises(ValueError, match=message):
            edit.speed(tiny_sd1, PAIRS, **{"empty_tokens": 2, name: value})
