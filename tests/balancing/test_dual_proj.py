"""Dual projection: goldens, no harm to any task, and one conflict by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.balancing.base import aggregate, gramian, weigh
from mtl_jax.balancing.dual_proj import dual_proj
from mtl_jax.errors import ConfigError
from mtl_jax.tasks import Task


def test_goldens(dual_proj_case, dtype, assert_golden):
    case = dual_proj_case
    jacobian = jnp.asarray(case["jacobian"], dtype)
    num_tasks = len(jacobian)
    balancer = dual_proj(**case["params"])
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
        direction = direction_of(dual_proj(), rows)
        lengths = np.linalg.norm(rows, axis=1)
        assert np.min(rows @ direction / lengths) >= -1e-4 * np.linalg.norm(direction)


def test_without_conflict_weights_are_the_preference():
    balancer = dual_proj(preference=[0.3, 0.5])
    weights, _, _ = weigh(balancer, jnp.array([[1.0, 0.2], [0.2, 4.0]]), jnp.ones(2), balancer.init(2), None)
    np.testing.assert_array_equal(weights, np.array([0.3, 0.5], weights.dtype))


def test_weights_are_at_least_the_preference():
    balancer = dual_proj()
    weights, _, _ = weigh(balancer, jnp.asarray(ROWS @ ROWS.T), jnp.ones(3), balancer.init(3), None)
    assert np.all(weights >= 1 / 3 - 1e-6) and np.max(weights) > 0.36


def test_small_gradients_are_no_special_case():
    np.testing.assert_allclose(
        direction_of(dual_proj(), 1e-6 * ROWS), 1e-6 * direction_of(dual_proj(), ROWS), atol=1e-9
    )


def test_names_are_resolved():
    tasks = [Task("click", "binary"), Task("buy", "binary")]
    bound = dual_proj(preference={"buy": 2.0, "click": 1.0}).for_tasks(tasks)
    weights, _, _ = weigh(bound, jnp.eye(2), jnp.ones(2), bound.init(2), None)
    np.testing.assert_array_equal(weights, [1.0, 2.0])


def test_one_conflict_by_hand():
    """What harms the first task is taken out of the preferred gradient."""
    rows, preference = np.array([[0.0, 1.0], [1.0, -3.0]]), [1.0, 1.0]
    preferred = np.array([1.0, -2.0])  # conflicts with (0, 1): the projection leaves (1, 0)
    np.testing.assert_allclose(preferred, np.sum(rows, axis=0))
    np.testing.assert_allclose(direction_of(dual_proj(preference=preference), rows), [1.0, 0.0], atol=1e-5)


def test_the_preferred_gradient_is_kept_where_it_harms_nobody():
    rows = np.array([[4.0, 1.0], [-1.0, 1.0]])
    np.testing.assert_allclose(direction_of(dual_proj(preference=[0.2, 1.0]), rows), [-0.2, 1.2], rtol=1e-6)


@pytest.mark.parametrize("options", [{"preference": -1.0}, {"preference": [1.0, np.inf]}, {"reg_eps": -1e-4}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match=f"dual_proj\\({next(iter(options))}\\)"):
        dual_proj(**options)
