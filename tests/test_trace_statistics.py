"""Permutation p-values and Holm's correction against hand-worked numbers, plain loops and chance."""

from itertools import product

import numpy as np
import pytest
from scipy import stats

from overpaint.trace.statistics import agreement, draws_for, holm, sign_flip


def test_the_exact_p_value_equals_a_value_worked_by_hand():
    # Of the 8 sign patterns of (1, 2, 4), the sums 7, 5, 3, 1, -1, ... : only one reaches 7.
    values = np.array([[1.0, 1.0, -1.0, 0.0], [2.0, -2.0, -2.0, 0.0], [4.0, 4.0, -4.0, 0.0]])
    # (1, -2, 4) sums to 3, reached by 7, 5, 3; all negative is reached by every pattern.
    assert sign_flip(values).tolist() == [1 / 8, 3 / 8, 1.0, 1.0]


def test_the_exact_p_value_equals_that_of_a_plain_loop():
    values = np.random.default_rng(1).normal(0.3, 1, size=(9, 4))
    for column, p in zip(values.T, sign_flip(values), strict=True):
        sums = [np.dot(signs, column) for signs in product((1, -1), repeat=9)]
        assert p == np.mean([s >= column.sum() - 1e-9 for s in sums])


def test_it_agrees_with_scipys_permutation_test():
    values = np.random.default_rng(5).normal(0.2, 1, size=(40, 3))
    theirs = stats.permutation_test(
        (values,), lambda x, axis: x.mean(axis), permutation_type="samples",
        alternative="greater", n_resamples=9999, axis=0, vectorized=True, rng=1,
    ).pvalue  # fmt: skip
    assert sign_flip(values) == pytest.approx(theirs, abs=0.015)


def test_ties_count_and_rounding_does_not_hide_them():
    values = np.full((5, 1), 0.1)
    values[4] = -0.1  # 0.3 in all; reached by the 5 patterns with one minus and by the one without
    assert sign_flip(values)[0] == 6 / 32


def test_a_prompt_without_values_changes_nothing():
    rng = np.random.default_rng(0)
    values = rng.normal(0.5, 1, size=(8, 2))
    more = np.vstack([values, [[np.nan, np.nan]]])
    assert sign_flip(more) == pytest.approx(sign_flip(values))
    assert np.isnan(sign_flip(np.full((3, 1), np.nan)))[0]


def test_random_flips_are_repeatable_and_never_give_a_p_value_of_zero():
    values = np.random.default_rng(0).normal(3, 1, size=(60, 2))
    p = sign_flip(values, draws=2000)
    assert p.tolist() == [1 / 2001] * 2
    noise = values - 3
    assert sign_flip(noise, seed=4).tolist() == sign_flip(noise, seed=4).tolist()
    assert sign_flip(noise, seed=4).tolist() != sign_flip(noise, seed=5).tolist()


def test_the_order_of_prompts_does_not_matter_for_exact_p_values():
    values = np.random.default_rng(2).normal(0.4, 1, size=(10, 3))
    assert sign_flip(values[::-1]).tolist() == sign_flip(values).tolist()


def test_without_an_effect_the_rate_of_false_positives_is_alpha():
    rng = np.random.default_rng(0)
    single, family = 0, 0
    for trial in range(300):
        p = sign_flip(rng.laplace(size=(12, 8)), seed=trial)
        single += (p <= 0.05).sum()
        family += (holm(p) <= 0.05).any()
    assert single / 2400 == pytest.approx(0.05, abs=0.015)
    assert 0.01 <= family / 300 <= 0.08


def test_holm_equals_values_worked_by_hand():
    # Sorted 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1 is 0.04, 0.06, 0.06, 0.04; none below the one before.
    assert holm(np.array([0.04, 0.01, 0.03, 0.02])) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm(np.array([0.9, 0.6])).tolist() == [1.0, 1.0]


def test_holm_equals_the_step_down_procedure():
    """A plain loop: go up the sorted p-values, reject while p <= alpha / (m - k), stop at the first failure."""
    rng = np.random.default_rng(3)
    for _ in range(50):
        p = rng.random(15) ** 3
        for alpha in (0.01, 0.05, 0.2):
            rejected = set()
            for k, i in enumerate(np.argsort(p)):
                if p[i] > alpha / (15 - k):
                    break
                rejected.add(i)
            assert set(np.flatnonzero(holm(p) <= alpha)) == rejected


def test_holm_counts_only_tested_states():
    corrected = holm(np.array([0.01, np.nan, 0.02]))
    assert corrected[[0, 2]].tolist() == [0.02, 0.02]
    assert np.isnan(corrected[1])
    assert holm(np.array([])).size == 0


def test_the_number_of_flips_suffices_for_many_states():
    for states, alpha in ((1, 0.05), (120, 0.05), (1440, 0.05), (1440, 0.01)):
        assert states / (draws_for(states, alpha) + 1) < alpha


def test_agreement_equals_scipys_correlation_of_the_means():
    rng = np.random.default_rng(0)
    truth = rng.normal(size=20)
    first = truth + rng.normal(size=(15, 20))
    second = truth**3 + rng.normal(size=(15, 20))
    interval = agreement(first, second)
    assert interval.mean == pytest.approx(stats.spearmanr(first.mean(0), second.mean(0)).statistic)
    assert interval.low < interval.mean < interval.high
    assert interval.n == 20
    itself = agreement(first, 2 * first)
    assert (itself.mean, itself.low, itself.high) == pytest.approx((1, 1, 1))


def test_agreement_leaves_out_states_that_one_map_lacks():
    first = np.array([[1.0, 2.0, 3.0, np.nan], [1.0, 2.0, 3.0, np.nan]])
    second = np.array([[3.0, np.nan, 9.0, 1.0], [3.0, 5.0, 9.0, 1.0]])
    interval = agreement(first, second)
    assert (interval.mean, interval.n) == (1.0, 3)
