"""KID and FID against torchmetrics, scipy and plain loops; the test of equality against its own promise."""

import numpy as np
import pytest
import torch
from scipy import linalg

from overpaint import metrics


def draw(n, *, shift=0.0, width=6, seed=0):
    return np.random.default_rng(seed).normal(size=(n, width)) + shift


def kid_by_hand(a, b):
    """The unbiased estimate, a pair at a time."""

    def k(x, y):
        return (float(x @ y) / len(x) + 1) ** 3

    within = [
        np.mean([k(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j])
        for x in (a, b)
    ]
    return sum(within) - 2 * np.mean([k(x, y) for x in a for y in b])


def test_kid_of_all_pictures_is_the_sum_over_pairs():
    a, b = draw(9), draw(7, shift=0.5, seed=1)
    found = metrics.kid(a, torch.tensor(b))
    assert found.value == pytest.approx(kid_by_hand(a, b), abs=1e-9)
    assert (found.n_a, found.n_b, found.subset_size, found.subset_std) == (9, 7, 7, 0)


def test_kid_on_one_number_worked_by_hand():
    # k(x, y) = (xy + 1)^3: within {0, 1} it is 1, within {2, 3} it is 343, between 1, 1, 27 and 64.
    assert metrics.kid([[0.0], [1.0]], [[2.0], [3.0]]).value == pytest.approx(1 + 343 - 93 / 2)


def test_kid_is_torchmetrics_estimate():
    image = pytest.importorskip("torchmetrics.image.kid")
    a, b = draw(40), draw(30, shift=0.3, seed=1)
    theirs = image.poly_mmd(torch.tensor(a[:30]), torch.tensor(b))
    assert metrics.kid(a[:30], b).value == pytest.approx(float(theirs), abs=1e-9)


def test_subsets_scatter_about_the_value_of_all():
    a, b = draw(200), draw(200, shift=0.4, seed=1)
    whole = metrics.kid(a, b)
    parts = metrics.kid(a, b, subset_size=50, subsets=400)
    assert parts.subset_size == 50
    assert parts.subset_std > 0
    assert parts.value == pytest.approx(whole.value, abs=4 * parts.subset_std / 400**0.5)
    assert metrics.kid(a, b, subset_size=200, subsets=3).value == pytest.approx(whole.value)


def test_the_estimate_of_no_distance_is_zero_on_average_and_its_interval_holds_the_truth():
    values = [
        metrics.kid(draw(30, seed=i), draw(30, seed=1000 + i), resamples=0).value
        for i in range(300)
    ]
    error = np.std(values) / 300**0.5
    assert abs(np.mean(values)) < 3 * error
    assert min(values) < 0 < max(values)
    truth = metrics.kid(draw(2000), draw(2000, shift=0.5, seed=1), resamples=0).value
    found = [
        metrics.kid(draw(80, seed=i), draw(80, shift=0.5, seed=500 + i), resamples=200)
        for i in range(60)
    ]
    assert np.mean([f.low <= truth <= f.high for f in found]) >= 0.85


def test_the_test_calls_equal_sets_different_as_seldom_as_it_says_and_sees_a_shift():
    equal = [
        metrics.kid_test(draw(25, seed=i), draw(25, seed=1000 + i), permutations=100, seed=i)
        for i in range(120)
    ]
    assert np.mean([not found.indistinguishable for found in equal]) < 0.12
    assert 0.3 < np.mean([found.p for found in equal]) < 0.7
    apart = metrics.kid_test(draw(60), draw(60, shift=1.0, seed=1))
    assert not apart.indistinguishable
    assert apart.value > apart.threshold
    assert apart.p == pytest.approx(1 / 1001)


def test_within_prompts_an_edit_is_seen_that_the_prompts_would_hide():
    prompts = [i // 4 for i in range(80)]
    places = 3 * draw(20, seed=2)[prompts]
    before, after = places + 0.3 * draw(80), places + 0.3 * draw(80, seed=1) + 0.15
    alone = metrics.kid_test(before, after)
    grouped = metrics.kid_test(before, after, groups=(prompts, prompts))
    assert alone.indistinguishable
    assert not grouped.indistinguishable


def test_with_prompts_no_pair_of_one_prompt_is_counted_and_none_of_nothing_is_zero_on_average():
    def k(x, y):
        return (float(x @ y) / len(x) + 1) ** 3

    a, b, prompts, others = draw(6), draw(5, seed=1), "aabbcc", "abbcc"
    sides = [(a, prompts, a, prompts), (b, others, b, others), (a, prompts, b, others)]
    means = [
        np.mean([k(x[i], y[j]) for i in range(len(x)) for j in range(len(y)) if p[i] != q[j]])
        for x, p, y, q in sides
    ]
    found = metrics.kid(a, b, groups=(prompts, others))
    assert found.value == pytest.approx(means[0] + means[1] - 2 * means[2], abs=1e-9)
    places, keys = 2 * draw(12, seed=9), list(range(12))
    pairs = [
        (places + 0.2 * draw(12, seed=i), places + 0.2 * draw(12, seed=900 + i)) for i in range(60)
    ]
    plain = np.mean([metrics.kid(x, y, resamples=0).value for x, y in pairs])
    grouped = [metrics.kid(x, y, groups=(keys, keys), resamples=0).value for x, y in pairs]
    assert plain < -10 * np.std(grouped)  # why the groups are there
    assert abs(np.mean(grouped)) < 3 * np.std(grouped) / 60**0.5


def test_the_interval_over_prompts_lies_about_the_value():
    keys = [i // 2 for i in range(40)]
    places = 2 * draw(20, seed=9)[keys]
    found = metrics.kid(places + draw(40), places + draw(40, seed=1) + 1, groups=(keys, keys))
    assert found.low < found.value < found.high


def test_many_pictures_of_few_prompts_are_not_taken_for_many():
    prompts = [
        i // 10 for i in range(100)
    ]  # ten prompts a set, of one distribution: there is no distance
    a = draw(10, seed=1)[prompts] + 0.01 * draw(100)
    b = draw(10, seed=2)[prompts] + 0.01 * draw(100, seed=3)
    alone, grouped = metrics.kid(a, b), metrics.kid(a, b, groups=(prompts, prompts))
    assert alone.low > 0
    assert grouped.low < 0 < grouped.high


def test_fid_is_scipys_with_many_pictures_and_with_fewer_than_features():
    for n, width in ((50, 6), (8, 20)):
        a, b = draw(n, width=width), 1.5 * draw(n + 3, shift=0.4, width=width, seed=1)
        s, t = np.cov(a.T), np.cov(b.T)
        root = np.sqrt(linalg.eigvals(s @ t).astype(complex)).real.sum()
        expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s + t) - 2 * root
        assert metrics.fid(a, b).value == pytest.approx(expected, abs=1e-6)
        assert metrics.fid(a, a).value == pytest.approx(0, abs=1e-9)


def test_fid_of_two_lines_worked_by_hand():
    # Means 1 and 4, variances 2 and 8: 9 + 2 + 8 - 2 * 4.
    assert metrics.fid([[0.0], [2.0]], [[2.0], [6.0]]).value == pytest.approx(11)


def test_a_distance_prints_in_one_line():
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
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
