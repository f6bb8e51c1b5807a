"""Refinement of a flow: what is small is found, what is far is left, and sizes fit."""

import cv2
import pytest
import torch
from torch.nn import functional as F

from overpaint.match import flow as fields
from overpaint.match import resampling as sizes
from overpaint.match.optical_flow import FARTHEST, refined


def texture(h, w, seed=0):
    """A picture (1, 3, h, w) of blobs of a few sizes."""
    generator = torch.Generator().manual_seed(seed)
    sizes = ((h // s + 2, w // s + 2) for s in (4, 16))
    noise = (torch.rand(1, 3, *size, generator=generator) for size in sizes)
    parts = [F.interpolate(n, (h, w), mode="bicubic", align_corners=False) for n in noise]
    return torch.stack(parts).mean(0).clamp(0, 1)


def waves(h, w, reach):
    """A smooth flow of at most `reach` pixels, (1, 2, h, w)."""
    grid = fields.pixel_grid(h, w)
    return reach * torch.stack([torch.sin(grid[:, 1] / 25), torch.cos(grid[:, 0] / 30)], 1)


def errors(flow, truth):
    """End-point errors away from the border."""
    return (flow - truth).norm(dim=1)[:, 16:-16, 16:-16]


@pytest.mark.parametrize("start", ["nothing", "near"])
def test_what_cells_are_too_coarse_for_is_found(start):
    source, truth = texture(160, 200), waves(160, 200, 3.0)
    target = fields.warp(source, truth)
    given = torch.zeros_like(truth) if start == "nothing" else truth + waves(160, 200, 1.5).flip(3)
    found = refined(source, target, given)
    assert errors(given, truth).median() > 1
    assert errors(found, truth).median() < 0.15


def test_what_would_be_far_is_left_as_it_was():
    source, target = texture(160, 160), texture(160, 160, seed=1)
    given = waves(160, 160, 2.0)
    found = refined(source, target, given)
    moved = (found - given).norm(dim=1)
    assert (moved > 0).any()
    # A flow is read where the correction points to, which is as far away.
    assert moved.max() < 160 * FARTHEST * (1 + 2 / 25)


def test_one_thread_finds_what_all_do_and_their_number_stays():
    source = texture(160, 200)
    target = fields.warp(source, waves(160, 200, 3.0))
    before, flow = cv2.getNumThreads(), torch.zeros(1, 2, 160, 200)
    try:
        cv2.setNumThreads(4)
        found = refined(source, target, flow)
        assert cv2.getNumThreads() == 4
        cv2.setNumThreads(1)
        assert torch.equal(refined(source, target, flow), found)
    finally:
        cv2.setNumThreads(before)


def test_pictures_of_a_few_pixels_are_left_alone():
    flow = torch.randn(1, 2, 15, 40)
    assert refined(texture(20, 20), texture(15, 40), flow) is flow


def test_shares_of_the_sides_are_pixels_again():
    flow = 9 * torch.randn(1, 2, 30, 44)
    shares = sizes._shares(flow, (77, 51))
    assert torch.allclose(sizes.enlarged(shares, (77, 51), (30, 44), False), flow, atol=1e-4)


def test_a_large_picture_is_refined_small():
    source = texture(1300, 1100)
    truth = waves(1400, 1200, 6.0) - 20
    target = fields.warp(source, truth)
    pictures = sizes.reduced(source, target, 1024)
    assert [tuple(x.shape[2:]) for x in pictures] == [(1024, 866), (1024, 878)]
    coarse = sizes._shares(truth, (1300, 1100))
    coarse = F.interpolate(coarse, (16, 16), mode="bilinear", antialias=True, align_corners=False)
    given = sizes.enlarged(coarse, (1300, 1100), (1400, 1200), False)
    near = sizes.Refined.of(coarse, False, *pictures)
    assert near is not None
    found = near.at((1300, 1100), (1400, 1200))
    assert found.shape == truth.shape
    assert errors(given, truth).median() > 2
    assert errors(found, truth).median() < 0.5


def test_a_long_thin_picture_is_not_brought_through_a_small_one():
    pictures = sizes.reduced(texture(40, 3000), texture(40, 3000, seed=1), 1024)
    assert min(pictures[0].shape[2:]) < 16
    coarse = 0.02 * torch.randn(1, 2, 64, 64, generator=torch.Generator().manual_seed(0))
    assert sizes.Refined.of(coarse, False, *pictures) is None
