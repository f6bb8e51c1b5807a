"""The denoiser of flows: noise levels and sampler against diffusers, laws of the loss, and overfitting."""

import dataclasses

import pytest
import torch
from torch import nn

from overpaint.match import Config, Matcher, backbone, correlation
from overpaint.match import denoiser as d
from overpaint.match import flow as flows
from overpaint.match.conditioning import (
    Conditions,
    coarse_conditions,
    extract_features,
    fine_conditions,
)

SMOKE = Config.smoke()


@pytest.fixture(scope="module")
def untrained():
    return Matcher.build(SMOKE)


@pytest.fixture(scope="module")
def random_denoiser():
    """A denoiser with a random last layer, so that its samples depend on the noise."""
    denoiser = Matcher.build(SMOKE, seed=1).coarse
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(2)
        denoiser.unet.conv_out.weight.normal_(0, 0.03)
    return denoiser


def pictures(count, side=128, seed=0):
    noise = torch.rand(
        count, 3, side // 4, side // 4, generator=torch.Generator().manual_seed(seed)
    )
    return nn.functional.interpolate(noise, (side, side), mode="bicubic").clamp(0, 1)


def conditions(count=2, side=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    initial = torch.rand(count, 2, side, side, generator=generator) / 2 - 0.25
    return Conditions(
        initial, torch.rand(count, SMOKE.stack_channels, side, side, generator=generator)
    )


@pytest.fixture(scope="module")
def features(untrained):
    """Return a function that extracts the features of pictures."""

    def extract(*images):
        return [extract_features(untrained.backbone, SMOKE, x) for x in images]

    return extract


class Oracle(nn.Module):
    """Returns the true flow, whatever the noise."""

    def __init__(self, truth, config=SMOKE):
        super().__init__()
        self.truth, self.config = truth, config

    def forward(self, noisy, level, inputs):
        copies = len(noisy) // len(self.truth)
        return (self.truth * self.config.flow_scale).repeat(copies, 1, 1, 1)


def test_noise_levels_equal_the_papers():
    expected = torch.tensor([0.898706, 0.647478, 0.340810, 0.094046, 0.000094]).double()
    assert (d.alpha_bar(5) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("steps", [1, 5])
def test_sampling_equals_diffusers_ddim(random_denoiser, steps):
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        num_train_timesteps=5, beta_schedule="squaredcos_cap_v2", prediction_type="sample",
        clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing",
    )  # fmt: skip
    scheduler.set_timesteps(steps)
    inputs = conditions(1)
    noisy = torch.randn(inputs.initial.shape, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        for level in scheduler.timesteps.tolist():
            noisy = scheduler.step(random_denoiser(noisy, level, inputs), level, noisy).prev_sample
    generator = torch.Generator().manual_seed(7)
    ours = d.sample(random_denoiser, inputs, samples=1, steps=steps, generator=generator)[0]
    assert (ours - noisy / SMOKE.flow_scale).abs().max() < 1e-6


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5])
def test_a_perfect_denoiser_gives_the_true_flow_in_any_number_of_steps(steps):
    inputs = conditions()
    truth = torch.rand_like(inputs.initial) - 0.5
    result = d.sample(Oracle(truth), inputs, samples=3, steps=steps)  # type: ignore[arg-type]
    assert (result - truth).abs().max() < 1e-6
    levels = d.visited_levels(5, steps)
    assert levels[0] == 4
    assert len(set(levels)) == steps
    assert levels == sorted(levels, reverse=True)


def test_an_untrained_denoiser_returns_the_initial_flow_exactly(untrained):
    inputs = conditions()
    for samples, steps, seed in ((1, 5, 0), (3, 1, 1), (2, 3, 2)):
        generator = torch.Generator().manual_seed(seed)
        result = d.sample(
            untrained.coarse, inputs, samples=samples, steps=steps, generator=generator
        )
        assert result.shape == (samples, 2, 2, 16, 16)
        assert torch.equal(result, inputs.initial.expand_as(result))


def test_the_samples_depend_on_the_seed_alone(random_denoiser):
    inputs = conditions()
    first, again, other = (
        d.sample(random_denoiser, inputs, samples=2, generator=torch.Generator().manual_seed(seed))
        for seed in (3, 3, 4)
    )
    assert torch.equal(first, again)
    assert (first - other).abs().max() > 1e-4
    assert first.std(0).min() > 0


def test_samples_drawn_together_equal_samples_drawn_alone(random_denoiser):
    inputs = conditions()
    eight = d.sample(random_denoiser, inputs, samples=8, generator=torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5)
    alone = torch.cat(
        [d.sample(random_denoiser, inputs, samples=1, generator=generator) for _ in range(8)]
    )
    assert (eight - alone).abs().max() < 1e-5
    for n in (1, 3):
        some = d.sample(
            random_denoiser, inputs, samples=n, generator=torch.Generator().manual_seed(5)
        )
        assert (some.mean(0) - eight[:n].mean(0)).abs().max() < 1e-5


def test_without_diffusion_noise_has_no_effect():
    config = dataclasses.replace(SMOKE, diffusion=False)
    denoiser = Matcher.build(config, seed=1).coarse
    nn.init.normal_(denoiser.unet.conv_out.weight, std=0.05)
    result = d.sample(denoiser, conditions(), samples=2)
    assert torch.equal(result[0], result[1])
    assert (result[0] - conditions().initial).abs().max() > 1e-3


def test_switches_of_the_configuration_change_outputs_and_inputs(features):
    inputs, noisy = conditions(), torch.randn(2, 2, 16, 16)
    bare = d.Denoiser(dataclasses.replace(SMOKE, residual=False))
    assert torch.count_nonzero(bare(noisy, 0, inputs)) == 0
    blind = dataclasses.replace(SMOKE, local=False)
    images = pictures(1)
    assert not coarse_conditions(blind, *features(images, images)).stack[:, :81].any()
    plain = dataclasses.replace(SMOKE, hints=False)
    assert coarse_conditions(plain, *features(images, images)).stack.shape == (1, 81, 16, 16)


def test_pixels_without_a_match_have_the_weight_invalid(random_denoiser):
    inputs = conditions()
    truth = inputs.initial + 0.1
    valid = torch.zeros(2, 1, 16, 16, dtype=torch.bool)
    valid[:, :, :, 4:] = True
    gradients = []
    for weight in (0.0, 0.1):
        expected = truth.clone().requires_grad_()
        generator = torch.Generator().manual_seed(0)
        loss = d.training_loss(Echo(), inputs, expected, valid, generator, invalid=weight)  # type: ignore[arg-type]
        loss.backward()
        gradients.append(expected.grad)
    assert torch.count_nonzero(gradients[0][..., :4]) == 0
    assert torch.count_nonzero(gradients[0][..., 4:]) == gradients[0][..., 4:].numel()
    ratio = gradients[1][..., :4].abs().mean() / gradients[1][..., 4:].abs().mean()
    assert ratio == pytest.approx(0.1, abs=0.005)


class Echo(nn.Module):
    """Returns the initial flow."""

    config = SMOKE

    def forward(self, noisy, level, inputs):
        return inputs.initial * self.config.flow_scale


def test_the_loss_equals_a_value_worked_by_hand():
    inputs = Conditions(torch.zeros(1, 2, 16, 16), torch.zeros(1, SMOKE.stack_channels, 16, 16))
    truth = torch.full((1, 2, 16, 16), 0.25)  # one, at scale 4
    generator = torch.Generator().manual_seed(0)
    loss = d.training_loss(Echo(), inputs, truth, torch.ones(1, 1, 16, 16), generator)  # type: ignore[arg-type]
    assert loss == pytest.approx((1 + 1e-4) ** 0.5)


def test_coarse_conditions_hold_flow_cost_and_hints(features):
    source, target = pictures(2), pictures(2, seed=1)
    inputs = coarse_conditions(SMOKE, *features(source, target))
    volume = correlation.global_cost(*(maps.coarse for maps in features(source, target)))
    assert torch.equal(inputs.initial, correlation.initial_flow(volume) / 16)
    assert inputs.stack.shape == (2, SMOKE.stack_channels, 16, 16)
    # the window's middle is the best cosine, for the initial flow points there
    assert (inputs.stack[:, 40] - inputs.stack[:, 81]).abs().max() < 1e-5
    assert (
        inputs.stack[:, 82] - torch.exp(-correlation.cycle_error(volume) / 2)[:, 0]
    ).abs().max() < 1e-6
    assert inputs.stack[0, 83, 0, 0] == -1
    assert inputs.stack[0, 84, -1, 3] == 1
    assert inputs.stack[0, 83, 5, -1] == 1


def test_fine_conditions_start_from_the_coarse_flow(features):
    source, target = pictures(1), pictures(1, seed=1)
    flow = torch.full((1, 2, 16, 16), 0.125)
    inputs = fine_conditions(SMOKE, *features(source, target), flow)
    assert (inputs.initial - 0.125).abs().max() < 1e-6
    assert inputs.initial.shape == (1, 2, 32, 32)
    a, b = (maps.fine for maps in features(source, target))
    window = correlation.local_cost(a, b, torch.full((1, 2, 32, 32), 4.0))
    assert (inputs.stack[:, :81] - window).abs().max() < 1e-5
    assert torch.equal(inputs.stack[:, 82], inputs.stack[:, 40])


def test_two_pairs_are_overfitted():
    error = overfit(SMOKE, pairs=2, steps=40, rate=3e-3)
    assert error < 0.5  # of the error of the initial flow


@pytest.mark.slow
def test_eight_pairs_are_overfitted_to_half_a_pixel():
    assert overfit(Config.tiny(), pairs=8, steps=600, rate=2e-3, pixels=True) < 0.5


def overfit(config, *, pairs, steps, rate, pixels=False):
    """Train on a few pairs of small rotations and shifts; return the error, as a fraction of the first or in pixels."""
    matcher = Matcher.build(config)
    matcher.backbone.load_state_dict(backbone.load().state_dict())
    source, g = pictures(pairs, config.image), config.image
    grid = flows.pixel_grid(g, g) - (g - 1) / 2
    angle = torch.linspace(-0.3, 0.3, pairs).view(-1, 1, 1)
    x = angle.cos() * grid[:, 0] - angle.sin() * grid[:, 1] + 6
    y = angle.sin() * grid[:, 0] + angle.cos() * grid[:, 1] - 4
    flow = torch.stack([x, y], 1) - grid
    truth = flows.resize(flow, (config.grid, config.grid))
    warped = flows.warp(source, flow)
    maps = [extract_features(matcher.backbone, config, x) for x in (source, warped)]
    inputs = coarse_conditions(config, *maps)
    valid = flows.inside(truth)
    truth = truth / config.grid
    optimiser = torch.optim.AdamW(matcher.coarse.parameters(), rate, weight_decay=0)
    plan = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        optimiser.zero_grad()
        d.training_loss(matcher.coarse, inputs, truth, valid, generator).backward()
        optimiser.step()
        plan.step()
    result = d.sample(matcher.coarse, inputs, samples=4).mean(0)
    error, first = ((x - truth).norm(dim=1)[valid[:, 0]].mean() for x in (result, inputs.initial))
    return float(error * g) if pixels else float(error / first)


def test_the_full_size_equals_the_papers():
    with torch.device("meta"):
        network = d.Denoiser(Config.full())
    assert network.unet.conv_in.in_channels == 85
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(121.15e6, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "coarse", "fine"), [("tiny", 3.51e6, 1.93e6), ("base", 23.1e6, 1.93e6)]
)
def test_parameter_counts_equal_the_documented_ones(name, coarse, fine):
    config = getattr(Config, name)()
    with torch.device("meta"):
        sizes = [
            sum(p.numel() for p in d.Denoiser(config, s).parameters()) for s in ("coarse", "fine")
        ]
    assert sizes == pytest.approx([coarse, fine], rel=0.02)


def test_samples_and_steps_out_of_range_raise(untrained):
    with pytest.raises(ValueError, match="`samples` must be at least 1, got 0"):
        d.sample(untrained.coarse, conditions(), samples=0)
    with pytest.raises(
        ValueError, match="`steps` must be 1 to 5, got 6: the matcher was trained with 5"
    ):
        d.sample(untrained.coarse, conditions(), steps=6)
