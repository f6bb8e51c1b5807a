"""Dense matching: flows, uncertainty, sizes, and arguments out of range."""

import json
import re
from dataclasses import replace
from pathlib import Path

import matchers
import numpy as np
import pytest
import torch
from matchers import texture
from PIL import Image
from torch.nn import functional as F

from overpaint import match, zoo
from overpaint.images.read import load_picture
from overpaint.match import flow as flows
from overpaint.match import matching, resampling
from overpaint.match.conditioning import coarse_conditions, extract_features, fine_conditions
from overpaint.match.denoiser import Denoiser, sample
from overpaint.match.optical_flow import refine

STAGES = ("coarse", "fine")
SHIPPED = (zoo.folder("matcher") / "config.json").is_file()


@pytest.fixture(scope="module")
def matcher():
    return matchers.build()


@pytest.fixture(scope="module")
def random_matcher():
    return matchers.build_random()


def _features(matcher, *images):
    return [extract_features(matcher.backbone, matcher.config, image) for image in images]


def middle(flow):
    """The median vector, away from the border."""
    return flow[:, 24:-24, 24:-24].flatten(1).median(1).values.tolist()


def test_equal_pictures_give_a_zero_flow(matcher):
    image = texture(128, 128)
    result = match.dense(image, image, matcher=matcher, samples=2)
    assert result.flow.abs().max() < 1e-4
    assert (result.warped - image).abs().max() < 1e-3
    assert result.inside[1:-1, 1:-1].all()
    assert result.std.max() == 0
    assert result.consistency is None


def test_the_flow_is_on_b_and_points_into_a(matcher):
    whole = texture(160, 160)
    a, b = whole[:, :128, :128], whole[:, 8:136, 16:144]  # b shows at p what a has at p + (16, 8)
    result = match.dense(a, b, matcher=matcher, samples=1, cycle=True)
    assert middle(result.flow) == pytest.approx([16, 8], abs=0.5)
    assert (result.warped - b)[:, 32:-48, 32:-48].abs().mean() < 0.02
    assert result.consistency is not None
    assert result.consistency[32:-48, 32:-48].median() < 1


def test_pictures_of_different_sizes_use_each_ones_pixels(matcher):
    a = texture(128, 128)
    b = F.interpolate(a[None], (64, 96), mode="bilinear", antialias=True)[0]
    result = match.dense(a, b, matcher=matcher, samples=1, refine=False)
    assert result.flow.shape == (2, 64, 96)
    assert result.std.shape == result.inside.shape == (64, 96)
    assert result.warped.shape == (3, 64, 96)
    places = flows.to_mapping(result.flow[None])
    grid = flows.pixel_grid(64, 96)
    expected = torch.stack([(grid[0, 0] + 0.5) * 128 / 96 - 0.5, (grid[0, 1] + 0.5) * 2 - 0.5])
    assert (places[0] - expected).norm(dim=0).median() < 1e-3
    assert result.protocol["source"] == (128, 128)
    assert result.protocol["target"] == (64, 96)


@pytest.mark.parametrize("size", [(37, 53), (640, 800), (8, 300)])
def test_any_size_gives_a_flow_of_that_size(matcher, size):
    result = match.dense(texture(100, 90), texture(*size), matcher=matcher, samples=1, steps=1)
    assert result.flow.shape == (2, *size)
    assert torch.isfinite(result.flow).all()


def test_every_type_of_input_gives_the_same_flow(matcher, tmp_path):
    image = texture(48, 40)
    rows = (image * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(rows).save(tmp_path / "a.png")
    forms = [
        tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(rows), rows,
        rows.astype(np.float64) / 255, torch.from_numpy(rows).permute(2, 0, 1),
        torch.from_numpy(rows).permute(2, 0, 1)[None] / 255,
    ]  # fmt: skip
    read = [load_picture(form, "image") for form in forms]
    assert all((other - read[0]).abs().max() < 1e-6 for other in read)
    assert read[0].shape == (1, 3, 48, 40)
    flows = [match.dense(f, image, matcher=matcher, samples=1, steps=1).flow for f in forms[:4]]
    assert all(torch.equal(flows[0], other) for other in flows)


def test_a_seed_fixes_the_flow_and_hypotheses_differ(random_matcher):
    a, b = texture(64, 64), texture(64, 64, seed=1)
    first, again, other = (
        match.dense(a, b, matcher=random_matcher, samples=3, seed=seed) for seed in (0, 0, 1)
    )
    assert torch.equal(first.flow, again.flow)
    assert torch.equal(first.std, again.std)
    assert (first.flow - other.flow).abs().max() > 0
    assert first.std.min() > 0
    assert match.dense(a, b, matcher=random_matcher, samples=1).std.max() == 0


def test_std_is_the_distance_of_refined_hypotheses_from_the_flow(random_matcher):
    a, b = texture(128, 128), texture(128, 128, seed=1)
    result = match.dense(a, b, matcher=random_matcher, samples=3)
    conditions = coarse_conditions(
        random_matcher.config, *_features(random_matcher, a[None], b[None])
    )
    squares = []
    for rows in sample(random_matcher.coarse, conditions, samples=3):
        start = F.interpolate(rows, (128, 128), mode="bilinear") * 128
        squares.append((refine(a[None], b[None], start) - result.flow) ** 2)
    expected = torch.cat(squares).mean(0).sum(0).sqrt()
    assert (result.std - expected).abs().max() < 1e-3


def test_std_is_in_pixels_of_image_a_along_each_axis(random_matcher, monkeypatch):
    for module, name in ((matching, "refine_flow"), (resampling, "refine")):
        monkeypatch.setattr(module, name, lambda source, target, flow: flow.clone())
    a, b = texture(400, 700), texture(600, 300, seed=1)
    result = match.dense(a, b, matcher=random_matcher, samples=3)
    side = random_matcher.config.image
    small = (
        F.interpolate(x[None], (side, side), mode="bilinear", antialias=True).clamp(0, 1)
        for x in (a, b)
    )
    conditions = coarse_conditions(random_matcher.config, *_features(random_matcher, *small))
    coarse = sample(random_matcher.coarse, conditions, samples=3)[:, 0]
    final = result.flow[None].clone()
    # Without the shift of one picture's pixels to the other's, over its sides, at most 256 pixels a side.
    for axis, (size, other) in enumerate(((700, 300), (400, 600))):
        pixel = torch.arange(other)
        shift = (pixel + 0.5) * size / other - 0.5 - pixel
        final[:, axis] -= shift if axis == 0 else shift[:, None]
        final[:, axis] /= size
    apart = F.interpolate(coarse, (256, 128), mode="bilinear") - F.interpolate(
        final, (256, 128), mode="bilinear"
    )
    squares = (apart * torch.tensor([700.0, 400.0]).view(1, 2, 1, 1)).square().sum(1).mean(0)
    expected = F.interpolate(squares[None, None], (600, 300), mode="bilinear")[0, 0].sqrt()
    assert result.std.median() > 1
    assert (result.std - expected).abs().max() < 0.01 * expected.max()


def test_hypotheses_too_small_to_refine_are_compared_unrefined(random_matcher):
    a, b = texture(20, 600), texture(22, 640, seed=1)
    result, plain = (
        match.dense(a, b, matcher=random_matcher, samples=2, refine=r) for r in (True, False)
    )
    assert torch.equal(result.std, plain.std)
    assert not torch.equal(result.flow, plain.flow)


def test_without_diffusion_std_is_zero(random_matcher):
    config = replace(random_matcher.config, diffusion=False)
    parts = [Denoiser(config, stage) for stage in STAGES]
    for part, other in zip(parts, (random_matcher.coarse, random_matcher.fine), strict=True):
        part.load_state_dict(other.state_dict())
    control = match.Matcher(random_matcher.backbone, *parts, config)
    a, b = texture(64, 64), texture(64, 64, seed=1)
    assert match.dense(a, b, matcher=control, samples=3).std.max() == 0


def test_without_refinement_std_is_that_of_both_stages_in_pixels(random_matcher):

    a, b = texture(128, 128), texture(128, 128, seed=1)
    result = match.dense(a, b, matcher=random_matcher, samples=4, refine=False)
    config, generator = random_matcher.config, torch.Generator().manual_seed(0)
    conditions = coarse_conditions(config, *_features(random_matcher, a[None], b[None]))
    coarse = sample(random_matcher.coarse, conditions, samples=4, generator=generator)
    conditions = fine_conditions(
        config, *_features(random_matcher, a[None], b[None]), coarse.mean(0)
    )
    fine = sample(random_matcher.fine, conditions, samples=4, generator=generator)
    flow = F.interpolate(fine.mean(0), (128, 128), mode="bilinear") * 128
    assert (result.flow - flow[0]).abs().max() < 1e-3
    total = fine.var(0) + F.interpolate(coarse.var(0), (32, 32), mode="bilinear")
    expected = F.interpolate(total, (128, 128), mode="bilinear").sum(1).sqrt()[0] * 128
    assert (result.std - expected).abs().max() < 1e-3


def test_without_the_fine_stage_the_coarse_flow_is_the_result(matcher):
    a, b = texture(64, 64), texture(64, 64, seed=1)
    alone = match.Matcher(matcher.backbone, matcher.coarse, None, matcher.config)
    result = match.dense(a, b, matcher=alone, samples=1)
    assert result.flow.shape == (2, 64, 64)
    assert torch.isfinite(result.flow).all()


def test_on_progress_counts_stages(matcher):
    a, calls = texture(64, 64), []
    match.dense(
        a, a, matcher=matcher, samples=1, steps=1, reinit=2, cycle=True,
        on_progress=lambda *call: calls.append(call),
    )  # fmt: skip
    assert calls == [(i, 8, "matching") for i in range(1, 9)]


def test_an_invalid_picture_is_named_in_the_error(matcher):
    a = texture(20, 20)
    for pair, name in (((7, a), "image_a"), ((a, 7), "image_b")):
        with pytest.raises(TypeError, match=f"`{name}` must be a path"):
            match.dense(*pair, matcher=matcher)


def test_reinit_of_an_untrained_matcher_changes_nothing(matcher):
    whole = texture(160, 160)
    a, b = whole[:, :128, :128], whole[:, 8:136, 16:144]
    once, twice = (match.dense(a, b, matcher=matcher, samples=1, reinit=n) for n in (0, 1))
    assert torch.equal(once.flow, twice.flow)


def test_a_picture_of_one_color_gives_a_large_std(matcher):
    for a, b in (
        (torch.full((3, 60, 80), 0.5), texture(60, 80)),
        (texture(60, 80), torch.zeros(3, 60, 80)),
    ):
        result = match.dense(a, b, matcher=matcher, samples=2)
        assert torch.isfinite(result.flow).all()
        assert result.std.min() == pytest.approx(100 / 12**0.5)


def test_arguments_out_of_range_raise(matcher):
    a = texture(20, 20)
    with pytest.raises(ValueError, match="`reinit` must be at least 0, got -1"):
        match.dense(a, a, matcher=matcher, reinit=-1)
    with pytest.raises(ValueError, match="`samples` must be at least 1, got 0"):
        match.dense(a, a, matcher=matcher, samples=0)
    with pytest.raises(ValueError, match="`steps` must be 1 to 5, got 9"):
        match.dense(a, a, matcher=matcher, steps=9)


@pytest.mark.skipif(not SHIPPED, reason="the matcher's weights are not there")
def test_the_shipped_matcher_gives_equal_pictures_a_small_flow():
    a = texture(320, 320)[:, 32:288, 32:288]
    same = match.dense(a, a, matcher=match.Matcher.load(), samples=2)
    assert same.flow.norm(dim=0).mean() < 0.5


@pytest.mark.skipif(not SHIPPED, reason="the matcher's weights are not there")
def test_the_shipped_matcher_is_consistent():
    whole = texture(320, 320)
    grid = flows.pixel_grid(256, 256)
    centre = grid - 127.5
    places = torch.cat(
        [
            0.95 * centre[:, :1] - 0.2 * centre[:, 1:] + 160,
            0.2 * centre[:, :1] + centre[:, 1:] + 158,
        ],
        1,
    )
    a, b = whole[:, 32:288, 32:288], flows.warp(whole[None], places - grid)[0]
    result = match.dense(a, b, matcher=match.Matcher.load(), samples=2, cycle=True)
    assert result.consistency is not None
    assert result.consistency[result.inside].median() < 2


@pytest.mark.skipif(not SHIPPED, reason="the matcher's weights are not there")
def test_the_guide_shows_the_errors_of_the_card():
    figures = json.loads((zoo.folder("matcher") / "card.json").read_text())["figures"]
    names = ("coarse_given", "coarse_steps_5", "fine_steps_5")
    initial, coarse, fine = (f"{figures[name]:.1f}" for name in names)
    guide = (Path(__file__).parent.parent / "docs" / "guides" / "match.md").read_text()
    order = f"{re.escape(initial)} pixels, the coarse flow [^.]*{re.escape(coarse)} and the fine [^.]*{re.escape(fine)}"
    assert re.search(order, " ".join(guide.split()))
