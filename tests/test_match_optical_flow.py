"""Refinement by optical flow: small motions are corrected, large ones ignored."""

import cv2
import pytest
import torch
from matchers import texture

from overpaint.match import flow as flows
from overpaint.match.optical_flow import MAX_CORRECTION, refine


def texture_batch(h, w, seed=0):
    return texture(h, w, seed)[None]


def waves(h, w, reach):
    """A smooth flow of at most `reach` pixels, (1, 2, h, w)."""
    grid = flows.pixel_grid(h, w)
    return reach * torch.stack([torch.sin(grid[:, 1] / 25), torch.cos(grid[:, 0] / 30)], 1)


def errors(flow, truth):
    """End-point errors away from the border."""
    return (flow - truth).norm(dim=1)[:, 16:-16, 16:-16]


@pytest.mark.parametrize("first", ["zero", "near"])
def test_small_motions_are_corrected(first):
    source, truth = texture_batch(160, 200), waves(160, 200, 3.0)
    target = flows.warp(source, truth)
    start = torch.zeros_like(truth) if first == "zero" else truth + waves(160, 200, 1.5).flip(3)
    result = refine(source, target, start)
    assert errors(start, truth).median() > 1
    assert errors(result, truth).median() < 0.15


def test_corrections_beyond_the_limit_are_ignored():
    source, target = texture_batch(160, 160), texture_batch(160, 160, seed=1)
    start = waves(160, 160, 2.0)
    result = refine(source, target, start)
    moved = (result - start).norm(dim=1)
    assert (moved > 0).any()
    # The flow is read at the corrected point, which is up to that far away.
    assert moved.max() < 160 * MAX_CORRECTION * (1 + 2 / 25)


def test_the_result_and_opencvs_number_of_threads_do_not_depend_on_each_other():
    source = texture_batch(160, 200)
    target = flows.warp(source, waves(160, 200, 3.0))
    before, flow = cv2.getNumThreads(), torch.zeros(1, 2, 160, 200)
    try:
        cv2.setNumThreads(4)
        result = refine(source, target, flow)
        assert cv2.getNumThreads() == 4
        cv2.setNumThreads(1)
        assert torch.equal(refine(source, target, flow), result)
    finally:
        cv2.setNumThreads(before)


def test_pictures_of_a_few_pixels_return_the_flow_itself():
    flow = torch.randn(1, 2, 15, 40)
    assert refine(texture_batch(20, 20), texture_batch(15, 40), flow) is flow
