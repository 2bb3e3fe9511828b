"""Metrics of ordered classes against printed values and scikit-learn."""

import numpy as np
import pytest
import sklearn.metrics

from mtl_jax import metrics

LABELS, PREDICTIONS = [0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 2, 0]


def test_printed_values():
    assert metrics.accuracy(LABELS, PREDICTIONS) == pytest.approx(0.66666667)
    assert metrics.macro_f1(LABELS, PREDICTIONS) == pytest.approx(0.65555556)
    assert metrics.qwk(LABELS, PREDICTIONS, 3) == pytest.approx(0.28571429)
    renamed = [[3 if y == 2 else y for y in ids] for ids in (LABELS, PREDICTIONS)]
    assert metrics.macro_f1(*renamed) == pytest.approx(0.65555556)
    assert metrics.qwk(*renamed, 4) == pytest.approx(0.375)


def test_qwk_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    labels, predictions, weights = rng.integers(0, 5, 300), rng.integers(0, 4, 300), rng.uniform(0, 2, 300)
    expected = sklearn.metrics.cohen_kappa_score(labels, predictions, weights="quadratic", sample_weight=weights)
    assert metrics.qwk(labels, predictions, 5, weights) == pytest.approx(expected, rel=1e-12)
    assert metrics.qwk(labels, predictions, 9, weights) == pytest.approx(expected, rel=1e-12)


def test_qwk_of_constants():
    assert metrics.qwk(LABELS, [1] * 6, 3) == 0
    assert metrics.qwk(LABELS, LABELS, 3) == 1
    assert metrics.qwk([1, 1], [1, 1], 3) is None
    assert metrics.qwk([], [], 3) is None
    with pytest.raises(ValueError, match=r"predictions lie in \[0, 3\]; expected ids in \[0, 3\)"):
        metrics.qwk([0, 1], [0, 3], 3)


def test_cumulative_logits_and_back():
    """Probabilities -> logits of "at least" -> log loss of these probabilities, as scikit-learn has it, and the median."""
    rng = np.random.default_rng(1)
    probabilities = rng.dirichlet([1, 1, 1, 1], 50)
    labels, weights = rng.integers(0, 4, 50), rng.uniform(0, 2, 50)
    logits = metrics.cumulative_logits(probabilities)
    expected = sklearn.metrics.log_loss(labels, probabilities, sample_weight=weights, labels=range(4))
    assert metrics.ordinal_logloss(labels, logits, weights) == pytest.approx(expected, rel=1e-9)
    medians = (np.cumsum(probabilities, axis=1) > 0.5).argmax(axis=1)
    np.testing.assert_array_equal(metrics.ordinal_classes(logits), medians)


def test_printed_ordinal_probabilities():
    cumulative = np.array([[1.3, -0.2]] * 3)
    for label, p in enumerate((0.21416502, 0.33566898, 0.45016600)):
        assert np.exp(-metrics.ordinal_logloss([label], cumulative[:1])) == pytest.approx(p, rel=1e-7)
    assert metrics.ordinal_classes(cumulative)[0] == 1


def test_far_out_the_log_loss_is_finite_and_a_tie_of_rounding_too():
    cumulative = np.array([[1e4, 1e4], [-1e4, -1e4]])
    for label in range(3):
        assert np.isfinite(metrics.ordinal_logloss([label, label], cumulative))
