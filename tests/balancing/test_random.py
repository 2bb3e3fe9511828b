"""Random loss weighting: given draws, and the distributions of its weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.balancing.base import NoState
from mtl_jax.balancing.random import random, weights_from_draws
from mtl_jax.errors import ConfigError


def many(distribution, num_tasks, active=None):
    """Weights of 20,000 keys."""
    losses, balancer = jnp.zeros(num_tasks), random(distribution=distribution)
    keys = jax.random.split(jax.random.key(0), 20_000)
    draw = jax.jit(jax.vmap(lambda key: balancer.weigh(None, losses, NoState(), key, active=active)[0]))
    return np.asarray(draw(keys))


def test_goldens(random_case, dtype, assert_golden):
    case = random_case
    weights = weights_from_draws(jnp.asarray(case["draws"], dtype), None)
    assert weights.dtype == dtype
    assert_golden(weights, case["weights"], case, dtype)
    assert_golden(weights @ jnp.asarray(case["jacobian"], dtype), case["direction"], case, dtype)


@pytest.mark.parametrize("distribution", ["normal", "dirichlet"])
def test_weights_lie_on_the_simplex_and_prefer_no_task(distribution):
    weights = many(distribution, 4)
    assert np.all(weights > 0)
    np.testing.assert_allclose(weights.sum(axis=1), np.ones(len(weights)), rtol=1e-5)
    np.testing.assert_allclose(weights.mean(axis=0), np.full(4, 0.25), atol=0.01)


def test_normal_weights_have_the_odds_of_normal_draws():
    """log(w_i / w_j) of a softmax of standard normals is normal with variance 2."""
    weights = many("normal", 3)
    odds = np.log(weights[:, 0] / weights[:, 2])
    np.testing.assert_allclose([odds.mean(), odds.var(), np.mean(odds**4)], [0, 2, 12], atol=0.6)
    np.testing.assert_allclose(odds.var(), 2, atol=0.1)


def test_dirichlet_weights_are_uniform_on_the_simplex():
    """Each is Beta(1, K - 1): mean 1/K, variance (K - 1) / (K^2 (K + 1)), and P(w > x) = (1 - x)^(K - 1)."""
    weights = many("dirichlet", 3)
    np.testing.assert_allclose(weights.var(axis=0), np.full(3, 2 / (9 * 4)), atol=2e-3)
    for level in (0.1, 0.5, 0.9):
        np.testing.assert_allclose(np.mean(weights > level, axis=0), np.full(3, (1 - level) ** 2), atol=0.015)


def test_an_absent_task_leaves_the_distribution_of_fewer_tasks():
    weights = many("dirichlet", 3, jnp.array([True, False, True]))
    assert np.all(weights[:, 1] == 0)
    np.testing.assert_allclose(weights.sum(axis=1), np.ones(len(weights)), rtol=1e-5)
    np.testing.assert_allclose(weights[:, 0].var(), 1 / 12, atol=3e-3)  # uniform on [0, 1]


def test_a_key_decides():
    weights = [random().weigh(None, jnp.zeros(3), NoState(), jax.random.key(seed))[0] for seed in (0, 0, 1)]
    np.testing.assert_array_equal(weights[0], weights[1])
    assert not np.array_equal(weights[0], weights[2])


def test_another_distribution_is_refused():
    with pytest.raises(ConfigError, match=r"random\(distribution\) is 'uniform'; expected one of"):
        random(distribution="uniform")
