"""ConFIG: goldens, cosines in proportion to the preference, its length, its kin."""

import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.balancing.base import aggregate, gramian, weigh
from mtl_jax.balancing.config import config
from mtl_jax.balancing.imtl_g import imtl_g
from mtl_jax.errors import ConfigError


def test_goldens(config_case, dtype, assert_golden):
    case = config_case
    jacobian = jnp.asarray(case["jacobian"], dtype)
    num_tasks = len(jacobian)
    balancer = config(**case["params"])
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


ROWS = np.random.default_rng(10).normal(size=(4, 7)) * np.array([[0.01], [1.0], [5.0], [0.3]])
UNITS = ROWS / np.linalg.norm(ROWS, axis=1)[:, None]


def test_cosines_are_in_proportion_to_the_preference():
    preference = np.array([1.0, 2.0, 0.5, 1.0])
    cosines = UNITS @ direction_of(config(preference=preference), ROWS)
    np.testing.assert_allclose(cosines / cosines[0], preference, rtol=1e-3)


def test_length_is_the_sum_of_the_projections():
    direction = direction_of(config(), ROWS)
    length = np.linalg.norm(direction)
    np.testing.assert_allclose(np.sum(ROWS @ direction) / length, length, rtol=1e-4)


def test_is_parallel_to_imtl_g():
    one, other = direction_of(config(), ROWS), direction_of(imtl_g(), ROWS)
    np.testing.assert_allclose(one / np.linalg.norm(one), other / np.linalg.norm(other), atol=1e-4)


def test_linear_in_positive_factors_of_the_gradients():
    first, second = np.random.default_rng(11).uniform(0.1, 2.0, size=(2, 4, 1))
    both = direction_of(config(), (first + second) * ROWS)
    parts = direction_of(config(), first * ROWS) + direction_of(config(), second * ROWS)
    np.testing.assert_allclose(parts, both, atol=1e-3)


def test_is_the_pseudo_inverse_of_the_unit_gradients():
    """The authors' form, on dependent gradients too."""
    rows = np.vstack([ROWS[:3], ROWS[1] + ROWS[2]])
    units = rows / np.linalg.norm(rows, axis=1)[:, None]
    direction = np.linalg.pinv(units, rcond=1e-6) @ np.ones(4)
    direction /= np.linalg.norm(direction)
    np.testing.assert_allclose(direction_of(config(), rows), np.sum(rows @ direction) * direction, rtol=1e-3, atol=1e-4)


def test_opposite_gradients_cancel():
    np.testing.assert_array_equal(direction_of(config(), [[0.3, 0.1], [-0.6, -0.2]]), 0)


def test_a_negative_preference_is_refused():
    with pytest.raises(ConfigError, match=r"config\(preference\)"):
        config(preference=[1.0, -1.0])
