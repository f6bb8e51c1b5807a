"""Metrics of flow compared with values by hand, scipy and plain loops."""

import numpy as np
import pytest
import torch
from scipy import stats

from overpaint import metrics
from overpaint.metrics import matching


def test_epe_and_pck_equal_values_by_hand():
    truth = torch.zeros(2, 2, 2, 2)
    flow = truth.clone()
    flow[0, :, 0, 0] = torch.tensor([3.0, 4.0])
    flow[1, 0] = 1.0
    assert metrics.epe(flow, truth).tolist() == [1.25, 1.0]
    assert metrics.pck(flow, truth, 1).tolist() == [0.75, 1.0]
    assert metrics.pck(flow, truth, 0.5).tolist() == [0.75, 0.0]
    valid = torch.zeros(2, 1, 2, 2, dtype=torch.bool)
    valid[0, 0, 0] = True
    assert metrics.epe(flow, truth, valid)[0] == 2.5
    assert torch.isnan(metrics.epe(flow, truth, valid)[1])


def test_spearman_equals_scipy():
    error, std = torch.rand(3, 1, 8, 9), torch.rand(3, 1, 8, 9).round(decimals=1)
    correlations = matching.spearman(std, error)
    for ours, s, e in zip(correlations, std, error, strict=True):
        assert ours == pytest.approx(stats.spearmanr(s.flatten(), e.flatten()).statistic)
    assert torch.isnan(matching.spearman(torch.ones(1, 4, 4), torch.rand(1, 4, 4)))


def test_ause_equals_a_loop():
    error, std = torch.rand(2, 5, 5).double(), torch.rand(2, 5, 5).double()
    for ours, s, e in zip(metrics.ause(std, error), std.numpy(), error.numpy(), strict=True):
        s, e = s.ravel(), e.ravel()
        gaps = [e[np.argsort(s)[:k]].mean() - np.sort(e)[:k].mean() for k in range(1, e.size + 1)]
        assert ours == pytest.approx(np.mean(gaps) / e.mean())


def test_ause_is_zero_for_the_best_order_and_largest_for_the_worst():
    error = torch.rand(1, 20, 20)
    best, none, worst = (
        metrics.ause(std, error).item() for std in (error**3, torch.rand(1, 20, 20), -error)
    )
    assert best == 0
    assert 0.3 < none < worst
    assert metrics.ause(error, torch.zeros(1, 20, 20)).item() == 0


def test_shapes_that_differ_raise():
    with pytest.raises(ValueError, match=r"share a shape \(B, 2, H, W\), got .* resize one"):
        metrics.epe(torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 8, 8))
    with pytest.raises(ValueError, match="cover the same pixels, got .* resize them"):
        metrics.ause(torch.zeros(1, 4, 4), torch.zeros(1, 5, 5))
