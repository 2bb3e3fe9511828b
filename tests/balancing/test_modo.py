"""MoDo: goldens, the paper's recursion on explicit Jacobians, three batches that are three."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.balancing.base import aggregate, weigh
from mtl_jax.balancing.mixture import MixtureState
from mtl_jax.balancing.modo import modo
from mtl_jax.errors import ConfigError

step = jax.jit(lambda balancer, jacobians, state, active=None: aggregate(balancer, jacobians, state, active=active))


def nearest_on_simplex(point):
    """By bisection on the threshold."""
    low, high = np.min(point) - 1, np.max(point)
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if np.sum(np.maximum(point - middle, 0)) > 1 else (low, middle)
    return np.maximum(point - low, 0)


def test_goldens(modo_case, dtype, assert_golden):
    case = modo_case
    balancer = modo(**case["params"])
    state = balancer.init(len(case["jacobian"]))
    for call in [*case.get("history", []), case]:
        products = jnp.asarray(call["cross_gramian"], dtype)
        weights, state = balancer.weigh(products, jnp.zeros(len(products), dtype), state, None)
    assert weights.dtype == dtype
    assert_golden(weights, case["weights"], case, dtype)
    assert_golden(weights @ jnp.asarray(case["jacobian"], dtype), case["direction"], case, dtype)


def test_equals_the_papers_recursion():
    rng, weights = np.random.default_rng(0), np.full(4, 0.25)
    balancer = modo(gamma=0.3, rho=0.2)
    with jax.enable_x64(True):
        state = balancer.init(4)
        for _ in range(6):
            a, b, c = jacobians = rng.normal(size=(3, 4, 6))
            weights = nearest_on_simplex(weights - 0.3 * (a @ (b.T @ weights) + 0.2 * weights))
            direction, state = step(balancer, jnp.asarray(jacobians), state)
            np.testing.assert_allclose(direction, weights @ c, rtol=1e-9)
    assert np.min(weights) == 0  # some step left the simplex


def test_a_step_without_length_keeps_the_mean():
    jacobians = jnp.asarray(np.random.default_rng(1).normal(size=(3, 4, 5)), jnp.float32)
    balancer = modo(gamma=0.0)
    direction, state = step(balancer, jacobians, balancer.init(4))
    np.testing.assert_allclose(direction, np.mean(jacobians[2], axis=0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state.mixture, [0.25] * 4, rtol=1e-6)


def test_weights_come_from_the_first_two_batches_and_act_on_the_third():
    """J_a and J_b enter by their product alone, and the weights do not see J_c."""
    jacobians = np.random.default_rng(2).normal(size=(3, 3, 5)).astype(np.float32)
    balancer = modo()
    _, state = step(balancer, jnp.asarray(jacobians), balancer.init(3))
    other_third = jacobians * np.array([[[1.0]], [[1]], [[-7]]], np.float32)
    swapped_scales = jacobians * np.array([[[4.0]], [[0.25]], [[1]]], np.float32)
    for same in (other_third, swapped_scales):
        np.testing.assert_allclose(
            step(balancer, jnp.asarray(same), balancer.init(3))[1].mixture, state.mixture, rtol=1e-5
        )
    exchanged = step(balancer, jnp.asarray(jacobians[[1, 0, 2]]), balancer.init(3))[1]
    assert not np.allclose(exchanged.mixture, state.mixture, rtol=1e-3)


def test_the_double_sample_is_unbiased():
    """In the mean over noise, A is J J^T; one batch used twice would add the variance of the noise to its diagonal."""
    rng = np.random.default_rng(3)
    jacobian = rng.normal(size=(3, 4))
    noisy = jacobian + rng.normal(size=(20_000, 3, 3, 4))
    mean = np.mean(jax.jit(jax.vmap(modo().products))(jnp.asarray(noisy, jnp.float32)), axis=0)
    np.testing.assert_allclose(mean, jacobian @ jacobian.T, atol=0.1)


def test_mean_weights_approach_the_shortest_combination():
    """With gradients that do not change, the recursion is projected descent on the length of d."""
    jacobian = np.array([[1.0, 0.0], [0.0, 2.0]])
    batch = jnp.asarray(np.stack([jacobian] * 3), jnp.float32)
    balancer = modo(gamma=0.1, rho=0.0)
    final = jax.lax.fori_loop(0, 100, lambda _, state: step(balancer, batch, state)[1], balancer.init(2))
    np.testing.assert_allclose(final.mixture, [0.8, 0.2], rtol=1e-4)


def test_inactive_tasks_keep_their_weight_and_the_others_share_the_rest():
    balancer, state = modo(), MixtureState(jnp.array([0.2, 0.5, 0.3]))
    products = (
        jnp.asarray(np.random.default_rng(4).normal(size=(3, 3)), jnp.float32).at[1].set(jnp.nan).at[:, 1].set(1e9)
    )
    active = jnp.array([True, False, True])
    weights, after = balancer.weigh(products, jnp.zeros(3), state, None, active=active)
    np.testing.assert_allclose(np.sum(weights), 1, rtol=1e-6)
    np.testing.assert_array_equal(after.mixture[1], state.mixture[1])
    np.testing.assert_allclose(np.sum(after.mixture), 1, rtol=1e-6)
    small = np.asarray(products)[np.ix_([0, 2], [0, 2])]
    expected = nearest_on_simplex(np.array([0.4, 0.6]) - 0.1 * (small @ [0.4, 0.6] + 0.1 * np.array([0.4, 0.6])))
    np.testing.assert_allclose(np.asarray(weights)[[0, 2]], expected, rtol=1e-5)
    # Tasks that have no weight at all start from equal ones.
    weights, _ = balancer.weigh(
        jnp.zeros((3, 3)), jnp.zeros(3), MixtureState(jnp.array([0.0, 1, 0])), None, active=active
    )
    np.testing.assert_allclose(weights, [0.5, 0, 0.5], rtol=1e-6)


def test_a_task_is_null_only_without_gradient_in_both_batches():
    jacobians = np.random.default_rng(5).normal(size=(3, 3, 4)).astype(np.float32)
    jacobians[0, 0] = 0  # the first task has a gradient in b only
    jacobians[:2, 1] = 0
    balancer = modo()
    products = balancer.products(jnp.asarray(jacobians))
    weights, _, info = weigh(balancer, products, jnp.zeros(3), balancer.init(3), None)
    assert info["null_rows"] == 1 and weights[1] == 0 and weights[0] > 0


def test_jacobians_without_a_batch_axis_are_refused():
    with pytest.raises(ConfigError, match="3 independent batches"):
        aggregate(modo(), jnp.ones((2, 4)), modo().init(2))


@pytest.mark.parametrize("options", [{"gamma": -0.1}, {"rho": np.nan}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match=f"modo\\({next(iter(options))}\\)"):
        modo(**options)
