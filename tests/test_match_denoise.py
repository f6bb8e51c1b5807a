"""The denoiser of flows: noise levels and sampler against diffusers, laws of the loss, and that it can learn."""

import dataclasses

import pytest
import torch
from torch import nn

from overpaint.match import correlation
from overpaint.match import denoiser as d
from overpaint.match import flow as fields
from overpaint.match.config import Matcher

SMOKE = d.Config.smoke()


@pytest.fixture(scope="module")
def untrained():
    return Matcher.build(SMOKE)


@pytest.fixture(scope="module")
def rough():
    """A denoiser with weights in its last layer too, so that noise shows in what it draws."""
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
    return d.Conditions(initial, torch.rand(count, SMOKE.stacked, side, side, generator=generator))


class Oracle(nn.Module):
    """Knows the answer, whatever the noise."""

    def __init__(self, truth, config=SMOKE):
        super().__init__()
        self.truth, self.config = truth, config

    def forward(self, noisy, level, told):
        copies = len(noisy) // len(self.truth)
        return (self.truth * self.config.flow_scale).repeat(copies, 1, 1, 1)


def test_noise_levels_are_the_papers():
    wanted = torch.tensor([0.898706, 0.647478, 0.340810, 0.094046, 0.000094]).double()
    assert (d.alpha_bar(5) - wanted).abs().max() < 1e-5


@pytest.mark.parametrize("steps", [1, 5])
def test_sampling_is_diffusers_ddim(rough, steps):
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        num_train_timesteps=5, beta_schedule="squaredcos_cap_v2", prediction_type="sample",
        clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing",
    )  # fmt: skip
    scheduler.set_timesteps(steps)
    told = conditions(1)
    noisy = torch.randn(told.initial.shape, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        for level in scheduler.timesteps.tolist():
            noisy = scheduler.step(rough(noisy, level, told), level, noisy).prev_sample
    generator = torch.Generator().manual_seed(7)
    ours = d.sample(rough, told, samples=1, steps=steps, generator=generator)[0]
    assert (ours - noisy / SMOKE.flow_scale).abs().max() < 1e-6


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5])
def test_what_knows_the_answer_gives_it_in_any_number_of_steps(steps):
    told = conditions()
    truth = torch.rand_like(told.initial) - 0.5
    found = d.sample(Oracle(truth), told, samples=3, steps=steps)  # type: ignore[arg-type]
    assert (found - truth).abs().max() < 1e-6
    levels = d.levels(5, steps)
    assert levels[0] == 4
    assert len(set(levels)) == steps
    assert levels == sorted(levels, reverse=True)


def test_an_untrained_one_gives_the_initial_flow_exactly(untrained):
    told = conditions()
    for samples, steps, seed in ((1, 5, 0), (3, 1, 1), (2, 3, 2)):
        generator = torch.Generator().manual_seed(seed)
        found = d.sample(untrained.coarse, told, samples=samples, steps=steps, generator=generator)
        assert found.shape == (samples, 2, 2, 16, 16)
        assert torch.equal(found, told.initial.expand_as(found))


def test_a_seed_gives_one_draw_and_another_seed_another(rough):
    told = conditions()
    first, again, other = (
        d.sample(rough, told, samples=2, generator=torch.Generator().manual_seed(seed))
        for seed in (3, 3, 4)
    )
    assert torch.equal(first, again)
    assert (first - other).abs().max() > 1e-4
    assert first.std(0).min() > 0


def test_hypotheses_are_those_of_single_draws(rough):
    told = conditions()
    eight = d.sample(rough, told, samples=8, generator=torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5)
    alone = torch.cat([d.sample(rough, told, samples=1, generator=generator) for _ in range(8)])
    assert (eight - alone).abs().max() < 1e-5
    for n in (1, 3):
        some = d.sample(rough, told, samples=n, generator=torch.Generator().manual_seed(5))
        assert (some.mean(0) - eight[:n].mean(0)).abs().max() < 1e-5


def test_without_diffusion_noise_is_not_seen():
    config = dataclasses.replace(SMOKE, diffusion=False)
    denoiser = Matcher.build(config, seed=1).coarse
    nn.init.normal_(denoiser.unet.conv_out.weight, std=0.05)
    found = d.sample(denoiser, conditions(), samples=2)
    assert torch.equal(found[0], found[1])
    assert (found[0] - conditions().initial).abs().max() > 1e-3


def test_switches_change_what_is_answered_and_seen(rough):
    told, noisy = conditions(), torch.randn(2, 2, 16, 16)
    bare = d.Denoiser(dataclasses.replace(SMOKE, residual=False))
    assert torch.count_nonzero(bare(noisy, 0, told)) == 0
    backbone = Matcher.build(SMOKE).backbone
    blind = dataclasses.replace(SMOKE, local=False)
    images = pictures(1)
    assert not d.coarse_conditions(backbone, blind, images, images).stack[:, :81].any()
    plain = dataclasses.replace(SMOKE, hints=False)
    assert d.coarse_conditions(backbone, plain, images, images).stack.shape == (1, 81, 16, 16)


def test_places_without_a_match_are_ignored_at_weight_0(rough):
    told = conditions()
    truth = told.initial + 0.1
    valid = torch.zeros(2, 1, 16, 16, dtype=torch.bool)
    valid[:, :, :, 4:] = True
    gradients = []
    for weight in (0.0, 0.1):
        wanted = truth.clone().requires_grad_()
        generator = torch.Generator().manual_seed(0)
        loss = d.training_loss(Echo(), told, wanted, valid, generator, invalid=weight)  # type: ignore[arg-type]
        loss.backward()
        gradients.append(wanted.grad)
    assert torch.count_nonzero(gradients[0][..., :4]) == 0
    assert torch.count_nonzero(gradients[0][..., 4:]) == gradients[0][..., 4:].numel()
    ratio = gradients[1][..., :4].abs().mean() / gradients[1][..., 4:].abs().mean()
    assert ratio == pytest.approx(0.1, abs=0.005)


class Echo(nn.Module):
    """Answers with the initial flow."""

    config = SMOKE

    def forward(self, noisy, level, told):
        return told.initial * self.config.flow_scale


def test_the_loss_is_that_worked_by_hand():
    told = d.Conditions(torch.zeros(1, 2, 16, 16), torch.zeros(1, SMOKE.stacked, 16, 16))
    truth = torch.full((1, 2, 16, 16), 0.25)  # one, at scale 4
    generator = torch.Generator().manual_seed(0)
    loss = d.training_loss(Echo(), told, truth, torch.ones(1, 1, 16, 16), generator)  # type: ignore[arg-type]
    assert loss == pytest.approx((1 + 1e-4) ** 0.5)


def test_conditions_hold_what_they_say(untrained):
    source, target = pictures(2), pictures(2, seed=1)
    told = d.coarse_conditions(untrained.backbone, SMOKE, source, target)
    features = [d.describe(untrained.backbone, SMOKE, x).coarse for x in (source, target)]
    volume = correlation.global_cost(*features)
    assert torch.equal(told.initial, correlation.initial_flow(volume) / 16)
    assert told.stack.shape == (2, SMOKE.stacked, 16, 16)
    # the window's middle is the best cosine, for the initial flow points there
    assert (told.stack[:, 40] - told.stack[:, 81]).abs().max() < 1e-5
    assert (
        told.stack[:, 82] - torch.exp(-correlation.cycle_error(volume) / 2)[:, 0]
    ).abs().max() < 1e-6
    assert told.stack[0, 83, 0, 0] == -1
    assert told.stack[0, 84, -1, 3] == 1
    assert told.stack[0, 83, 5, -1] == 1


def test_the_fine_stage_starts_from_the_coarse_flow(untrained):
    source, target = pictures(1), pictures(1, seed=1)
    flow = torch.full((1, 2, 16, 16), 0.125)
    told = d.fine_conditions(untrained.backbone, SMOKE, source, target, flow)
    assert (told.initial - 0.125).abs().max() < 1e-6
    assert told.initial.shape == (1, 2, 32, 32)
    a, b = (d.describe(untrained.backbone, SMOKE, x).fine for x in (source, target))
    window = correlation.local_cost(a, b, torch.full((1, 2, 32, 32), 4.0))
    assert (told.stack[:, :81] - window).abs().max() < 1e-5
    assert torch.equal(told.stack[:, 82], told.stack[:, 40])


def test_two_pairs_are_learnt_by_heart():
    error = overfit(SMOKE, pairs=2, steps=40, rate=3e-3)
    assert error < 0.5  # of the error of the initial flow


@pytest.mark.slow
def test_eight_pairs_are_learnt_to_half_a_pixel():
    assert overfit(d.Config.tiny(), pairs=8, steps=600, rate=2e-3, pixels=True) < 0.5


def overfit(config, *, pairs, steps, rate, pixels=False):
    """Train on a few pairs of small rotations and shifts; return the error that is left, as a share or in pixels."""
    matcher = Matcher.build(config)
    from overpaint.match import backbone

    matcher.backbone.load_state_dict(backbone.load().state_dict())
    source, g = pictures(pairs, config.image), config.image
    grid = fields.pixel_grid(g, g) - (g - 1) / 2
    angle = torch.linspace(-0.3, 0.3, pairs).view(-1, 1, 1)
    x = angle.cos() * grid[:, 0] - angle.sin() * grid[:, 1] + 6
    y = angle.sin() * grid[:, 0] + angle.cos() * grid[:, 1] - 4
    flow = torch.stack([x, y], 1) - grid
    truth = fields.resize(flow, (config.grid, config.grid))
    told = d.coarse_conditions(matcher.backbone, config, source, fields.warp(source, flow))
    valid = fields.inside(truth)
    truth = truth / config.grid
    optimiser = torch.optim.AdamW(matcher.coarse.parameters(), rate, weight_decay=0)
    plan = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        optimiser.zero_grad()
        d.training_loss(matcher.coarse, told, truth, valid, generator).backward()
        optimiser.step()
        plan.step()
    found = d.sample(matcher.coarse, told, samples=4).mean(0)
    left, first = ((x - truth).norm(dim=1)[valid[:, 0]].mean() for x in (found, told.initial))
    return float(left * g) if pixels else float(left / first)


def test_the_papers_size_is_the_papers():
    with torch.device("meta"):
        network = d.Denoiser(d.Config.full())
    assert network.unet.conv_in.in_channels == 85
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(121.15e6, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "coarse", "fine"), [("tiny", 3.51e6, 1.93e6), ("base", 23.1e6, 1.93e6)]
)
def test_sizes_are_those_of_the_documentation(name, coarse, fine):
    config = getattr(d.Config, name)()
    with torch.device("meta"):
        sizes = [
            sum(p.numel() for p in d.Denoiser(config, s).parameters()) for s in ("coarse", "fine")
        ]
    assert sizes == pytest.approx([coarse, fine], rel=0.02)


def test_samples_and_steps_out_of_range_are_refused(untrained):
    with pytest.raises(ValueError, match="`samples` must be at least 1, got 0"):
        d.sample(untrained.coarse, conditions(), samples=0)
    with pytest.raises(ValueError, match="`steps` must be 1 to 5, got 6: the matcher knows 5"):
        d.sample(untrained.coarse, conditions(), steps=6)
