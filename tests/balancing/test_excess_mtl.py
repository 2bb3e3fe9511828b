"""ExcessMTL: goldens, the paper's recursion on explicit gradients, scales that overflow elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.balancing.base import aggregate
from mtl_jax.balancing.excess_mtl import excess_mtl
from mtl_jax.errors import ConfigError

step = jax.jit(lambda balancer, jacobian, state, active=None: aggregate(balancer, jacobian, state, active=active))


def test_goldens(excess_mtl_case, dtype, assert_golden):
    case = excess_mtl_case
    balancer = excess_mtl(**case["params"])
    state = balancer.init(len(case["jacobian"]), jnp.zeros(len(case["jacobian"][0]), dtype))
    for call in [*case.get("history", []), case]:
        direction, state = step(balancer, jnp.asarray(call["jacobian"], dtype), state)
    assert direction.dtype == dtype
    assert_golden(state.weights, case["weights"], case, dtype)
    assert_golden(direction, case["direction"], case, dtype)


def sequence(balancer, jacobians):
    """Directions and weights of all steps."""
    state = balancer.init(jacobians.shape[1], jnp.zeros(jacobians.shape[2]))

    def one(state, jacobian):
        direction, state = aggregate(balancer, jacobian, state)
        return state, (direction, state.weights)

    return jax.jit(lambda rows: jax.lax.scan(one, state, rows)[1])(jnp.asarray(jacobians))


@pytest.fixture
def jacobians():
    rows = np.random.default_rng(0).normal(size=(8, 3, 6))
    rows[:, :, 0] = 0  # a parameter that no task has
    return rows * np.array([[1.0], [30.0], [0.02]])


@pytest.mark.parametrize("num_warmup", [1, 3])
def test_equals_the_papers_recursion(jacobians, num_warmup):
    eta, squares, shares, warmup = 0.4, np.zeros((3, 6)), np.full(3, 1 / 3), []
    expected = []
    for jacobian in jacobians:
        squares += jacobian**2
        excess = np.sum(jacobian[:, 1:] ** 2 / np.sqrt(squares[:, 1:]), axis=1)
        if len(warmup) < num_warmup:
            warmup.append(excess)
        else:
            shares = shares * np.exp(eta * excess / np.mean(warmup, axis=0))
            shares /= np.sum(shares)
        expected.append(shares)
    with jax.enable_x64(True):
        directions, weights = sequence(excess_mtl(eta=eta, num_warmup=num_warmup), jacobians)
        np.testing.assert_allclose(weights, expected, rtol=1e-9)
        np.testing.assert_allclose(directions, np.einsum("nt,ntp->np", expected, jacobians), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_a_whole_sequence_scales_with_the_gradients(jacobians, factor):
    balancer = excess_mtl(eta=0.5)
    directions, weights = sequence(balancer, jacobians.astype(np.float32))
    scaled, same = sequence(balancer, (factor * jacobians).astype(np.float32))
    np.testing.assert_allclose(same, weights, rtol=1e-4)
    np.testing.assert_allclose(scaled / factor, directions, rtol=1e-3, atol=1e-4)


def test_weights_stay_on_the_simplex():
    """However long the run and the gradients: an exponential of e itself would overflow."""
    rows = 1e6 * np.random.default_rng(1).normal(size=(2000, 3, 4)).astype(np.float32)
    directions, weights = sequence(excess_mtl(eta=5.0), rows)
    assert np.all(np.isfinite(directions)) and np.all(weights >= 0)
    np.testing.assert_allclose(np.sum(weights, axis=1), 1, rtol=1e-5)


def test_an_inactive_task_resumes_where_it_stopped(jacobians):
    """Its s, p and baseline stay, and so does the share of the two others together."""
    balancer = excess_mtl(eta=1.0)
    state = balancer.init(3, jnp.zeros(6))
    for jacobian in jacobians[:3]:
        _, state = step(balancer, jnp.asarray(jacobian, jnp.float32), state)
    before = state
    active = jnp.array([True, False, True])
    _, state = step(balancer, jnp.asarray(jacobians[3], jnp.float32), state, active)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(new[1], old[1])
        assert not np.array_equal(new[0], old[0]) or old is before.baseline
    shares, old_shares = np.exp(state.log_shares), np.exp(before.log_shares)
    np.testing.assert_allclose(shares[0] + shares[2], old_shares[0] + old_shares[2], rtol=1e-5)
    np.testing.assert_allclose(state.weights[0] + state.weights[2], 1, rtol=1e-5)


def test_a_task_warms_up_in_its_own_first_steps(jacobians):
    """The second task joins late: it measures its baseline then, and its share has not moved."""
    balancer = excess_mtl(eta=1.0, num_warmup=2)
    state = balancer.init(3, jnp.zeros(6))
    for number, jacobian in enumerate(jacobians[:6]):
        active = jnp.array([True, number >= 4, True])
        _, state = step(balancer, jnp.asarray(jacobian, jnp.float32), state, active)
    np.testing.assert_array_equal(state.steps, [6, 2, 6])
    first = np.abs(jacobians[4, 1, 1:])
    second = jacobians[5, 1, 1:] ** 2
    expected = (np.sum(first) + np.sum(second / np.sqrt(first**2 + second))) / 2
    np.testing.assert_allclose(state.baseline[1], expected, rtol=1e-5)


@pytest.mark.parametrize("options", [{"eta": -0.1}, {"num_warmup": 0}, {"num_warmup": 1.5}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match=f"excess_mtl\\({next(iter(options))}\\)"):
        excess_mtl(**options)
