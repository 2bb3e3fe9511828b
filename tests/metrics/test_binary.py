"""Binary metrics against worked values, double loops and scikit-learn."""

import numpy as np
import pytest
import sklearn.metrics

from mtl_jax import metrics


def pair_loop(labels, scores, weights):
    """AUC as the share of won pairs, O(n²)."""
    won = total = 0.0
    for y_i, s_i, w_i in zip(labels, scores, weights, strict=True):
        for y_j, s_j, w_j in zip(labels, scores, weights, strict=True):
            if y_i == 1 and y_j == 0:
                total += w_i * w_j
                won += w_i * w_j * ((s_i > s_j) + 0.5 * (s_i == s_j))
    return won / total if total else None


@pytest.fixture
def tied():
    """Labels, heavily tied scores, weights (some 0) and users, of whom some have one label only."""
    rng = np.random.default_rng(0)
    user = rng.integers(0, 12, 120)
    labels = np.where(user < 3, user % 2, rng.random(120) < 0.4).astype(np.float32)
    return labels, rng.integers(-4, 5, 120).astype(np.float64), rng.integers(0, 4, 120).astype(np.float64), user


def test_auc_worked_values():
    labels, scores = [1, 0, 1, 0, 1, 0], [0.9, 0.5, 0.5, 0.5, 0.2, 0.1]
    assert metrics.auc(labels, scores) == pytest.approx(2 / 3, abs=1e-15)
    assert metrics.auc(labels, scores, [1, 2, 1, 1, 2, 1]) == pytest.approx(0.53125, abs=1e-15)
    assert metrics.auc(labels, np.ones(6)) == 0.5
    assert metrics.auc([1, 1], [0.1, 0.2]) is None
    assert metrics.auc([1, 0], [0.1, 0.2], [1, 0]) is None
    assert metrics.auc([], []) is None


def test_auc_is_exact(tied):
    labels, scores, weights, _ = tied
    assert metrics.auc(labels, scores) == pair_loop(labels, scores, np.ones(120))
    assert metrics.auc(labels, scores, weights) == pytest.approx(pair_loop(labels, scores, weights), rel=1e-14)
    assert metrics.auc(labels, scores) == pytest.approx(sklearn.metrics.roc_auc_score(labels, scores), rel=1e-13)
    assert metrics.auc(labels, -scores) == pytest.approx(1 - metrics.auc(labels, scores), rel=1e-14)
    assert metrics.auc(labels, np.exp(scores)) == metrics.auc(labels, scores)


def test_auc_separates_logits_whose_float32_probabilities_are_equal():
    logits = np.array([20.0, 30.0, 40.0])
    assert len(set((1 / (1 + np.exp(-logits.astype(np.float32)))).astype(np.float32))) == 1
    assert metrics.auc([0, 0, 1], logits) == 1


def test_infinite_scores_are_ordinary_and_nan_is_refused():
    assert metrics.auc([0, 1, 1], [-np.inf, 0.0, np.inf]) == 1
    for metric in (metrics.auc, metrics.pr_auc):
        with pytest.raises(ValueError, match="1 of 2 scores are NaN"):
            metric([0, 1], [0.0, np.nan])
    with pytest.raises(ValueError, match="expected two arrays"):
        metrics.auc([0, 1], [0.0])
    with pytest.raises(ValueError, match="finite values >= 0"):
        metrics.auc([0, 1], [0.0, 1.0], [1.0, -1.0])


WORKED_USERS = ([1, 0, 0, 1, 1, 0, 0], [0.3, 0.2, 0.4, 0.9, 0.3, 0.5, 0.1], [0, 0, 0, 1, 1, 1, 1])


@pytest.mark.parametrize(
    ("weighting", "expected"), [("impr", 0.64285714), ("pos", 2 / 3), ("pair", 2 / 3), ("user", 0.625)]
)
def test_gauc_worked_values(weighting, expected):
    assert metrics.gauc(*WORKED_USERS, weighting=weighting) == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("weighting", ["impr", "pos", "pair", "user"])
def test_gauc_equals_a_loop_over_users(tied, weighting):
    labels, scores, weights, user = tied
    top = bottom = 0.0
    for u in np.unique(user):
        y, s, w = labels[user == u], scores[user == u], weights[user == u]
        value = pair_loop(y, s, w)
        if value is not None:
            positive, negative = w[y == 1].sum(), w[y == 0].sum()
            share = {"impr": w.sum(), "pos": positive, "pair": positive * negative, "user": 1}[weighting]
            top, bottom = top + share * value, bottom + share
    assert metrics.gauc(labels, scores, user, weights, weighting=weighting) == pytest.approx(top / bottom, rel=1e-13)


def test_gauc_limits(tied):
    labels, scores, _, user = tied
    assert metrics.gauc(labels, scores, 0 * user) == pytest.approx(metrics.auc(labels, scores), rel=1e-14)
    assert metrics.gauc(labels, scores + 100 * user, user) == pytest.approx(
        metrics.gauc(labels, scores, user), rel=1e-14
    )
    assert metrics.gauc([1, 0], [1.0, 2.0], [0, 1]) is None
    without = metrics.gauc(labels[user != 5], scores[user != 5], user[user != 5])
    assert metrics.gauc(labels, scores, np.where(user == 5, -1, user)) == without
    with pytest.raises(ValueError, match="unknown weighting 'click'"):
        metrics.gauc(labels, scores, user, weighting="click")


def test_binned_auc_stays_within_its_bound():
    rng = np.random.default_rng(3)
    labels = rng.random(400) < 0.3
    logits = rng.normal(size=400) + labels
    for num_bins in (2**14, 64):
        value, bound = metrics.auc_binned(labels, logits, num_bins=num_bins)
        assert abs(value - metrics.auc(labels, logits)) <= bound + 1e-12
    assert bound > 1e-3
    rounded = np.floor((logits + 16) * 2)
    assert value == pytest.approx(metrics.auc(labels, rounded), rel=1e-13)
    assert metrics.auc_binned([1, 1], [0.0, 1.0]) == (None, None)


def test_pr_auc(tied):
    labels, scores, weights, _ = tied
    assert metrics.pr_auc(labels, scores) == pytest.approx(sklearn.metrics.average_precision_score(labels, scores))
    assert metrics.pr_auc(labels, scores, weights) == pytest.approx(
        sklearn.metrics.average_precision_score(labels, scores, sample_weight=weights)
    )
    assert metrics.pr_auc(labels, np.zeros(120)) == pytest.approx(labels.mean())
    assert metrics.pr_auc([0, 0], [1.0, 2.0]) is None


def test_logloss_from_logits_and_probabilities(tied):
    labels, logits, weights, _ = tied
    probabilities = metrics.sigmoid(logits)
    expected = sklearn.metrics.log_loss(labels, probabilities, sample_weight=weights)
    assert metrics.logloss(labels, logits, weights) == pytest.approx(expected, rel=1e-12)
    assert metrics.logloss_of_probabilities(labels, probabilities, weights) == (pytest.approx(expected, rel=1e-12), 0)
    value, clipped = metrics.logloss_of_probabilities([1, 0], [0.0, 0.5])
    assert clipped == 1 and value == pytest.approx((-np.log(1e-7) + np.log(2)) / 2)
    assert metrics.logloss([1, 0, 1], [1e4, 1e4, -1e4]) == pytest.approx(2e4 / 3)
    assert metrics.logloss([], []) is None


def test_sigmoid_in_the_tails():
    np.testing.assert_allclose(metrics.sigmoid([-700.0, -40.0, 0.0, 800.0]), [np.exp(-700), np.exp(-40), 0.5, 1])


def test_normalised_entropy_of_the_base_rate_is_one():
    labels, weights = np.array([1, 0, 0, 0, 1]), np.array([1.0, 2, 1, 1, 1])
    rate = 2 / 6
    assert metrics.ne(labels, np.full(5, np.log(rate / (1 - rate))), weights) == pytest.approx(1, rel=1e-14)
    assert metrics.ne(labels, np.zeros(5), weights) == pytest.approx(
        np.log(2) / -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate))
    )
    assert metrics.ne([1, 1], [0.0, 1.0]) is None


def test_calibration_worked_values():
    probabilities, labels = [0.05, 0.15, 0.15, 0.6, 0.9], [0, 0, 1, 1, 1]
    assert metrics.ece_width_10(labels, probabilities) == pytest.approx(0.25, abs=1e-12)
    assert metrics.pcoc(labels, probabilities) == pytest.approx(0.61666667, abs=1e-8)
    assert metrics.pcoc([0, 0], [0.1, 0.2]) is None


def test_width_bins_are_closed_below():
    """Tenths open their bin, and 1 belongs to the last one."""
    table = metrics.reliability_table(np.zeros(11), np.arange(11) / 10)
    np.testing.assert_array_equal(table["bin"], np.arange(10))
    np.testing.assert_array_equal(table["count"], [1] * 9 + [2])


def test_mass_bins_hold_equal_counts_and_keep_ties_together():
    rng = np.random.default_rng(4)
    probabilities, labels = rng.random(200), rng.random(200) < 0.5
    table = metrics.reliability_table(labels, probabilities, bins="mass", num_bins=20)
    np.testing.assert_array_equal(table["count"], np.full(20, 10))
    blocks = np.argsort(probabilities).reshape(20, 10)
    gaps = [abs(probabilities[block].mean() - labels[block].mean()) for block in blocks]
    assert metrics.ece_mass_20(labels, probabilities) == pytest.approx(np.mean(gaps))

    tied = np.array([0.1, 0.2, 0.2, 0.2, 0.2, 0.9])
    table = metrics.reliability_table([0, 1, 0, 0, 0, 1], tied, bins="mass", num_bins=3)
    np.testing.assert_array_equal(table["count"], [5, 1])
    np.testing.assert_allclose(table["label"], [0.2, 1])
    constant = metrics.ece_mass_20(labels, np.full(200, 0.25))
    assert constant == pytest.approx(abs(labels.mean() - 0.25))
    with pytest.raises(ValueError, match="unknown bins 'even'"):
        metrics.reliability_table(labels, probabilities, bins="even")


@pytest.mark.parametrize("name", ["logloss", "ne", "pcoc", "ece_width_10", "pr_auc", "auc"])
def test_a_row_of_weight_two_is_the_row_twice(tied, name):
    labels, logits, weights, _ = tied
    metric = getattr(metrics, name)
    values = metrics.sigmoid(logits) if name in ("pcoc", "ece_width_10") else logits
    repeats = weights.astype(int)
    assert metric(labels, values, weights) == pytest.approx(metric(labels.repeat(repeats), values.repeat(repeats)))
