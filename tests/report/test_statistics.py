"""Statistics against worked examples, published constants, other routines of SciPy, and simulation."""

import numpy as np
import pytest
import scipy.stats

from mtl_jax.report import statistics
from mtl_jax.report.statistics import difference, holm, summary

GAINS = dict(enumerate((0.010, 0.012, 0.008, 0.011, 0.004)))
ZERO = dict.fromkeys(range(20), 0.0)


def test_worked_example_of_five_seeds():
    """By hand: s² = 4e-5 / 4, t = .009 / (s / √5), and 2.7764 standard errors on either side."""
    found = difference(GAINS, ZERO, higher_is_better=True)
    assert found.mean == pytest.approx(0.009)
    assert found.std == pytest.approx(0.00316228, abs=1e-8)
    assert found.p == pytest.approx(0.0031256, abs=1e-7)
    assert found.interval == pytest.approx((0.0050735, 0.0129265), abs=1e-7)
    assert (found.n, found.p_exact, found.p_holm) == (5, None, None)
    assert found.values == GAINS


def test_summary_of_two_values_by_hand():
    """t(.975, 1) = 12.7062; s of (1, 3) is √2, its standard error 1."""
    found = summary({0: 1.0, 7: 3.0})
    assert (found.mean, found.n, found.values) == (2.0, 2, {0: 1.0, 7: 3.0})
    assert found.std == pytest.approx(2**0.5)
    assert found.interval == pytest.approx((2 - 12.7062, 2 + 12.7062), abs=1e-4)


def test_what_has_no_spread_has_no_interval():
    assert summary({}) == statistics.Summary(None, None, None, 0, {})
    assert summary({3: 0.7}) == statistics.Summary(0.7, None, None, 1, {3: 0.7})


def test_missing_and_non_finite_seeds_are_left_out_and_counted():
    found = summary({0: 1.0, 1: float("nan"), 2: None, 3: float("inf"), 4: 3.0})
    assert (found.n, found.values) == (2, {0: 1.0, 4: 3.0})
    paired = difference({0: 1.0, 1: 2.0, 2: float("nan"), 5: 9.0}, {0: 0.5, 1: 1.0, 2: 1.0}, higher_is_better=True)
    assert (paired.n, paired.values) == (2, {0: 0.5, 1: 1.0})


def test_positive_is_better_for_errors_too():
    assert difference({0: 0.9}, {0: 1.0}, higher_is_better=False).mean == pytest.approx(0.1)
    assert difference({0: 0.9}, {0: 1.0}, higher_is_better=True).mean == pytest.approx(-0.1)


def test_one_or_no_common_seed_is_not_tested():
    one = difference({0: 0.9, 1: 0.8}, {0: 1.0, 2: 1.0}, higher_is_better=True)
    assert (one.n, one.interval, one.p, one.bootstrap, one.p_exact, one.std) == (1, None, None, None, None, None)
    none = difference({0: 0.9}, {1: 1.0}, higher_is_better=True)
    assert (none.n, none.mean, none.p) == (0, None, None)


def test_equal_differences_prove_no_more_than_their_signs():
    """The t-test would give p = 0; n equal signs have probability 2 / 2^n. Rounding is no spread: .81-.80 != .71-.70."""
    base = {seed: 0.70 + 0.01 * seed for seed in range(6)}
    found = difference({s: v + 0.01 for s, v in base.items()}, base, higher_is_better=True)
    assert found.p == found.p_exact == 2 / 2**6
    assert found.interval == pytest.approx((0.01, 0.01))
    same = difference(base, base, higher_is_better=True)
    assert (same.mean, same.p, same.p_exact, same.interval) == (0.0, 1.0, 1.0, (0.0, 0.0))


def test_paired_test_is_that_of_scipy():
    generator = np.random.default_rng(1)
    left, right = generator.normal(0.8, 0.01, (2, 9))
    found = difference(dict(enumerate(left)), dict(enumerate(right)), higher_is_better=True)
    assert found.p == pytest.approx(scipy.stats.ttest_rel(left, right).pvalue)


@pytest.mark.parametrize("n", [6, 10, 16])
def test_exact_test_of_equal_signs(n):
    """All of one sign: only the two extreme assignments of 2^n reach the mean."""
    numbers = np.random.default_rng(n).uniform(1, 2, n)
    found = difference(dict(enumerate(numbers)), ZERO, higher_is_better=True)
    assert found.p_exact == 2 / 2**n


def test_test_of_many_seeds_draws_the_same_signs_again():
    numbers = np.random.default_rng(9).normal(0.3, 1, 20)
    assert statistics.sign_flip_test(numbers) == statistics.sign_flip_test(numbers)
    assert statistics.sign_flip_test(numbers) == pytest.approx(float(statistics.t_test(numbers)), abs=0.02)


def test_exact_test_counts_assignments():
    """Of the 64 sign assignments of (6, 5, 4, 3, 2, -1), those with |sum| >= 19 are counted by enumeration."""
    numbers = np.array([6, 5, 4, 3, 2, -1.0])
    signs = np.array(np.meshgrid(*[[-1, 1]] * 6)).reshape(6, -1).T
    expected = np.mean(np.abs(signs @ np.abs(numbers)) >= 19 - 1e-9)
    assert statistics.sign_flip_test(numbers) == pytest.approx(expected)


def test_bootstrap_holds_the_mean_and_repeats():
    numbers = dict(enumerate(np.random.default_rng(2).normal(0.01, 0.003, 10)))
    one, two = (difference(numbers, ZERO, higher_is_better=True) for _ in range(2))
    assert one.bootstrap == two.bootstrap
    assert one.bootstrap[0] < one.mean < one.bootstrap[1]
    assert difference({s: numbers[s] for s in range(4)}, ZERO, higher_is_better=True).bootstrap is None


def test_bootstrap_follows_the_skew():
    """Of an exponential sample, the upper arm is longer than the lower one; Student's arms are equal."""
    low, high = statistics.bootstrap_interval(np.random.default_rng(3).exponential(1, 30))
    mean = np.random.default_rng(3).exponential(1, 30).mean()
    assert high - mean > 1.1 * (mean - low)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_holm_does_not_count_what_was_not_tested():
    assert holm([0.01, None, 0.04]) == [pytest.approx(0.02), None, pytest.approx(0.04)]


def test_critical_difference_of_the_paper():
    """Demšar 2006: q = 2.343, 2.569, 2.728 for 3, 4, 5 classifiers; 1.25 for 4 on 14 data sets."""
    for methods, q in ((3, 2.343), (4, 2.569), (5, 2.728)):
        expected = q * (methods * (methods + 1) / 60) ** 0.5
        assert statistics.critical_difference(methods, 10) == pytest.approx(expected, rel=5e-4)
    assert statistics.critical_difference(4, 14) == pytest.approx(1.25, abs=0.005)
    assert statistics.critical_difference(2, 10) is None
    assert statistics.critical_difference(4, 1) is None


def test_friedman_by_hand():
    """Five blocks, ranks always (1, 2, 3): χ² = 12·5/(3·4) · (1 + 0 + 1) = 10 with two degrees of freedom, p = e^-5."""
    scores = np.tile([0.1, 0.2, 0.3], (5, 1)) + np.arange(5)[:, None]
    assert statistics.friedman(scores) == pytest.approx(np.exp(-5))
    assert statistics.friedman(np.ones((5, 3))) == 1.0
    assert statistics.friedman(scores[:, :2]) is None
    assert statistics.friedman(scores[:1]) is None


@pytest.mark.parametrize("n", [5, 10])
def test_interval_covers_the_truth_in_95_of_100(n):
    numbers = np.random.default_rng(4).normal(0.002, 0.01, (20_000, n))
    low, high = statistics.t_interval(numbers)
    assert 0.93 < np.mean((low <= 0.002) & (0.002 <= high)) < 0.97


def test_interval_and_test_agree():
    """The interval excludes 0 exactly where the test rejects at .05."""
    numbers = np.random.default_rng(5).normal(0.005, 0.01, (5_000, 5))
    low, high = statistics.t_interval(numbers)
    np.testing.assert_array_equal((low > 0) | (high < 0), statistics.t_test(numbers) < 0.05)


def test_corrected_table_is_wrong_in_at_most_5_of_100():
    """4 arms and 2 tasks that are all alike: how often anything is claimed in the table, with and without correction.

    All arms share the baseline's noise, and the tasks of a run are correlated, as in a real table.
    """
    generator = np.random.default_rng(6)
    run = generator.normal(size=(4_000, 5, 1, 10))
    metrics = 0.8 + 0.01 * (0.5 * run + generator.normal(size=(4_000, 5, 2, 10)))
    p = statistics.t_test((metrics[:, 1:] - metrics[:, :1]).reshape(-1, 10)).reshape(4_000, 8)
    corrected = np.mean([min(holm(list(row))) <= 0.05 for row in p])
    assert corrected <= 0.05
    assert np.mean(p.min(axis=1) <= 0.05) > 0.15  # what the correction is for


@pytest.mark.parametrize("n, coverage", [(5, 0.83), (10, 0.90), (20, 0.93)])
def test_bootstrap_over_few_seeds_covers_less_than_it_says(n, coverage):
    """For a stated .95, as the docstring of Difference admits."""
    numbers = np.random.default_rng(7).normal(0.002, 0.01, (1_500, n))
    low, high = statistics.bootstrap_interval(numbers, resamples=600)
    assert np.mean((low <= 0.002) & (0.002 <= high)) == pytest.approx(coverage, abs=0.03)


@pytest.mark.parametrize("methods, blocks", [(4, 5), (4, 10), (7, 10)])
def test_critical_difference_is_exceeded_in_5_of_100(methods, blocks):
    """By the two most distant of methods that are all alike."""
    scores = np.random.default_rng(10).normal(size=(2_000, blocks, methods))
    ranks = scores.argsort(axis=-1).argsort(axis=-1).mean(axis=1)
    assert 0.02 < np.mean(np.ptp(ranks, axis=-1) > statistics.critical_difference(methods, blocks)) < 0.07


def test_friedman_over_seeds_is_wrong_in_at_most_5_of_100():
    generator = np.random.default_rng(8)
    p = [statistics.friedman(scores) for scores in generator.normal(size=(2_000, 10, 4))]
    assert np.mean(np.array(p) <= 0.05) < 0.06
