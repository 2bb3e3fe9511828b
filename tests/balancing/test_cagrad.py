"""CAGrad: goldens, its ball, and the best worst gain in it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.balancing.base import aggregate, gramian, weigh
from mtl_jax.balancing.cagrad import cagrad
from mtl_jax.balancing.mgda import mgda
from mtl_jax.errors import ConfigError


def test_goldens(cagrad_case, dtype, assert_golden):
    case = cagrad_case
    jacobian = jnp.asarray(case["jacobian"], dtype)
    num_tasks = len(jacobian)
    balancer = cagrad(**case["params"])
    losses = jnp.asarray(case.get("losses", [1.0] * num_tasks), dtype)
    active = jnp.asarray(case.get("active", [True] * num_tasks))
    state = balancer.init(num_tasks)
    weights, _, _ = weigh(balancer, gramian(jacobian), losses, state, None, active)
    direction, _ = aggregate(balancer, jacobian, state, losses=losses, active=active)
    assert weights.dtype == direction.dtype == dtype
    if case["weights"] is not None:
        assert_golden(weights, case["weights"], case, dtype)
    assert_golden(direction, case["direction"], case, dtype)


def direction_of(balancer, jacobian, **options):
    jacobian = jnp.asarray(jacobian, float)
    return np.asarray(aggregate(balancer, jacobian, balancer.init(len(jacobian)), **options)[0])


ROWS = np.random.default_rng(7).normal(0.2, 1.0, size=(4, 6))


def test_c_0_is_the_mean():
    np.testing.assert_allclose(direction_of(cagrad(c=0.0), ROWS), np.mean(ROWS, axis=0), atol=1e-6)


@pytest.mark.parametrize("c", [0.3, 1.0, 2.0])
def test_direction_is_on_the_ball_and_nobody_does_better(c):
    """Random points of the ball never have a larger worst gain."""
    mean = np.mean(ROWS, axis=0)
    with jax.enable_x64(True):
        direction = direction_of(cagrad(c=c), ROWS)
    radius = c * np.linalg.norm(mean)
    np.testing.assert_allclose(np.linalg.norm(direction - mean), radius, rtol=1e-8)
    best = np.min(ROWS @ direction)
    rng = np.random.default_rng(0)
    for spread in (1.0, 0.1, 0.01):
        others = direction - mean + spread * radius * rng.normal(size=(5000, 6))
        others = mean + radius * others / np.linalg.norm(others, axis=1, keepdims=True)
        assert np.max(np.min(others @ ROWS.T, axis=1)) <= best + 1e-9


def test_from_1_on_no_task_is_harmed():
    for seed in range(5):
        rows = np.random.default_rng(seed).normal(0.1, 1.0, size=(3, 5))
        assert np.min(rows @ direction_of(cagrad(c=1.0), rows)) >= -1e-4


def test_a_large_ball_gives_the_direction_of_mgda():
    direction, shortest = direction_of(cagrad(c=1e4), ROWS), direction_of(mgda(), ROWS)
    cosine = direction @ shortest / np.linalg.norm(direction) / np.linalg.norm(shortest)
    assert cosine > 1 - 1e-5


def test_rescaling():
    plain = direction_of(cagrad(c=0.5), ROWS)
    np.testing.assert_allclose(direction_of(cagrad(c=0.5, rescale="one_plus_c"), ROWS), plain / 1.5, atol=1e-6)
    np.testing.assert_allclose(direction_of(cagrad(c=0.5, rescale="one_plus_c_squared"), ROWS), plain / 1.25, atol=1e-6)


def test_goes_on_where_0_is_in_the_hull_and_the_ball_is_small():
    """Three gradients around 0, of unequal length: MGDA stops, a small ball around the mean has no 0."""
    rows = np.array([[1.0, 0.0], [-0.5, 0.8], [-0.6, -3.0]])
    assert np.linalg.norm(direction_of(mgda(), rows)) < 1e-3
    assert np.linalg.norm(direction_of(cagrad(c=0.4), rows)) > 0.1
    np.testing.assert_allclose(direction_of(cagrad(c=2.0), rows), 0, atol=1e-6)


def test_an_unknown_rescaling_is_refused():
    with pytest.raises(ConfigError, match=r"cagrad\(rescale\) is 'mean'"):
        cagrad(rescale="mean")


@pytest.mark.parametrize("options", [{"c": -0.1}, {"c": np.inf}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match=f"cagrad\\({next(iter(options))}\\)"):
        cagrad(**options)
