"""Letter widths: shares, edges, features of columns, bias of the attention and the losses."""

import math

import torch

from overpaint.scene_text.layout import (
    Edges,
    LayoutHead,
    coverage_bias,
    edges_from_logits,
    geometry,
    layout_loss,
    letter_features,
)

VALID = torch.tensor([[1.0, 1.0, 0.0]])
EDGES = Edges(torch.tensor([[8.0, 16.0, 0.0]]), torch.tensor([[16.0, 40.0, 0.0]]), VALID)


def logits() -> torch.Tensor:
    """Widths of 1 and 3 heights, and padding."""
    return torch.tensor([[0.0, math.log(3.0), -1e4]])


def test_letters_share_the_width_and_pads_get_none():
    edges = edges_from_logits(logits(), VALID, torch.tensor([10.0]), torch.tensor([50.0]))
    assert torch.allclose(edges.left[:, :2], torch.tensor([[10.0, 20.0]]))
    assert torch.allclose(edges.right[:, :2], torch.tensor([[20.0, 50.0]]))


def test_the_losses_are_zero_at_the_truth_and_positive_elsewhere():
    height = torch.tensor([8.0])
    divergence, difference = layout_loss(logits(), EDGES, height)  # widths 8 and 24 in heights of 8
    assert abs(float(divergence)) < 1e-5 and abs(float(difference)) < 1e-5
    other, wider = layout_loss(torch.tensor([[1.0, 1.0, -1e4]]), EDGES, height)
    by_hand = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert math.isclose(float(other), by_hand, rel_tol=1e-4)
    assert math.isclose(float(wider), abs(1 + math.log(2) - math.log(4)), rel_tol=1e-4)


def test_the_head_gives_padding_no_width_and_reads_the_instruction():
    torch.manual_seed(0)
    head = LayoutHead(4, 3)
    tokens, pooled = torch.randn(1, 3, 4), torch.randn(1, 3)
    first = head(tokens, pooled, VALID)
    assert first[0, 2] == -1e4 and torch.isfinite(first[0, :2]).all()
    assert not torch.equal(first[0, :2], head(tokens, pooled + 1, VALID)[0, :2])


def test_the_bias_is_the_logarithm_of_the_covered_share():
    bias = coverage_bias(EDGES, 4, 64)  # columns of 16 pixels
    cover = bias.exp() - 1e-3
    expected = torch.tensor([[0.5, 0, 0.5], [0, 1, 0], [0, 0.5, 0.5], [0, 0, 1]])
    assert torch.allclose(cover[0], expected, atol=1e-5)


def test_features_name_the_letter_and_the_place_within_it():
    embeddings = torch.eye(3)[None]
    features = letter_features(EDGES, embeddings, 8, 1, 64)[0].T  # points at 4, 12, 20, ... pixels
    assert torch.allclose(features[1, :3], torch.tensor([1.0, 0, 0]), atol=1e-3)
    assert torch.allclose(features[3, :3], torch.tensor([0, 1.0, 0]), atol=1e-3)
    assert features[0].abs().max() < 1e-2 and features[6].abs().max() < 1e-2
    place = features[:, 3]
    assert math.isclose(float(place[1]), 0.0, abs_tol=1e-3)  # the middle of the first letter
    assert math.isclose(float(place[2]), 2 * 4 / 24 - 1, abs_tol=1e-3)
    assert math.isclose(float(features[3, 8]), 24 / 16, abs_tol=1e-3)


def test_geometry_is_zero_for_padding_and_moves_with_the_edges():
    shape = geometry(EDGES, 64)
    assert shape.shape == (1, 3, 18) and not shape[0, 2].any()
    assert math.isclose(float(shape[0, 1, 0]), 16 / 64) and math.isclose(
        float(shape[0, 1, 3]), 24 / 16
    )
