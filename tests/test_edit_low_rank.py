"""Compact changes: small files, nearly the same movement, and sums like those of whole changes."""

import dataclasses
import os

import pytest
import torch

import overpaint as op
from overpaint import edit
from overpaint.edit import Change
from overpaint.edit.least_squares import factorise
from overpaint.edit.weights import find_weight

OPENMOJI, TWEMOJI = {"openmoji style": "noto style"}, {"twemoji style": "noto style"}
PRESERVED = ["", "a cat", "a red dog in fluent style"]


@pytest.fixture(scope="module")
def icons():
    return op.load("icons")


@pytest.fixture(scope="module")
def openmoji(icons):
    return edit.quickfix(icons, OPENMOJI, preserve=PRESERVED)


@pytest.fixture(scope="module")
def twemoji(icons):
    return edit.quickfix(icons, TWEMOJI, preserve=PRESERVED)


def missed(change, delta):
    """Return the residual that remains under `delta`, relative to that of `change`."""
    residuals = change.movements[0].residuals
    return float((residuals - change.keys.double() @ delta.T).norm() / residuals.norm())


def solved_again(change):
    """Return the solution for the keys, residuals and preserve terms of a change."""
    m = change.movements[0]
    return factorise(m.keys, ridge=change.ridge, gram=m.gram).solve(m.residuals).delta


def test_full_rank_in_double_keeps_the_movement(openmoji):
    small = openmoji.compact(rank=200, dtype=torch.float64)
    assert small.report["compact_error"] <= 1e-7
    assert float((solved_again(small) - openmoji.delta).norm() / openmoji.delta.norm()) <= 1e-5


def test_a_movement_of_full_rank_is_cut_to_its_largest_directions(tiny_sd1):
    site = "text.0.self_attn.q_proj"
    delta = torch.randn(*find_weight(tiny_sd1, site).parameter.shape, dtype=torch.float64)
    none = torch.zeros(0, delta.shape[1]), torch.zeros(0, len(delta)), (), None
    movement = edit.Movement(site, "base", torch.eye(len(delta)).double(), delta, *none)
    cut = Change((movement,), {}, {}).compact(rank=5, dtype=torch.float64)
    sizes = torch.linalg.svdvals(delta)
    best = float(sizes[5:].norm() / sizes.norm())  # Eckart and Young
    assert cut.report["compact_error"] == pytest.approx(best, rel=1e-9)


def test_the_compact_keys_lead_to_the_compact_movement(openmoji):
    small = openmoji.compact(rank=8)
    assert float((solved_again(small) - small.delta).norm() / small.delta.norm()) <= 1e-3
    assert len(small.keys) == 12 and small.left.shape[1] == 8
    assert {t.dtype for t in (small.left, small.right, small.keys)} == {torch.float16}


def test_the_report_has_the_errors_and_they_fall_with_the_rank(openmoji):
    errors = []
    for rank in (4, 16, 48):
        small = openmoji.compact(rank=rank)
        error = float((small.delta - openmoji.delta).norm() / openmoji.delta.norm())
        assert small.report["compact_error"] == pytest.approx(error, rel=1e-6)
        assert small.report["compact_residual"] == pytest.approx(missed(openmoji, small.delta))
        assert small.report["compact_residual_before"] == pytest.approx(
            missed(openmoji, openmoji.delta)
        )
        errors.append((error, small.report["compact_residual"]))
    assert errors == sorted(errors, reverse=True)
    assert errors[1][1] <= 1.5 * missed(openmoji, openmoji.delta)


def test_sums_of_compact_changes_are_close_to_sums_of_whole_ones(openmoji, twemoji):
    """The plain sum of two movements with the same target misses nearly all of it."""
    whole, small = openmoji + twemoji, openmoji.compact() + twemoji.compact()
    assert missed(whole, openmoji.delta + twemoji.delta) > 0.8
    assert missed(whole, small.delta) <= 0.15
    assert missed(twemoji, small.without("openmoji style").delta) <= 0.15


def test_many_concepts_share_the_rank(icons):
    names = ("cat", "fox", "apple", "car", "house")
    many = edit.quickfix(icons, {name: "dog" for name in names}, preserve=PRESERVED)
    small = many.compact(rank=40)
    assert missed(many, small.delta) <= 1.1 * missed(many, many.delta)
    assert float((solved_again(small) - small.delta).norm() / small.delta.norm()) <= 0.02
    left = many.without("cat")
    assert missed(left, small.without("cat").delta) <= 0.3
    assert set(many.compact(rank=1).movements[0].owners) == set(range(5))


def test_the_file_is_small_and_loads_the_same_change(icons, openmoji, tmp_path):
    small = openmoji.compact()
    small.save(tmp_path / "c.safetensors")
    width = find_weight(icons, small.site).parameter.shape[0]
    assert os.path.getsize(tmp_path / "c.safetensors") <= 2 * (16 + 16 + 24) * width + 8_000
    loaded = Change.load(tmp_path / "c.safetensors")
    assert loaded.digest == small.digest
    assert torch.allclose(
        loaded.movements[0].residuals, small.movements[0].residuals, rtol=0, atol=1e-9
    )
    half = 0.3 * small
    half.save(tmp_path / "half.safetensors")
    assert os.path.getsize(tmp_path / "half.safetensors") <= 2 * 56 * width + 8_000
    with loaded.applied(icons):
        pass


@pytest.mark.parametrize("preserve", [[], [f"a painting of a cat, number {i}" for i in range(200)]])
def test_one_concept_at_the_size_of_stable_diffusion_takes_100_kilobytes(preserve, tmp_path):
    generator = torch.Generator().manual_seed(0)
    keys, residuals = (torch.randn(291, 768, generator=generator) for _ in range(2))
    solution = factorise(keys, ridge=0.01).solve(residuals)
    weight = torch.zeros(768, 768)
    movement = edit.Movement.from_solution(
        "text.0.self_attn.out_proj", weight, solution, keys, residuals.double(), [0] * 291, None
    )
    protocol = {
        "method": "quickfix", "model": "CompVis/stable-diffusion-v1-4", "pairs": {"van gogh": "painting"},
        "preserve": preserve, "preserve_weight": 0.0, "ridge": 0.01, "positions": "from_subject_to_end",
        "frames": list(edit.quickfix.__globals__["FRAMES"]), "subtract_bias": True, "layer": 0, "projection": "out",
    }  # fmt: skip
    change = Change((movement,), protocol, {"rank": 291, "seconds": {"keys": 0.123456}})
    change.compact().save(tmp_path / "c.safetensors")
    assert os.path.getsize(tmp_path / "c.safetensors") <= 100_000


def test_rows_that_an_embedding_swap_does_not_move_keep_their_bytes(tiny_sd1):
    swap = edit.swap_embedding(tiny_sd1, {"van gogh": "painting"})
    small = swap.compact(rank=1)
    assert small.left.shape == swap.left.shape and len(small.keys) == 0
    still = swap.left.abs().sum(1) == 0
    before = find_weight(tiny_sd1, swap.site).parameter.detach().clone()
    with small.applied(tiny_sd1):
        after = find_weight(tiny_sd1, swap.site).parameter.detach()
        assert torch.equal(after[still], before[still])
        assert not torch.equal(after[~still], before[~still])


def test_bad_arguments_are_refused(openmoji):
    with pytest.raises(ValueError, match="`rank` must be 1 or more, got 0. 16 is the usual"):
        openmoji.compact(rank=0)
    with pytest.raises(ValueError, match=r"must be torch\.float16, .* got torch\.bfloat16"):
        openmoji.compact(dtype=torch.bfloat16)
    with pytest.raises(
        ValueError, match=r"torch\.float16 cannot hold .* use `dtype=torch\.float32`"
    ):
        (movement,) = openmoji.movements
        huge = dataclasses.replace(movement, right=movement.right * 1e15)
        dataclasses.replace(openmoji, movements=(huge,)).compact()
    bare = dataclasses.replace(
        openmoji, movements=(dataclasses.replace(openmoji.movements[0], gram=None),)
    )
    with pytest.raises(
        ValueError, match=r"lacks their terms, .* `edit\.complete\(model, change\)` first"
    ):
        bare.compact()
