"""M-ConFIG: goldens, the paper's algorithm on explicit gradients, Adam as its limit, turns."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtl_jax.balancing.base import aggregate
from mtl_jax.balancing.m_config import m_config, next_in_turn
from mtl_jax.errors import ConfigError
from mtl_jax.tasks import Task


@jax.jit
def step(balancer, jacobian, state, active=None):
    return aggregate(balancer, jacobian, state, active=active)


def test_goldens(m_config_case, dtype, assert_golden):
    case = m_config_case
    balancer = m_config(**case["params"])
    jacobian = case.get("override_jacobian", case["jacobian"])
    state = balancer.init(len(jacobian), jnp.zeros(len(jacobian[0]), dtype))
    for call in [*case.get("history", []), {"task_index": case["task_index"], "jacobian": jacobian}]:
        assert call["task_index"] == [int(state.turn)]
        direction, state = step(balancer, jnp.asarray(call["jacobian"], dtype), state)
    assert direction.dtype == dtype
    assert_golden(direction, case["direction"], case, dtype)


def conflict_free(rows):
    """ConFIG by the pseudo-inverse of the unit gradients themselves."""
    units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    best = np.linalg.pinv(units) @ np.ones(len(rows))
    best /= np.linalg.norm(best)
    return np.sum(rows @ best) * best


@pytest.mark.parametrize("tasks_per_call", [1, 2, 3])
def test_equals_the_papers_algorithm(tasks_per_call):
    rng, beta_1, beta_2 = np.random.default_rng(0), 0.8, 0.95
    momentum, steps, turn, t = np.zeros((3, 6)), np.zeros(3), 0, 0
    first, second = np.zeros(6), np.zeros(6)
    balancer = m_config(beta_1=beta_1, beta_2=beta_2, tasks_per_call=tasks_per_call)
    with jax.enable_x64(True):
        state = balancer.init(3, jnp.zeros(6))
        for _ in range(8):
            jacobian = rng.normal(size=(3, 6)) * np.array([[1], [5], [0.2]])
            for _ in range(tasks_per_call):
                momentum[turn] = beta_1 * momentum[turn] + (1 - beta_1) * jacobian[turn]
                steps[turn] += 1
                turn = (turn + 1) % 3
            expected = np.zeros(6)
            if np.all(steps > 0):
                t += 1
                smooth = conflict_free(momentum / (1 - beta_1**steps)[:, None])
                old, first = first, smooth * (1 - beta_1**t)
                second = beta_2 * second + (1 - beta_2) * ((first - beta_1 * old) / (1 - beta_1)) ** 2
                root = np.sqrt(second / (1 - beta_2**t))
                expected = smooth / (root + 1e-8 * np.max(root))
            direction, state = step(balancer, jnp.asarray(jacobian), state)
            np.testing.assert_allclose(direction, expected, rtol=1e-8)
            assert state.turn == turn


def test_one_task_is_adam():
    rows = np.random.default_rng(1).normal(size=(10, 1, 5)).astype(np.float32)
    balancer, adam = m_config(), optax.scale_by_adam(0.9, 0.999, eps=0)
    state, adam_state = balancer.init(1, jnp.zeros(5)), adam.init(jnp.zeros(5))
    for row in rows:
        direction, state = step(balancer, jnp.asarray(row), state)
        expected, adam_state = adam.update(jnp.asarray(row[0]), adam_state)
        np.testing.assert_allclose(direction, expected, rtol=2e-3, atol=1e-4)


def test_tasks_out_of_turn_are_not_read():
    rng = np.random.default_rng(2)
    balancer = m_config(tasks_per_call=2)
    state = other = balancer.init(3, jnp.zeros(4))
    for turn in ([0, 1], [2, 0], [1, 2], [0, 1]):
        rows = rng.normal(size=(3, 4)).astype(np.float32)
        changed = rows.copy()
        changed[[task for task in range(3) if task not in turn]] += 3
        direction, state = step(balancer, jnp.asarray(rows), state)
        same, other = step(balancer, jnp.asarray(changed), other)
        np.testing.assert_array_equal(same, direction)


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_the_direction_does_not_change_with_the_scale(factor):
    rng, balancer = np.random.default_rng(3), m_config(tasks_per_call=2)
    state = scaled_state = balancer.init(2, jnp.zeros(5))
    for _ in range(4):
        rows = rng.normal(size=(2, 5))
        direction, state = step(balancer, jnp.asarray(rows, jnp.float32), state)
        scaled, scaled_state = step(balancer, jnp.asarray(factor * rows, jnp.float32), scaled_state)
        np.testing.assert_allclose(scaled, direction, rtol=1e-3, atol=1e-4)


def test_parameters_that_no_task_has_stay():
    balancer = m_config(tasks_per_call=2)
    rows = jnp.array([[1.0, 2, 0], [-1, 3, 0]])
    direction, _ = step(balancer, rows, balancer.init(2, jnp.zeros(3)))
    assert direction[2] == 0 and np.all(np.isfinite(direction))


def test_turns_go_round_the_active_tasks():
    turn, seen = jnp.array(0), []
    for active in ([1, 1, 1, 1], [1, 0, 0, 1], [1, 1, 0, 1], [1, 1, 1, 1]):
        chosen, turn = next_in_turn(turn, jnp.array(active, bool), 2)
        seen.append(np.flatnonzero(chosen).tolist())
    assert seen == [[0, 1], [0, 3], [1, 3], [0, 1]]
    chosen, turn = next_in_turn(jnp.array(3), jnp.array([False, True, False, False]), 2)
    assert np.flatnonzero(chosen).tolist() == [1] and turn == 2


def test_an_inactive_task_keeps_its_average_and_has_no_part():
    """The direction is that of the others alone, before it was ever seen and after."""
    rng = np.random.default_rng(4)
    rows = rng.normal(size=(3, 3, 4)).astype(np.float32)
    balancer, pair = m_config(tasks_per_call=2), m_config(tasks_per_call=2)
    state, alone = balancer.init(3, jnp.zeros(4)), pair.init(2, jnp.zeros(4))
    active = jnp.array([True, False, True])
    for row in rows:
        direction, state = step(balancer, jnp.asarray(row), state, active)
        expected, alone = step(pair, jnp.asarray(row[[0, 2]]), alone)
        np.testing.assert_allclose(direction, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(state.momentum[1], np.zeros(4))
    np.testing.assert_array_equal(state.steps, [3, 0, 3])


def test_leaves_keep_their_shape_and_type():
    params = {"kernel": jnp.zeros((4, 2), jnp.bfloat16), "scale": jnp.zeros(())}
    jacobian = {"kernel": jnp.ones((1, 4, 2), jnp.bfloat16), "scale": jnp.array([2.0])}
    direction, state = step(m_config(), jacobian, m_config().init(1, params))
    assert direction["kernel"].dtype == jnp.bfloat16 and direction["kernel"].shape == (4, 2)
    assert direction["scale"].shape == ()
    assert state.momentum["kernel"].dtype == state.second["kernel"].dtype == jnp.float32


def test_more_tasks_in_turn_than_there_are_is_refused():
    tasks = [Task("click", "binary"), Task("buy", "binary")]
    for call in (lambda: m_config(tasks_per_call=3).for_tasks(tasks), lambda: m_config(tasks_per_call=3).init(2)):
        with pytest.raises(ConfigError, match=r"m_config\(tasks_per_call\)"):
            call()


@pytest.mark.parametrize("options", [{"beta_1": 1.0}, {"beta_2": -0.1}, {"tasks_per_call": 0}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match=f"m_config\\({next(iter(options))}\\)"):
        m_config(**options)
