"""Regression errors and the way to original units and back."""

import numpy as np
import pytest
import sklearn.metrics

from mtl_jax import metrics
from mtl_jax.tasks import Task


def test_equals_scikit_learn_with_weights():
    rng = np.random.default_rng(0)
    targets, predictions, weights = rng.normal(size=50), rng.normal(size=50), rng.random(50)
    assert metrics.mae(targets, predictions, weights) == pytest.approx(
        sklearn.metrics.mean_absolute_error(targets, predictions, sample_weight=weights)
    )
    assert metrics.rmse(targets, predictions, weights) == pytest.approx(
        sklearn.metrics.root_mean_squared_error(targets, predictions, sample_weight=weights)
    )
    assert metrics.rmse([], []) is None and metrics.mae([], []) is None


def test_worked_values():
    assert metrics.rmse([1, 2, 5], [1, 5, 1]) == pytest.approx(np.sqrt(25 / 3))
    assert metrics.mae([1, 2, 5], [1, 5, 1]) == pytest.approx(7 / 3)
    assert metrics.rmse_clip([1, 5], [-2, 8], 1, 5) == 0
    assert metrics.mae_clip([1, 5], [3, 8], 1, 5) == 1


@pytest.mark.parametrize("transform", ["none", "log1p"])
def test_units_round_trip(transform):
    task = Task("spend", "regression", transform=transform, mean=1.5, std=0.8)
    values = np.array([0.0, 0.3, 7.0, 1e4])
    np.testing.assert_allclose(metrics.to_original(task, metrics.from_original(task, values)), values, atol=1e-12)


def test_standardised_zero_is_the_mean_of_the_transformed_target():
    assert metrics.to_original(Task("r", "regression", mean=3.2, std=1.1), 0) == 3.2
    task = Task("r", "regression", transform="log1p", mean=np.log(8), std=2.0)
    assert metrics.to_original(task, 0) == pytest.approx(7)
    assert metrics.from_original(task, 2**5 - 1) == pytest.approx(np.log(4) / 2)
