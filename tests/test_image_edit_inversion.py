"""Inversion and its refinement, the levels, rollback, and the bank of keys and values."""

from types import SimpleNamespace

import diffusers
import pytest
import torch

from overpaint.image_edit import bank as banks
from overpaint.image_edit.inversion import invert, levels_of, rollback
from overpaint.image_edit.sampler import Plan, noise_generator, run
from overpaint.image_edit.settings import overpaint
from overpaint.model import sampling


def model_with(**options):
    """Return a stand-in for a model: the scheduler of Stable Diffusion 1.5, changed by `options`."""
    config = {
        "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1,
        "set_alpha_to_one": False, "clip_sample": False,
    }  # fmt: skip
    return SimpleNamespace(scheduler=diffusers.DDIMScheduler(**config | options))


def gaussian(model, mean=0.3, spread=1.0):
    """Return the exact prediction for pictures that are normal with a mean and a spread."""
    table = model.scheduler.alphas_cumprod.double()
    kind = model.scheduler.config.prediction_type

    def predict(latents, t):
        a = table[t]
        signal, noise = a.sqrt(), (1 - a).sqrt()
        eps = noise * (latents - signal * mean) / (a * spread**2 + 1 - a)
        if kind == "epsilon":
            return eps
        clean = mean + signal * spread**2 * (latents - signal * mean) / (a * spread**2 + 1 - a)
        return signal * eps - noise * clean

    return predict


def drawn(predict, levels, latents):
    for t in levels.timesteps:
        latents = levels.scheduler.step(predict(latents, t), t, latents).prev_sample
    return latents


def error(predict, levels, clean, refinements):
    trajectory = invert(predict, clean, levels, refinements=refinements)
    return (drawn(predict, levels, trajectory.latents[0]) - clean).square().mean().sqrt().item()


CLEAN = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)).double()
ZERO_SNR = {
    "prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing",
    "set_alpha_to_one": True,
}  # fmt: skip


def test_without_noise_in_the_prediction_the_inversion_is_exact():
    levels = levels_of(model_with(), 20)
    assert error(lambda latents, t: torch.zeros_like(latents), levels, CLEAN, 0) < 1e-12


def test_refinement_makes_the_inversion_exact_step_by_step():
    model = model_with()
    levels = levels_of(model, 50)
    errors = [error(gaussian(model), levels, CLEAN, n) for n in (0, 2, 5)]
    assert errors[0] < 0.04 and errors[1] < 3e-4 and errors[2] < 1e-6
    assert errors[0] > 30 * errors[1] > 900 * errors[2]


def test_the_error_falls_with_the_number_of_steps():
    model = model_with()
    few, many = (error(gaussian(model), levels_of(model, n), CLEAN, 0) for n in (50, 100))
    assert few > 1.7 * many


def test_velocities_with_pure_noise_at_the_first_step_are_inverted():
    model = model_with(**ZERO_SNR)
    levels = levels_of(model, 20)
    assert levels.alphas[0] < 1e-7
    trajectory = invert(gaussian(model, spread=0.5), CLEAN, levels, refinements=4)
    assert all(latents.isfinite().all() for latents in trajectory.latents)
    assert error(gaussian(model, spread=0.5), levels, CLEAN, 4) < 1e-4


@pytest.mark.parametrize("steps", [5, 10, 50])
@pytest.mark.parametrize("options", [{}, ZERO_SNR])
def test_the_latents_of_each_step_are_at_its_level(steps, options):
    model = model_with(**options)
    levels = levels_of(model, steps)
    assert levels.timesteps == tuple(levels.scheduler.timesteps.tolist())
    for t, alpha in zip(levels.timesteps, levels.alphas, strict=False):
        assert alpha == pytest.approx(float(levels.scheduler.alphas_cumprod[t]), abs=3e-3)
    one = torch.ones(1, 1, 1, 1).double()
    if not options:  # a step of the zero prediction scales by the square root of both alphas
        for i, t in enumerate(levels.timesteps):
            scaled = float(levels.scheduler.step(0 * one, t, one).prev_sample)
            assert scaled == pytest.approx(
                (levels.alphas[i + 1] / levels.alphas[i]) ** 0.5, rel=1e-6
            )


def test_it_agrees_with_the_inversion_of_the_package(tiny_sd1):
    embeds = tiny_sd1.encode(["an apple"])
    clean = tiny_sd1.initial_latents([3]) * 0.5
    levels = levels_of(tiny_sd1, 4)
    ours = invert(
        lambda z, t: tiny_sd1.noise_pred(z, torch.tensor(t), embeds), clean, levels, refinements=3
    )
    theirs = sampling.invert(tiny_sd1, clean, embeds, steps=4, iterations=4)
    assert torch.allclose(ours.latents[0], theirs, atol=1e-5)


def test_a_single_step_from_pure_noise_is_refused():
    model = model_with(**ZERO_SNR | {"prediction_type": "epsilon", "set_alpha_to_one": True})
    levels = levels_of(model, 2)
    levels = type(levels)(levels.scheduler, levels.timesteps[:1], (0.0, 1.0))
    levels.scheduler.alphas_cumprod[:] = 0
    with pytest.raises(ValueError, match="discards its input with `steps` 1"):
        invert(lambda z, t: z, CLEAN, levels)


@pytest.mark.parametrize("options", [{}, ZERO_SNR])
def test_a_step_after_a_rollback_returns_to_the_same_latents(options):
    model = model_with(**options)
    levels = levels_of(model, 50)
    predict = gaussian(model)
    latents = invert(predict, CLEAN, levels, refinements=4).latents
    for step in (22, 28):
        t = levels.timesteps[step]
        later = levels.scheduler.step(predict(latents[step], t), t, latents[step]).prev_sample
        back = rollback(predict, later, levels, step)
        assert (back - latents[step]).square().mean().sqrt() < 3e-3


# --- the bank ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny_sd1", "tiny_sd2", "tiny_xl"])
def test_the_bank_holds_the_self_attention_of_the_up_blocks_and_takes_the_memory_stated(
    name, request
):
    model = request.getfixturevalue(name)
    layers = banks.attentions(model)
    inside = {m for m in model.unet.up_blocks.modules()}
    assert len(layers) == (9 if name != "tiny_xl" else 2 * (2 + 1))
    assert all(layer in inside and not layer.is_cross_attention for layer in layers)
    bank = banks.Bank(layers)
    latents = model.initial_latents([0, 1], size=(16 * 8 // 2, 16 * 8 // 2))
    embeds = model.encode(["a", "b"])
    with bank.record(7), torch.no_grad():
        model.noise_pred(latents, torch.tensor(500), embeds)
    keys, values = bank.projections[7][-1]
    assert keys.shape == values.shape and keys.shape[0] == 2
    sizes = [
        banks.token_grid(k.shape[1], tuple(latents.shape[-2:])) for k, _ in bank.projections[7]
    ]
    assert all(
        h * w == k.shape[1] for (h, w), (k, _) in zip(sizes, bank.projections[7], strict=True)
    )
    elements = sum(k.numel() + v.numel() for k, v in bank.projections[7])
    assert bank.bytes == 4 * elements


def test_a_layers_own_keys_and_values_change_nothing_and_hooks_go(tiny_sd1):
    bank = banks.Bank(banks.attentions(tiny_sd1))
    latents, embeds = tiny_sd1.initial_latents([0]), tiny_sd1.encode(["an apple"])

    def predict():
        with torch.no_grad():
            return tiny_sd1.noise_pred(latents, torch.tensor(500), embeds)

    clean = predict()
    with bank.record(0):
        predict()
    with bank.replace(0, lambda own, stored: stored):
        assert torch.allclose(predict(), clean, atol=1e-5)
    with bank.replace(0, lambda own, stored: torch.cat([own, stored], 1)):
        assert torch.allclose(predict(), clean, atol=1e-5)  # twice the same: the same weights
    with bank.replace(0, lambda own, stored: stored.flip(1) * 2):
        assert not torch.allclose(predict(), clean, atol=1e-3)
    with (
        pytest.raises(RuntimeError, match="in the middle"),
        bank.replace(0, lambda own, stored: stored),
    ):
        raise RuntimeError("in the middle")
    assert torch.equal(predict(), clean)
    assert not any(m._forward_hooks for m in tiny_sd1.unet.modules())


def test_tokens_that_are_no_grid_are_refused():
    assert banks.token_grid(35, (10, 14)) == (5, 7)
    assert banks.token_grid(12, (5, 7)) == (3, 4)  # odd sides are rounded up
    with pytest.raises(ValueError, match="no grid of halves of 8x8 latents"):
        banks.token_grid(20, (8, 8))


# --- the loop ---------------------------------------------------------------------------------------------------------


def plan_of(latents, **changes):
    everywhere = torch.ones(latents.shape[-2:], dtype=torch.bool)
    options = dict(
        latents=latents, prompts=("an apple",), start=lambda noisy: noisy[:1], projection=lambda own, stored: stored,
        energy=None, region=everywhere, noisy=everywhere, bank_window=(0.1, 1.0), energy_scale=1.0,
    )  # fmt: skip
    return Plan(**options | changes)


OFF = {"bank": False, "guidance": False, "steps": 5, "refinements": 0}


@pytest.mark.parametrize("name", ["tiny_sd1", "tiny_sd2", "tiny_xl"])
def test_with_every_part_off_the_loop_is_that_of_the_package_bit_for_bit(name, request):
    model = request.getfixturevalue(name)
    clean, embeds = model.initial_latents([1]) * 0.3, model.encode(["an apple", ""])
    for scale in (1.0, 3.0):
        outcome = run(model, plan_of(clean), overpaint(guidance_scale=scale, **OFF))
        drawn_latents = sampling.denoise(
            model, outcome.initial, embeds[:1], embeds[1:], steps=5, guidance_scale=scale,
            scheduler=sampling.make_scheduler(model, "ddim"),
        )  # fmt: skip
        assert torch.equal(outcome.latents, drawn_latents)


def test_the_noise_of_a_seed_is_not_that_of_a_picture_drawn_with_it(tiny_sd1):
    first = tiny_sd1.initial_latents([5])
    other = torch.randn(first.shape, generator=noise_generator(5))
    assert abs(torch.corrcoef(torch.stack([first.flatten(), other.flatten()]))[0, 1]) < 0.3
    assert torch.equal(other, torch.randn(first.shape, generator=noise_generator(5)))
