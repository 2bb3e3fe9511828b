"""PE-LTR: goldens, its bounds, MGDA inside the simplex, and the least squares of the paper."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.balancing.base import aggregate, gramian, weigh
from mtl_jax.balancing.mgda import mgda
from mtl_jax.balancing.pe_ltr import nearest_affine, pe_ltr
from mtl_jax.errors import ConfigError
from mtl_jax.tasks import Task


def test_goldens(pe_ltr_case, dtype, assert_golden):
    case = pe_ltr_case
    jacobian = jnp.asarray(case["jacobian"], dtype)
    num_tasks = len(jacobian)
    balancer = pe_ltr(**case["params"])
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


def test_weights_keep_their_bounds_and_sum_to_1():
    bounds = np.array([0.3, 0.05, 0.0, 0.2])
    balancer = pe_ltr(min_weight=bounds)
    for seed in range(5):
        rows = jnp.asarray(np.random.default_rng(seed).normal(size=(4, 6)))
        weights, _, _ = weigh(balancer, gramian(rows), jnp.ones(4), balancer.init(4), None)
        assert np.all(weights >= bounds - 1e-6)
        np.testing.assert_allclose(np.sum(weights), 1, rtol=1e-5)


def test_is_mgda_where_no_weight_is_negative():
    for seed in range(5):
        rows = np.eye(3) + np.random.default_rng(seed).uniform(-0.2, 0.2, size=(3, 3))
        np.testing.assert_allclose(direction_of(pe_ltr(), rows), direction_of(mgda(), rows), rtol=1e-3)


@pytest.mark.parametrize("num_params", [2, 3, 6])
def test_relaxed_weights_are_the_least_squares_solution_of_the_papers_system(num_params):
    """Ranks 2, 3 and 4 of 4 rows: numpy's solution of least length of [G 1; 1' 0] [x; mu] = [-G c; 1 - sum c]."""
    rows = np.random.default_rng(num_params).normal(size=(4, num_params))
    bounds = np.array([0.1, 0.2, 0.0, 0.3])
    products = rows @ rows.T
    system = np.block([[products, np.ones((4, 1))], [np.ones((1, 4)), np.zeros((1, 1))]])
    target = np.append(-products @ bounds, 1 - np.sum(bounds))
    expected = np.linalg.lstsq(system, target, rcond=1e-10)[0][:4]
    with jax.enable_x64(True):
        relaxed = nearest_affine(jnp.asarray(products), jnp.asarray(bounds), jnp.ones(4, bool)) - bounds
    np.testing.assert_allclose(relaxed, expected, rtol=1e-7, atol=1e-9)


def test_bounds_of_absent_tasks_are_not_used():
    balancer = pe_ltr(min_weight=[0.5, 0.4])
    active = jnp.array([True, False])
    weights, _, _ = weigh(balancer, jnp.eye(2), jnp.ones(2), balancer.init(2), None, active)
    np.testing.assert_allclose(weights, [1.0, 0.0])


@pytest.mark.parametrize("bounds", [-0.1, 1.0, [0.6, 0.5], {"a": 0.9, "b": 0.1}])
def test_bounds_out_of_range_are_refused(bounds):
    with pytest.raises(ConfigError, match=r"pe_ltr\(min_weight\)"):
        pe_ltr(min_weight=bounds)


def test_one_bound_for_too_many_tasks_is_refused():
    with pytest.raises(ConfigError, match=r"pe_ltr\(min_weight\) sums to 1.2"):
        pe_ltr(min_weight=0.4).for_tasks([Task(name, "binary") for name in "abc"])
