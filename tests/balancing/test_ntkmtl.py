"""NTKMTL: goldens, its closed forms, and what its exponent trades."""

import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.balancing.base import NoState, aggregate
from mtl_jax.balancing.ntkmtl import ntkmtl
from mtl_jax.errors import ConfigError


def direction_of(jacobian, active=None, **options):
    return aggregate(ntkmtl(**options), jnp.asarray(jacobian, jnp.float32), NoState(), active=active)[0]


def test_goldens(ntkmtl_case, dtype, assert_golden):
    case = ntkmtl_case
    jacobian = jnp.asarray(case["jacobian"], dtype)
    weights, _ = ntkmtl(**case["params"]).weigh(jacobian @ jacobian.T, jnp.zeros(len(jacobian), dtype), NoState(), None)
    assert weights.dtype == dtype
    assert_golden(weights, case["weights"], case, dtype)
    assert_golden(weights @ jacobian, case["direction"], case, dtype)


@pytest.fixture
def jacobian():
    return np.random.default_rng(0).normal(size=(5, 9)) * np.array([[0.01], [1], [3], [100], [0.5]])


def test_half_is_the_sum_of_unit_gradients_times_their_joint_length(jacobian):
    norms = np.linalg.norm(jacobian, axis=1, keepdims=True)
    expected = np.linalg.norm(jacobian) * np.sum(jacobian / norms, axis=0)
    np.testing.assert_allclose(direction_of(jacobian), expected, rtol=1e-4)


def test_zero_is_the_sum(jacobian):
    np.testing.assert_allclose(direction_of(jacobian, exponent=0.0), np.sum(jacobian, axis=0), rtol=1e-5)


def test_two_tasks_move_along_the_bisector():
    """Both see the same cosine with the direction, whatever their lengths."""
    jacobian = np.array([[1.0, 2, 0], [-30, 5, 40]])
    cosines = jacobian @ np.asarray(direction_of(jacobian)) / np.linalg.norm(jacobian, axis=1)
    np.testing.assert_allclose(cosines[0], cosines[1], rtol=1e-5)


def test_shares_of_the_length_swap_at_exponent_one():
    """With kappa = 1 a gradient ten times as long contributes a tenth."""
    contributions = direction_of(np.diag([1.0, 10.0]), exponent=1.0)
    np.testing.assert_allclose(contributions[0] / contributions[1], 10, rtol=1e-5)


def test_one_task_keeps_its_gradient():
    np.testing.assert_allclose(direction_of([[3.0, -4.0]]), [3, -4], rtol=1e-6)


def test_absent_tasks_are_left_out_of_the_sum(jacobian):
    active = [True, False, True, True, False]
    np.testing.assert_allclose(direction_of(jacobian, active), direction_of(jacobian[active]), rtol=1e-5)
    nulled = np.where(np.array(active)[:, None], jacobian, 0)
    np.testing.assert_allclose(direction_of(nulled), direction_of(jacobian[active]), rtol=1e-5)


def test_options_out_of_range_are_refused():
    with pytest.raises(ConfigError, match=r"ntkmtl\(exponent\)"):
        ntkmtl(exponent=np.inf)
