"""Energies by hand and by finite differences, regions of their gradients, and the update rules."""

import diffusers
import pytest
import torch

from overpaint.image_edit import energies
from overpaint.image_edit.energies import Pairs, Weights
from overpaint.image_edit.guidance import factor, gradient, normalised
from overpaint.image_edit.inversion import levels_of

WEIGHTS = Weights()


def maps(seed, levels=2):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(5 + i, 8, 8, generator=generator).double() for i in range(levels)]


def region(*cells):
    mask = torch.zeros(8, 8, dtype=torch.bool)
    for y, x in cells:
        mask[y, x] = True
    return mask


TARGET, HOLE = region((1, 1), (1, 2), (2, 1)), region((4, 4), (4, 5))
KEEP = ~(TARGET | HOLE)
SHIFTED = Pairs(torch.tensor([9, 10, 17]), torch.tensor([36, 37, 44]))
PATCHES = Pairs(torch.arange(18).view(2, 9), torch.arange(18, 36).view(2, 9))


def every(current, stored, shown):
    """Return each energy by name."""
    return {
        "aligned": energies.aligned(current, stored, TARGET, WEIGHTS),
        "move": energies.move(current, stored, SHIFTED, HOLE, KEEP, KEEP, WEIGHTS),
        "drag": energies.drag(current, stored, PATCHES, KEEP, WEIGHTS),
        "landmarks": energies.landmarks(current, stored, PATCHES, WEIGHTS),
        "appearance": energies.appearance(current, stored, shown, TARGET, HOLE, WEIGHTS),
        "paste": energies.paste(current, stored, shown, SHIFTED, TARGET, WEIGHTS),
    }


def test_similarities_and_their_inverse_have_the_stated_range():
    one = maps(0)[0]
    pairs = Pairs(torch.arange(64), torch.arange(64))
    assert energies.local_similarity(one, one, pairs).item() == pytest.approx(1)
    assert energies.local_similarity(one, -one, pairs).item() == pytest.approx(0)
    assert energies.global_similarity(one, 3 * one, TARGET, TARGET).item() == pytest.approx(1)
    assert energies.inverse(torch.tensor([0.0, 1.0])).tolist() == pytest.approx([1.0, 0.2])


def test_energies_of_alike_and_of_opposite_features_by_hand():
    current = maps(1)
    same, opposite = (
        every(current, current, current),
        every(current, [-f for f in current], current),
    )
    assert same["aligned"].edit.item() == pytest.approx(2 * 4 / 5)
    assert same["aligned"].content.item() == pytest.approx(2 * 6 / 5)
    assert opposite["aligned"].edit.item() == pytest.approx(2 * 4)
    assert same["move"].terms["content"] == pytest.approx(6 / 5)
    assert same["move"].terms["contrast"] == pytest.approx(0.2)
    assert opposite["move"].terms["contrast"] == pytest.approx(0, abs=1e-9)
    assert same["drag"].terms["repulsion"] == pytest.approx(0.8)
    assert all(torch.isfinite(e.edit + e.content) for e in opposite.values())


def test_a_move_by_nothing_has_no_hole_and_no_gradient():
    current = [f.requires_grad_() for f in maps(2)]
    pairs = Pairs(*(TARGET.flatten().nonzero().flatten(),) * 2)
    empty = torch.zeros(8, 8, dtype=torch.bool)
    energy = energies.move(current, current, pairs, empty, ~TARGET, ~TARGET, WEIGHTS)
    assert energy.edit.item() == pytest.approx(4 / 5)
    assert "contrast" not in energy.terms and "inpaint" not in energy.terms
    grads = torch.autograd.grad(energy.edit + energy.content, current)
    assert all(g.norm() < 1e-8 for g in grads)


def test_gradients_are_those_of_finite_differences_and_targets_have_none():
    stored, shown = [f.requires_grad_() for f in maps(4)], [f.requires_grad_() for f in maps(5)]
    current = maps(3)
    direction = maps(6)

    def total(name, step):
        energy = every(
            [c + step * d for c, d in zip(current, direction, strict=True)], stored, shown
        )[name]
        return energy.edit + energy.content

    for name in every(current, stored, shown):
        leaves = [c.clone().requires_grad_() for c in current]
        energy = every(leaves, stored, shown)[name]
        parts = torch.autograd.grad(
            energy.edit + energy.content, [*leaves, *stored, *shown], allow_unused=True
        )
        assert all(g is None for g in parts[2:]), name
        slope = sum((g * d).sum() for g, d in zip(parts, direction, strict=False))
        numeric = (total(name, 1e-5) - total(name, -1e-5)) / 2e-5
        assert slope.item() == pytest.approx(numeric.item(), rel=1e-6), name


def test_the_order_of_pairs_and_their_repetition_do_not_matter():
    current, stored = maps(7), maps(8)
    order = torch.tensor([1, 0])
    swapped = Pairs(PATCHES.target[order], PATCHES.source[order])
    twice = Pairs(PATCHES.target.repeat(2, 1), PATCHES.source.repeat(2, 1))
    base = energies.drag(current, stored, PATCHES, KEEP, WEIGHTS)
    for pairs in (swapped, twice):
        energy = energies.drag(current, stored, pairs, KEEP, WEIGHTS)
        assert energy.edit.item() == pytest.approx(base.edit.item())


# --- guidance ---------------------------------------------------------------------------------------------------------


def quadratic(latents):
    return energies.Energy(latents.square().sum(), 3 * latents.sum(), {})


def test_the_gradients_of_edit_and_content_keep_to_their_regions():
    latents = torch.randn(1, 5, 8, 8).double()
    values, _ = gradient(quadratic, latents, TARGET)
    assert torch.allclose(values[..., TARGET], 2 * latents[..., TARGET])
    assert torch.equal(values[..., ~TARGET], torch.full_like(values[..., ~TARGET], 3))
    scaled, _ = gradient(quadratic, latents, TARGET, loss_scale=1024.0)
    assert torch.allclose(scaled, values)
    everywhere, _ = gradient(quadratic, latents, None)
    assert torch.allclose(everywhere, 2 * latents + 3)
    only_edit, _ = gradient(quadratic, latents, torch.ones(8, 8, dtype=torch.bool))
    assert torch.allclose(only_edit, 2 * latents)


def test_a_gradient_is_divided_by_its_root_mean_square():
    values = torch.randn(1, 4, 8, 8)
    assert normalised(values).square().mean().item() == pytest.approx(1, rel=1e-5)
    assert torch.allclose(normalised(5 * values), normalised(values))
    assert not normalised(torch.zeros(3)).any()
    assert normalised(torch.tensor([float("nan"), 2.0, 0.0])).isfinite().all()


def test_both_updates_equal_a_step_with_a_changed_prediction(tiny_sd1):
    levels = levels_of(tiny_sd1, 50)
    latents, prediction, values = (torch.randn(1, 4, 8, 8).double() for _ in range(3))
    for i in (0, 9, 29):
        t, (a, later) = levels.timesteps[i], levels.alphas[i : i + 2]
        plain = levels.scheduler.step(prediction, t, latents).prev_sample
        both = levels.scheduler.step(prediction + values, t, latents).prev_sample
        assert torch.allclose(plain - factor("eps", a, later) * values, both, atol=1e-6)
        clean = (latents - (1 - a) ** 0.5 * (prediction + values)) / a**0.5
        release = later**0.5 * clean + (1 - later) ** 0.5 * prediction
        assert torch.allclose(plain - factor("x0", a, later) * values, release, atol=1e-6)


def test_the_release_is_nine_to_sixteen_times_stronger_than_the_paper():
    config = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "steps_offset": 1,
    }
    scheduler = diffusers.DDIMScheduler(**config, set_alpha_to_one=False, clip_sample=False)
    levels = levels_of(type("Model", (), {"scheduler": scheduler})(), 50)
    for i, ratio in ((0, 9.1), (29, 15.7)):
        a, later = levels.alphas[i : i + 2]
        assert factor("x0", a, later) / factor("eps", a, later) == pytest.approx(ratio, rel=0.02)


def test_pure_noise_is_not_guided():
    assert factor("x0", 0.0, 0.01) == factor("eps", 1e-8, 0.01) == 0
