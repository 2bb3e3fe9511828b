"""Nash-MTL: goldens, the bargaining solution, and solving every few steps."""

import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.balancing.base import aggregate, gramian, weigh
from mtl_jax.balancing.fairgrad import fairgrad
from mtl_jax.balancing.nash_mtl import nash_mtl
from mtl_jax.errors import ConfigError


def test_goldens(nash_mtl_case, dtype, assert_golden):
    case = nash_mtl_case
    jacobian = jnp.asarray(case["jacobian"], dtype)
    num_tasks = len(jacobian)
    balancer = nash_mtl(**case["params"])
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


ROWS = np.random.default_rng(4).normal(0.3, 1.0, size=(4, 9))


def test_length_is_the_root_of_the_number_of_tasks_and_max_norm_where_that_is_less():
    direction = direction_of(nash_mtl(max_norm=None), ROWS)
    np.testing.assert_allclose(np.linalg.norm(direction), 2.0, rtol=1e-4)
    np.testing.assert_allclose(direction_of(nash_mtl(), ROWS), direction / 2, rtol=1e-3)
    np.testing.assert_allclose(direction_of(nash_mtl(max_norm=3.0), ROWS), direction, rtol=1e-6)


def test_is_fairgrad_at_1_before_clipping():
    np.testing.assert_allclose(direction_of(nash_mtl(max_norm=None), ROWS), direction_of(fairgrad(), ROWS), rtol=1e-6)


def test_two_tasks_in_closed_form():
    """w_i = 1 / (n_i sqrt(1 + cos)): the bisector."""
    rows = np.array([[1.0, 2.0, -1.0], [-3.0, 0.5, 0.5]])
    lengths = np.linalg.norm(rows, axis=1)
    weights = 1 / (lengths * np.sqrt(1 + rows[0] @ rows[1] / np.prod(lengths)))
    np.testing.assert_allclose(direction_of(nash_mtl(max_norm=None), rows), weights @ rows, rtol=1e-4)


def test_lengths_of_the_gradients_do_not_matter():
    scaled = ROWS * np.array([[1e-2], [1.0], [30.0], [5.0]])
    np.testing.assert_allclose(direction_of(nash_mtl(), scaled), direction_of(nash_mtl(), ROWS), atol=1e-4)


def test_opposite_gradients_stay_bounded():
    balancer = nash_mtl(max_norm=None)
    weights, _, _ = weigh(balancer, jnp.array([[1.0, -1], [-1, 1]]), jnp.ones(2), balancer.init(2), None)
    assert np.all(np.isfinite(weights)) and np.max(weights) <= 1.05e3


def test_weights_stay_between_solves():
    """Solved at steps 0 and 3: in between the weights of step 0 meet new gradients."""
    balancer = nash_mtl(update_every=3, max_norm=None)
    state = balancer.init(2)
    seen = []
    for factor in (1.0, 10.0, 100.0, 1000.0):
        weights, state, _ = weigh(balancer, factor**2 * jnp.array([[1.0, 0.5], [0.5, 4.0]]), jnp.ones(2), state, None)
        seen.append(np.asarray(weights))
    np.testing.assert_array_equal(seen[1], seen[0])
    np.testing.assert_array_equal(seen[2], seen[0])
    np.testing.assert_allclose(seen[3], seen[0] / 1000, rtol=1e-3)


def test_clipping_uses_the_gradients_of_the_step():
    """Kept weights times longer gradients are clipped all the same."""
    balancer = nash_mtl(update_every=2)
    state = balancer.init(1)
    for row in ([[2.0, 0.0]], [[50.0, 0.0]]):
        direction, state = aggregate(balancer, jnp.array(row), state)
        np.testing.assert_allclose(direction, [1.0, 0.0], rtol=1e-4)


def test_a_task_absent_at_a_solve_keeps_its_earlier_weight():
    balancer = nash_mtl(update_every=2, max_norm=None)
    products, losses = jnp.eye(2), jnp.ones(2)
    state = balancer.init(2)
    _, state, _ = weigh(balancer, products, losses, state, None)
    _, state, _ = weigh(balancer, products, losses, state, None)
    _, state, _ = weigh(balancer, 100 * products, losses, state, None, jnp.array([True, False]))
    weights, _, _ = weigh(balancer, 100 * products, losses, state, None)
    np.testing.assert_allclose(weights, [0.1, 1.0], rtol=1e-4)


@pytest.mark.parametrize("options", [{"max_norm": 0.0}, {"update_every": 0}, {"update_every": 1.5}, {"reg_eps": -1.0}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match=f"nash_mtl\\({next(iter(options))}\\)"):
        nash_mtl(**options)
