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


@pytest.mark.parametrize("n", [1, 2, 5, 24, 300])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_a_share_of_0_or_1_has_the_exact_interval_of_scipy(n, confidence):
    for hits in (0, n):
        ours = metrics.share([hits > 0] * n, confidence=confidence)
        exact = stats.binomtest(hits, n).proportion_ci(confidence, method="exact")
        assert (ours.low, ours.high) == pytest.approx((exact.low, exact.high), abs=1e-12)
        assert (ours.mean, ours.n) == (hits / n, n)


def test_0_of_24_is_at_most_14_per_cent():
    interval = metrics.share([0] * 24)
    assert (interval.mean, interval.low, interval.n) == (0, 0, 24)
    assert interval.high == pytest.approx(1 - 0.025 ** (1 / 24), abs=1e-12)  # 0.1425, by hand
    assert round(interval.high, 4) == 0.1425
    flipped = metrics.share([1] * 24)
    assert (flipped.low, flipped.high) == (pytest.approx(1 - interval.high), 1)


def test_the_trials_are_the_independent_units_not_the_pictures():
    alone = metrics.share([0] * 6)
    assert metrics.share([0] * 24, groups=[i // 4 for i in range(24)]).high == alone.high
    # sizes 3, 1, 1: 25 / 11 effective units
    unequal = metrics.share([0] * 5, groups="aaabc")
    assert unequal.high == pytest.approx(1 - 0.025 ** (11 / 25))
    assert metrics.share([0, 0, 1], groups="aaa").high > 0.9  # one unit shows nothing


def test_other_shares_keep_the_bootstrap_interval():
    values, groups = [0, 1, 1, 0, 1, 0], "aabbcd"
    assert metrics.share(values, groups=groups) == metrics.bootstrap(values, groups=groups)
    before = [1, 1, 1, 0, 1, 0]
    assert metrics.paired_share(before, values, groups=groups) == metrics.paired(
        before, values, groups=groups
    )
    assert metrics.share([]).n == metrics.paired_share([], []).n == 0


def test_an_equal_change_of_all_pictures_has_an_interval_too():
    bound = 1 - 0.025 ** (1 / 24)
    none = metrics.paired_share([1, 0] * 12, [1, 0] * 12)
    assert (none.mean, none.low, none.high) == (0, pytest.approx(-bound), pytest.approx(bound))
    lost = metrics.paired_share([1] * 24, [0] * 24)
    assert (lost.mean, lost.low, lost.high) == (-1, -1, pytest.approx(2 * bound - 1))
    gained = metrics.paired_share([0] * 24, [1] * 24)
    assert (gained.low, gained.high) == (pytest.approx(1 - 2 * bound), 1)


def test_the_coverage_at_the_ends_is_at_least_the_confidence():
    rng = np.random.default_rng(0)
    for rate in (0.0, 0.01, 0.99, 1.0):
        shares = [metrics.share(rng.random(20) < rate, resamples=200) for _ in range(200)]
        ends = [i for i in shares if i.mean in (0, 1)]
        assert np.mean([i.low <= rate <= i.high for i in ends]) >= 0.95


def test_values_that_are_no_shares_are_refused():
    with pytest.raises(ValueError, match=r"must lie between 0 and 1, got 0 to 2: use `bootstrap`"):
        metrics.share([0, 2])
    with pytest.raises(ValueError, match=r"must lie between -1 and 1, got 3 to 3: use `paired`"):
        metrics.paired_share([0], [3])
