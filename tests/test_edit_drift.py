"""The two measures of drift: values worked by hand, and that the reports use them."""

import pytest
import torch

from overpaint import edit
from overpaint.edit.drift import feature_drift, weight_drift

DELTA = torch.tensor([[3.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
INPUTS = torch.tensor([[1.0, 0.0], [2.0, 1.0]], dtype=torch.float64)


def test_feature_drift_is_the_root_mean_square_over_prompts():
    before = torch.zeros(2, 1, 2)
    after = torch.tensor([[[3.0, 4.0]], [[0.0, 1.0]]])  # squared movements 25 and 1
    assert feature_drift(before, after) == pytest.approx(13**0.5)
    assert feature_drift(before, after, relative_to=2.0) == pytest.approx(13**0.5 / 2)
    reference = torch.tensor([[[2.0, 0.0]]])
    assert feature_drift(before, after, relative_to=reference) == pytest.approx(13**0.5 / 2)


def test_weight_drift_is_a_frobenius_norm():
    assert weight_drift(DELTA) == pytest.approx(5.0)
    assert weight_drift(DELTA, relative_to=torch.eye(2).double()) == pytest.approx(5 / 2**0.5)
    outputs = 3.0**2 + 6.0**2 + 4.0**2
    assert weight_drift(DELTA, inputs=INPUTS) == pytest.approx(outputs**0.5)
    assert weight_drift(DELTA, gram=INPUTS.T @ INPUTS) == pytest.approx(outputs**0.5)
    relative = weight_drift(DELTA, inputs=INPUTS, relative_to=2 * DELTA)
    assert relative == pytest.approx(0.5)


def test_a_reference_of_zero_gives_zero():
    zeros = torch.zeros(1, 1, 2)
    assert feature_drift(zeros, zeros + 1, relative_to=zeros) == 0.0
    assert weight_drift(DELTA, relative_to=torch.zeros(2, 2)) == 0.0


def test_the_report_of_quickfix_has_both(tiny_sd1):
    change = edit.quickfix(tiny_sd1, {"van gogh": "painting"}, preserve=["a cat"])
    weight = edit.weights.find_weight(tiny_sd1, change.site).parameter.detach().double()
    expected = weight_drift(change.delta, relative_to=weight)
    assert change.report["relative_delta_norm"] == pytest.approx(expected, rel=1e-12)
    ids = tiny_sd1.tokenize(["a cat"])
    inputs = edit.captions.layer_inputs(tiny_sd1, change.site, ids).flatten(0, 1).double()
    expected = weight_drift(change.delta, inputs=inputs, relative_to=weight)
    assert change.report["preserve_drift"] == pytest.approx(expected, rel=1e-12)
