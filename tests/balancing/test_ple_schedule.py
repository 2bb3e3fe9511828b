"""The schedule of PLE: its golden, its periods, constant weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.balancing.base import aggregate
from mtl_jax.balancing.fixed import fixed
from mtl_jax.balancing.ple_schedule import ple_schedule
from mtl_jax.errors import ConfigError
from mtl_jax.tasks import Task


def weights_by_call(balancer, num_calls, active=None):
    state, rows = balancer.init(2), []
    for _ in range(num_calls):
        weights, state = balancer.weigh(None, jnp.zeros(2), state, None, active=active)
        rows.append(np.asarray(weights))
    return np.stack(rows), state


def test_goldens(ple_schedule_case, dtype, assert_golden):
    case = ple_schedule_case
    balancer = ple_schedule(**case["params"])
    state = balancer.init(2)
    for _ in range(case["epoch"]):
        state = balancer.end_epoch(state)
    jacobian = jnp.asarray(case["jacobian"], dtype)
    weights, _ = balancer.weigh(None, jnp.zeros(2, dtype), state, None)
    direction, _ = aggregate(balancer, jacobian, state)
    assert weights.dtype == direction.dtype == dtype
    assert_golden(weights, case["weights"], case, dtype)
    assert_golden(direction, case["direction"], case, dtype)


def test_weights_are_the_derivative_of_the_objective(ple_schedule_case):
    """O = sum_i initial_i decay_i^t L_i is linear: any step gives its derivative."""
    params, epoch = ple_schedule_case["params"], ple_schedule_case["epoch"]
    factors = [np.prod([a] + [b] * epoch) for a, b in zip(params["initial"], params["decay"], strict=True)]
    losses, step = np.array([0.5, 2.0]), 0.25
    expected = [(np.dot(factors, losses + s) - np.dot(factors, losses - s)) / (2 * step) for s in step * np.eye(2)]
    with jax.enable_x64(True):
        rows, _ = weights_by_call(ple_schedule(**params, period=1), epoch + 1)
    np.testing.assert_allclose(rows[-1], expected, rtol=1e-12)


def test_periods_of_calls():
    rows, _ = weights_by_call(ple_schedule(initial=[1.0, 4.0], decay=[0.5, 2.0], period=3), 7)
    np.testing.assert_array_equal(rows[:, 0], [1, 1, 1, 0.5, 0.5, 0.5, 0.25])
    np.testing.assert_array_equal(rows[:, 1], [4, 4, 4, 8, 8, 8, 16])


def test_only_the_end_of_an_epoch_ends_a_period_of_an_epoch():
    balancer = ple_schedule(decay=0.5)
    assert balancer.by_epoch and not ple_schedule(period=3).by_epoch
    rows, state = weights_by_call(balancer, 4)
    np.testing.assert_array_equal(rows, np.ones((4, 2)))
    np.testing.assert_array_equal(balancer.weigh(None, jnp.zeros(2), balancer.end_epoch(state), None)[0], [0.5, 0.5])
    counting = ple_schedule(decay=0.5, period=3)
    assert counting.end_epoch(counting.init(2)).periods == 0


def test_decay_of_1_is_fixed_weights_and_of_0_ends_a_task():
    given = [0.5, 3.0]
    rows, _ = weights_by_call(ple_schedule(initial=given, period=1), 3)
    expected, _ = fixed(weights=given).weigh(None, jnp.zeros(2), fixed(weights=given).init(2), None)
    np.testing.assert_array_equal(rows, np.tile(expected, (3, 1)))
    rows, _ = weights_by_call(ple_schedule(initial=given, decay=[0.0, 1.0], period=1), 3)
    np.testing.assert_array_equal(rows[:, 0], [0.5, 0, 0])


def test_time_passes_for_an_absent_task():
    rows, state = weights_by_call(ple_schedule(decay=0.5, period=1), 2, jnp.array([True, False]))
    np.testing.assert_array_equal(rows, [[1, 0], [0.5, 0]])
    assert state.periods == 2


def test_options_go_by_task_name():
    tasks = [Task("click", "binary"), Task("spend", "regression")]
    bound = ple_schedule(initial={"spend": 2.0, "click": 1.0}, decay={"click": 0.5, "spend": 1.0}, period=1)
    np.testing.assert_array_equal(weights_by_call(bound.for_tasks(tasks), 2)[0], [[1, 2], [0.5, 2]])


@pytest.mark.parametrize("options", [{"initial": -1.0}, {"decay": [0.9, -0.1]}, {"decay": np.inf}, {"period": 0}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match=f"ple_schedule\\({next(iter(options))}\\)"):
        ple_schedule(**options)


def test_a_list_of_another_length_is_refused():
    with pytest.raises(ConfigError, match=r"ple_schedule\(decay\) has 3 values"):
        ple_schedule(decay=[1.0, 1.0, 1.0]).init(2)
