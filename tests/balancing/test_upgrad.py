"""UPGrad: goldens, no harm to any task, linearity, and PCGrad for two tasks."""

import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.balancing.base import aggregate, gramian, weigh
from mtl_jax.balancing.pcgrad import projection_weights
from mtl_jax.balancing.upgrad import upgrad
from mtl_jax.errors import ConfigError
from mtl_jax.tasks import Task


def test_goldens(upgrad_case, dtype, assert_golden):
    case = upgrad_case
    jacobian = jnp.asarray(case["jacobian"], dtype)
    num_tasks = len(jacobian)
    balancer = upgrad(**case["params"])
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


ROWS = np.array([[1.0, 2, 0, 1], [-1, 1, 1, 0], [6, -3, 3, -9]])  # the third conflicts with the first


def test_no_task_is_harmed():
    for seed in range(5):
        rows = np.random.default_rng(seed).normal(0.1, 1.0, size=(3, 5)) * 10.0 ** np.arange(-1, 2)[:, None]
        direction = direction_of(upgrad(), rows)
        lengths = np.linalg.norm(rows, axis=1)
        assert np.min(rows @ direction / lengths) >= -1e-4 * np.linalg.norm(direction)


def test_without_conflict_weights_are_the_preference():
    balancer = upgrad(preference=[0.3, 0.5])
    weights, _, _ = weigh(balancer, jnp.array([[1.0, 0.2], [0.2, 4.0]]), jnp.ones(2), balancer.init(2), None)
    np.testing.assert_array_equal(weights, np.array([0.3, 0.5], weights.dtype))


def test_weights_are_at_least_the_preference():
    balancer = upgrad()
    weights, _, _ = weigh(balancer, jnp.asarray(ROWS @ ROWS.T), jnp.ones(3), balancer.init(3), None)
    assert np.all(weights >= 1 / 3 - 1e-6) and np.max(weights) > 0.36


def test_small_gradients_are_no_special_case():
    np.testing.assert_allclose(direction_of(upgrad(), 1e-6 * ROWS), 1e-6 * direction_of(upgrad(), ROWS), atol=1e-10)


def test_names_are_resolved():
    tasks = [Task("click", "binary"), Task("buy", "binary")]
    bound = upgrad(preference={"buy": 2.0, "click": 1.0}).for_tasks(tasks)
    weights, _, _ = weigh(bound, jnp.eye(2), jnp.ones(2), bound.init(2), None)
    np.testing.assert_array_equal(weights, [1.0, 2.0])


def test_linear_in_positive_factors_of_the_gradients():
    rng = np.random.default_rng(6)
    first, second = rng.uniform(0.1, 2.0, size=(2, 3, 1))
    both = direction_of(upgrad(), (first + second) * ROWS)
    np.testing.assert_allclose(
        direction_of(upgrad(), first * ROWS) + direction_of(upgrad(), second * ROWS), both, atol=1e-4
    )


def test_two_tasks_are_half_of_pcgrad():
    rows = np.array([[1.0, 2.0, -1.0], [-3.0, 0.5, 0.5]])
    weights = projection_weights(jnp.asarray(rows @ rows.T), jnp.array([[0, 1], [0, 1]]))
    np.testing.assert_allclose(direction_of(upgrad(), rows), 0.5 * weights @ rows, rtol=1e-5)


@pytest.mark.parametrize("options", [{"preference": -1.0}, {"preference": [1.0, np.inf]}, {"reg_eps": -1e-4}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match=f"upgrad\\({next(iter(options))}\\)"):
        upgrad(**options)
