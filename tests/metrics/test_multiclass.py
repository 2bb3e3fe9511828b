"""Class metrics against worked values and scikit-learn."""

import numpy as np
import pytest
import sklearn.metrics

from mtl_jax import metrics
from mtl_jax.metrics.multiclass import present_classes

LABELS, PREDICTIONS = np.array([0, 0, 1, 1, 2, 2]), np.array([0, 1, 1, 1, 2, 0])


def test_worked_values():
    assert metrics.accuracy(LABELS, PREDICTIONS) == pytest.approx(2 / 3)
    assert metrics.macro_f1(LABELS, PREDICTIONS) == pytest.approx(0.65555556, abs=1e-8)


def test_an_absent_class_is_left_out():
    """Class 2 renamed 3: the same value, and class 2 is not among the present ones."""
    renamed = [np.where(x == 2, 3, x) for x in (LABELS, PREDICTIONS)]
    assert metrics.macro_f1(*renamed) == metrics.macro_f1(LABELS, PREDICTIONS)
    np.testing.assert_array_equal(present_classes(*renamed), [0, 1, 3])


def test_equals_scikit_learn_with_weights():
    rng = np.random.default_rng(0)
    labels, predictions, weights = rng.integers(0, 5, 80), rng.integers(0, 5, 80), rng.random(80)
    assert metrics.macro_f1(labels, predictions, weights) == pytest.approx(
        sklearn.metrics.f1_score(labels, predictions, average="macro", sample_weight=weights)
    )
    assert metrics.accuracy(labels, predictions, weights) == pytest.approx(
        sklearn.metrics.accuracy_score(labels, predictions, sample_weight=weights)
    )
    logits = rng.normal(size=(80, 5))
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert metrics.class_logloss(labels, logits, weights) == pytest.approx(
        sklearn.metrics.log_loss(labels, probabilities, sample_weight=weights, labels=range(5))
    )


def test_class_logloss_far_out():
    assert metrics.class_logloss([0, 1], [[1e4, 0, 0], [1e4, 0, 0]]) == pytest.approx(5e3)
    two = np.array([[0.0, 1.3], [0.0, -0.4]])
    assert metrics.class_logloss([1, 0], two) == pytest.approx(metrics.logloss([1, 0], two[:, 1]))


def test_no_rows():
    assert metrics.accuracy([], []) is None
    assert metrics.macro_f1([], []) is None
    assert metrics.macro_f1([0], [0], [0.0]) is None
