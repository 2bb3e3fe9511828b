"""Fixed weights: goldens, names, and what is refused."""

import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.balancing import aggregate, fixed
from mtl_jax.errors import ConfigError
from mtl_jax.tasks import Task

TASKS = [Task("click", "binary"), Task("spend", "regression")]


def test_goldens(fixed_case, dtype, assert_golden):
    jacobian = jnp.asarray(fixed_case["jacobian"], dtype)
    balancer = fixed(**fixed_case["params"])
    weights, _ = balancer.weigh(None, jnp.ones(len(jacobian), dtype), balancer.init(len(jacobian)), None)
    direction, _ = aggregate(balancer, jacobian, balancer.init(len(jacobian)))
    assert weights.dtype == direction.dtype == dtype
    assert_golden(weights, fixed_case["weights"], fixed_case, dtype)
    assert_golden(direction, fixed_case["direction"], fixed_case, dtype)


@pytest.mark.parametrize("weights", [{"spend": 3.0, "click": 0.5}, [0.5, 3.0], np.array([0.5, 3.0])])
def test_names_and_positions_mean_the_same(weights):
    balancer = fixed(weights=weights).for_tasks(TASKS)
    direction, _ = aggregate(balancer, jnp.eye(2), balancer.init(2))
    np.testing.assert_array_equal(direction, [0.5, 3.0])


def test_one_number_holds_for_every_task():
    balancer = fixed(weights=2.0).for_tasks(TASKS)
    direction, _ = aggregate(balancer, jnp.eye(2), balancer.init(2))
    np.testing.assert_array_equal(direction, [2.0, 2.0])


def test_an_inactive_tasks_weight_goes_to_nobody():
    balancer = fixed(weights=[1.0, 2.0, 4.0])
    direction, _ = aggregate(balancer, jnp.eye(3), balancer.init(3), active=[True, False, True])
    np.testing.assert_array_equal(direction, [1.0, 0.0, 4.0])


@pytest.mark.parametrize("weights", [[1.0, -0.5], {"click": -1.0}, -2.0, [np.nan, 1.0], {"click": None}, "heavy"])
def test_a_weight_that_is_no_number_or_negative_is_refused(weights):
    with pytest.raises(ConfigError, match=r"fixed\(weights\)"):
        fixed(weights=weights)


@pytest.mark.parametrize("weights", [[1.0, 2.0, 3.0], {"click": 1.0}, {"click": 1.0, "buy": 1.0}])
def test_weights_of_other_tasks_are_refused(weights):
    with pytest.raises(ConfigError, match="task"):
        fixed(weights=weights).for_tasks(TASKS)


def test_names_need_the_tasks():
    with pytest.raises(ConfigError, match="for_tasks"):
        fixed(weights={"click": 1.0, "spend": 1.0}).init(2)
