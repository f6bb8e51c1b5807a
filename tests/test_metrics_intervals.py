import numpy as np
import pytest
from scipy import stats

from overpaint import metrics


def test_bootstrap_agrees_with_scipy():
    values = np.random.default_rng(3).normal(size=60)
    ours = metrics.bootstrap(values, resamples=4000)
    theirs = stats.bootstrap((values,), np.mean, method="percentile", rng=1).confidence_interval
    assert ours.mean == pytest.approx(values.mean())
    assert ours.low == pytest.approx(theirs.low, abs=0.02)
    assert ours.high == pytest.approx(theirs.high, abs=0.02)
    assert ours.n == 60


def test_the_coverage_of_the_interval_is_its_confidence():
    rng = np.random.default_rng(0)
    intervals = [metrics.bootstrap(rng.random(80) < 0.3, resamples=400) for _ in range(200)]
    covered = np.mean([i.low <= 0.3 <= i.high for i in intervals])
    assert 0.90 <= covered <= 0.99


def test_paired_cancels_common_variation():
    rng = np.random.default_rng(0)
    shared = rng.normal(scale=10, size=50)
    difference = metrics.paired(shared, shared + 1)
    assert difference.low == pytest.approx(1)
    assert difference.high == pytest.approx(1)


def test_groups_widen_the_interval():
    values = np.repeat(np.random.default_rng(1).random(10) < 0.5, 10)
    alone = metrics.bootstrap(values)
    grouped = metrics.bootstrap(values, groups=[f"prompt {i // 10}" for i in range(100)])
    assert grouped.mean == alone.mean
    assert grouped.high - grouped.low > 2 * (alone.high - alone.low)


def test_a_seed_determines_the_interval_and_no_values_give_nan():
    values = [0, 1, 1, 0, 1]
    assert metrics.bootstrap(values, seed=5) == metrics.bootstrap(values, seed=5)
    assert metrics.bootstrap([]).n == 0
    assert np.isnan(metrics.bootstrap([]).mean)


def test_interval_as_text():
    assert str(metrics.Interval(0.5, 0.25, 0.75, 8)) == "0.50 [0.25, 0.75]"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.bootstrap([[1.0]]), r"one row of finite numbers, got shape \(1, 1\)"),
        (lambda: metrics.bootstrap([float("nan")]), "one row of finite numbers"),
        (lambda: metrics.bootstrap([1.0], confidence=95), "between 0 and 1, got 95"),
        (
            lambda: metrics.bootstrap([1.0], groups="ab"),
            "one group for each value, got 2 for 1 values",
        ),
        (lambda: metrics.paired([1.0], [1.0, 2.0]), "same prompts and seeds"),
    ],
)
def test_bad_arguments_raise(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_spearman_equals_scipy_with_and_without_ties():
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = rng.integers(0, 6, size=(2, 25)).astype(float)
        assert metrics.spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)
    a = rng.normal(size=30)
    assert metrics.spearman(a, np.exp(a)) == pytest.approx(1)
    assert metrics.spearman(a, -a) == pytest.approx(-1)


def test_spearman_of_constant_or_short_rows_is_nan():
    assert np.isnan(metrics.spearman([1.0, 1.0], [1.0, 2.0]))
    assert np.isnan(metrics.spearman([1.0], [1.0]))
    for a, b in (([1.0], [1.0, 2.0]), ([1.0, np.nan], [1.0, 2.0])):
        with pytest.raises(ValueError, match="must be finite rows of one length, got shapes"):
            metrics.spearman(a, b)
