"""KID and FID compared with torchmetrics, scipy and plain loops; error rates of the permutation test."""

import numpy as np
import pytest
import torch
from scipy import linalg

from overpaint import metrics


def draw(n, *, shift=0.0, width=6, seed=0):
    return np.random.default_rng(seed).normal(size=(n, width)) + shift


def kid_by_hand(a, b):
    """The unbiased estimate as a loop over pairs."""

    def k(x, y):
        return (float(x @ y) / len(x) + 1) ** 3

    within = [
        np.mean([k(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j])
        for x in (a, b)
    ]
    return sum(within) - 2 * np.mean([k(x, y) for x in a for y in b])


def test_kid_equals_a_loop_over_pairs():
    a, b = draw(9), draw(7, shift=0.5, seed=1)
    result = metrics.kid(a, torch.tensor(b))
    assert result.value == pytest.approx(kid_by_hand(a, b), abs=1e-9)
    assert (result.n_a, result.n_b, result.subset_size, result.subset_std) == (9, 7, 7, 0)


def test_kid_equals_a_value_by_hand():
    # k(x, y) = (xy + 1)^3: within {0, 1} it is 1, within {2, 3} it is 343, between 1, 1, 27 and 64.
    assert metrics.kid([[0.0], [1.0]], [[2.0], [3.0]]).value == pytest.approx(1 + 343 - 93 / 2)


def test_kid_equals_torchmetrics():
    image = pytest.importorskip("torchmetrics.image.kid")
    a, b = draw(40), draw(30, shift=0.3, seed=1)
    theirs = image.poly_mmd(torch.tensor(a[:30]), torch.tensor(b))
    assert metrics.kid(a[:30], b).value == pytest.approx(float(theirs), abs=1e-9)


def test_kid_over_subsets_agrees_with_kid_of_all():
    a, b = draw(200), draw(200, shift=0.4, seed=1)
    whole = metrics.kid(a, b)
    parts = metrics.kid(a, b, subset_size=50, subsets=400)
    assert parts.subset_size == 50
    assert parts.subset_std > 0
    assert parts.value == pytest.approx(whole.value, abs=4 * parts.subset_std / 400**0.5)
    assert metrics.kid(a, b, subset_size=200, subsets=3).value == pytest.approx(whole.value)


def test_kid_of_equal_distributions_has_mean_zero_and_its_interval_covers_the_truth():
    values = [
        metrics.kid(draw(30, seed=i), draw(30, seed=1000 + i), resamples=0).value
        for i in range(300)
    ]
    error = np.std(values) / 300**0.5
    assert abs(np.mean(values)) < 3 * error
    assert min(values) < 0 < max(values)
    truth = metrics.kid(draw(2000), draw(2000, shift=0.5, seed=1), resamples=0).value
    result = [
        metrics.kid(draw(80, seed=i), draw(80, shift=0.5, seed=500 + i), resamples=200)
        for i in range(60)
    ]
    assert np.mean([f.low <= truth <= f.high for f in result]) >= 0.85


def test_kid_test_has_its_false_positive_rate_and_detects_a_shift():
    equal = [
        metrics.kid_test(draw(25, seed=i), draw(25, seed=1000 + i), permutations=100, seed=i)
        for i in range(120)
    ]
    assert np.mean([not result.indistinguishable for result in equal]) < 0.12
    assert 0.3 < np.mean([result.p for result in equal]) < 0.7
    apart = metrics.kid_test(draw(60), draw(60, shift=1.0, seed=1))
    assert not apart.indistinguishable
    assert apart.value > apart.threshold
    assert apart.p == pytest.approx(1 / 1001)


def test_kid_test_with_groups_detects_a_change_that_is_small_beside_the_prompts():
    prompts = [i // 4 for i in range(80)]
    centers = 3 * draw(20, seed=2)[prompts]
    before, after = centers + 0.3 * draw(80), centers + 0.3 * draw(80, seed=1) + 0.15
    alone = metrics.kid_test(before, after)
    grouped = metrics.kid_test(before, after, groups=(prompts, prompts))
    assert alone.indistinguishable
    assert not grouped.indistinguishable


def test_kid_with_groups_equals_a_loop_and_has_mean_zero():
    def k(x, y):
        return (float(x @ y) / len(x) + 1) ** 3

    a, b, prompts, others = draw(6), draw(5, seed=1), "aabbcc", "abbcc"
    sides = [(a, prompts, a, prompts), (b, others, b, others), (a, prompts, b, others)]
    means = [
        np.mean([k(x[i], y[j]) for i in range(len(x)) for j in range(len(y)) if p[i] != q[j]])
        for x, p, y, q in sides
    ]
    result = metrics.kid(a, b, groups=(prompts, others))
    assert result.value == pytest.approx(means[0] + means[1] - 2 * means[2], abs=1e-9)
    centers, keys = 2 * draw(12, seed=9), list(range(12))
    pairs = [
        (centers + 0.2 * draw(12, seed=i), centers + 0.2 * draw(12, seed=900 + i))
        for i in range(60)
    ]
    plain = np.mean([metrics.kid(x, y, resamples=0).value for x, y in pairs])
    grouped = [metrics.kid(x, y, groups=(keys, keys), resamples=0).value for x, y in pairs]
    assert plain < -10 * np.std(grouped)  # so groups are needed
    assert abs(np.mean(grouped)) < 3 * np.std(grouped) / 60**0.5


def test_the_interval_over_prompts_contains_the_value():
    keys = [i // 2 for i in range(40)]
    centers = 2 * draw(20, seed=9)[keys]
    result = metrics.kid(centers + draw(40), centers + draw(40, seed=1) + 1, groups=(keys, keys))
    assert result.low < result.value < result.high


def test_groups_widen_the_interval_for_many_pictures_of_few_prompts():
    prompts = [i // 10 for i in range(100)]  # both sets have ten prompts of one distribution
    a = draw(10, seed=1)[prompts] + 0.01 * draw(100)
    b = draw(10, seed=2)[prompts] + 0.01 * draw(100, seed=3)
    alone, grouped = metrics.kid(a, b), metrics.kid(a, b, groups=(prompts, prompts))
    assert alone.low > 0
    assert grouped.low < 0 < grouped.high


def test_fid_equals_scipy_with_more_and_with_fewer_pictures_than_features():
    for n, width in ((50, 6), (8, 20)):
        a, b = draw(n, width=width), 1.5 * draw(n + 3, shift=0.4, width=width, seed=1)
        s, t = np.cov(a.T), np.cov(b.T)
        root = np.sqrt(linalg.eigvals(s @ t).astype(complex)).real.sum()
        expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s + t) - 2 * root
        assert metrics.fid(a, b).value == pytest.approx(expected, abs=1e-6)
        assert metrics.fid(a, a).value == pytest.approx(0, abs=1e-9)


def test_fid_equals_a_value_by_hand():
    # Means 1 and 4, variances 2 and 8: 9 + 2 + 8 - 2 * 4.
    assert metrics.fid([[0.0], [2.0]], [[2.0], [6.0]]).value == pytest.approx(11)


def test_distance_as_text():
    assert str(metrics.Distance(0.5, 0.25, 0.75, 8, 8)) == "0.5000 [0.2500, 0.7500]"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.kid(draw(4), draw(4, width=3)), r"of one width.*\(4, 6\) and \(4, 3\)"),
        (lambda: metrics.fid(draw(1), draw(4)), "two rows or more each"),
        (lambda: metrics.kid([[np.nan], [1.0]], draw(4, width=1)), "finite numbers"),
        (lambda: metrics.kid(draw(4), draw(9), subset_size=5), "between 2 and the smaller set's 4"),
        (lambda: metrics.kid(draw(4), draw(4), confidence=95), "between 0 and 1, got 95"),
        (lambda: metrics.kid(draw(4), draw(4), groups=("ab", "abcd")), "of 4 and of 4, got 2, 4"),
        (
            lambda: metrics.kid_test(draw(4), draw(4), permutations=3),
            "at least 1 / alpha, got 0.05",
        ),
    ],
)
def test_bad_arguments_raise(call, message):
    with pytest.raises(ValueError, match=message):
        call()
