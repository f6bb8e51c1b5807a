"""Flows between resolutions: relative and in pixels, at full and reduced size."""

import torch
from test_match_optical_flow import errors, texture_batch, waves
from torch.nn import functional as F

from overpaint.match import flow as flows
from overpaint.match import resampling


def test_to_relative_and_to_pixels_are_inverse():
    flow = 9 * torch.randn(1, 2, 30, 44)
    relative = resampling._to_relative(flow, (77, 51))
    assert torch.allclose(
        resampling.to_pixels(relative, (77, 51), (30, 44), False), flow, atol=1e-4
    )


def test_a_large_picture_is_refined_at_a_reduced_size():
    source = texture_batch(650, 550)
    truth = waves(700, 600, 6.0) - 10
    target = flows.warp(source, truth)
    pictures = resampling.reduce(source, target, 512)
    assert [tuple(x.shape[2:]) for x in pictures] == [(512, 433), (512, 439)]
    coarse = resampling._to_relative(truth, (650, 550))
    coarse = F.interpolate(coarse, (12, 12), mode="bilinear", antialias=True, align_corners=False)
    start = resampling.to_pixels(coarse, (650, 550), (700, 600), False)
    refined = resampling.RefinedFlow.compute(coarse, False, *pictures)
    assert refined is not None
    result = refined.resize((650, 550), (700, 600))
    assert result.shape == truth.shape
    assert errors(start, truth).median() > 2
    assert errors(result, truth).median() < 0.5


def test_a_picture_too_thin_after_reduction_is_not_refined():
    pictures = resampling.reduce(texture_batch(40, 3000), texture_batch(40, 3000, seed=1), 1024)
    assert min(pictures[0].shape[2:]) < 16
    coarse = 0.02 * torch.randn(1, 2, 64, 64, generator=torch.Generator().manual_seed(0))
    assert resampling.RefinedFlow.compute(coarse, False, *pictures) is None
