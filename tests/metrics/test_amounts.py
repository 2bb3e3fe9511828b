"""Counts and amounts: the deviance against scikit-learn, and means that go through outputs and back."""

import numpy as np
import pytest
import sklearn.metrics

from mtl_jax import metrics
from mtl_jax.tasks import Task


def test_poisson_deviance():
    assert metrics.poisson_deviance([0, 1, 3], [0.5, 1, 2]) == pytest.approx(0.47759688)
    rng = np.random.default_rng(0)
    labels, means, weights = rng.poisson(1.5, 200), rng.gamma(2.0, 1.0, 200), rng.uniform(0, 2, 200)
    expected = sklearn.metrics.mean_poisson_deviance(labels, means, sample_weight=weights)
    assert metrics.poisson_deviance(labels, means, weights) == pytest.approx(expected, rel=1e-12)
    assert metrics.poisson_deviance(labels + 1, labels + 1) == pytest.approx(0, abs=1e-12)


def test_edges_of_the_deviance():
    assert metrics.poisson_deviance([], []) is None
    assert metrics.poisson_deviance([0], [0.0]) == 0
    assert metrics.poisson_deviance([1], [0.0]) == np.inf
    with pytest.raises(ValueError, match="go down to -1.0; expected means > 0"):
        metrics.poisson_deviance([1, 2], [-1.0, 1.0])


@pytest.mark.parametrize("loss", ["poisson", "negative_binomial"])
def test_a_count_goes_through_its_outputs(loss):
    """Also beyond e^20, where the mean grows linearly."""
    task, means = Task("visits", "count", loss=loss), np.array([1e-6, 0.5, 3.0, 4e8, 6e8, 1e12])
    outputs = metrics.outputs_of_mean(task, means)
    assert outputs.shape == (6, *task.output_shape)
    np.testing.assert_allclose(metrics.mean_amounts(task, outputs), means, rtol=1e-9)


def test_a_zero_inflated_mean_goes_through_its_outputs():
    task, means, share = Task("spend", "zero_inflated"), np.array([0.2, 30.0, 1e10]), np.array([0.01, 0.5, 0.999])
    outputs = metrics.outputs_of_mean(task, means, share)
    np.testing.assert_allclose(metrics.mean_amounts(task, outputs), means, rtol=1e-9)
    np.testing.assert_allclose(metrics.sigmoid(outputs[:, 0]), share, rtol=1e-12)


@pytest.mark.parametrize(("a", "scale", "expected"), [((0, 1), 1, 2.24084454), ((0.5, 0), 0.8, 0.85720603)])
def test_printed_means_of_ziln(a, scale, expected):
    outputs = np.array([[*a, np.log(np.expm1(scale - 1e-2))]])
    assert metrics.mean_amounts(Task("spend", "zero_inflated"), outputs)[0] == pytest.approx(expected)
