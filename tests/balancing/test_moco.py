"""MoCo: goldens, the paper's recursion on explicit gradients, its limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.balancing.base import aggregate
from mtl_jax.balancing.moco import moco
from mtl_jax.errors import ConfigError


@jax.jit
def step(balancer, jacobian, state, losses=None, active=None):
    return aggregate(balancer, jacobian, state, losses=losses, active=active)


def nearest_on_simplex(point):
    """By bisection on the threshold."""
    low, high = np.min(point) - 1, np.max(point)
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if np.sum(np.maximum(point - middle, 0)) > 1 else (low, middle)
    return np.maximum(point - low, 0)


def softmax(point):
    return np.exp(point) / np.sum(np.exp(point))


def test_goldens(moco_case, dtype, assert_golden):
    case = moco_case
    balancer = moco(**case["params"])
    state = balancer.init(len(case["jacobian"]), jnp.zeros(len(case["jacobian"][0]), dtype))
    for call in [*case.get("history", []), case]:
        direction, state = step(balancer, jnp.asarray(call["jacobian"], dtype), state)
    assert direction.dtype == dtype
    assert_golden(direction, case["direction"], case, dtype)
    assert_golden(state.mixture, case["state_after"]["lambda"], case, dtype)


@pytest.mark.parametrize("tracking", ["raw", "norm_loss"])
@pytest.mark.parametrize(("simplex", "onto"), [("project", nearest_on_simplex), ("softmax", softmax)])
def test_equals_the_papers_recursion(tracking, simplex, onto):
    rng, y, weights = np.random.default_rng(0), np.zeros((3, 6)), np.full(3, 1 / 3)
    options = dict(beta=0.7, beta_sigma=0.4, gamma=0.2, gamma_sigma=0.3, rho=0.1)
    balancer = moco(**options, tracking=tracking, simplex=simplex)
    with jax.enable_x64(True):
        state = balancer.init(3, jnp.zeros(6))
        for t in range(1, 6):
            jacobian, losses = rng.normal(size=(3, 6)), rng.uniform(0.5, 2, 3)
            rows = jacobian
            if tracking == "norm_loss":
                rows = jacobian * (losses / np.linalg.norm(jacobian, axis=1))[:, None]
            y = y - 0.7 / t**0.4 * (y - rows)
            weights = onto(weights - 0.2 / t**0.3 * (y @ y.T + 0.1 * np.eye(3)) @ weights)
            direction, state = step(balancer, jnp.asarray(jacobian), state, jnp.asarray(losses))
            np.testing.assert_allclose(direction, weights @ y, rtol=1e-9)
            np.testing.assert_allclose(state.mixture, weights, rtol=1e-9)
            np.testing.assert_allclose(np.sum(state.mixture), 1, rtol=1e-12)


def test_following_at_once_and_with_no_step_it_is_the_mean():
    jacobian = jnp.asarray(np.random.default_rng(1).normal(size=(4, 5)), jnp.float32)
    balancer = moco(beta=1.0, beta_sigma=0.0, gamma=0.0)
    state = balancer.init(4, jnp.zeros(5))
    for rows in (jacobian, -2 * jacobian):
        direction, state = step(balancer, rows, state)
        np.testing.assert_allclose(direction, np.mean(rows, axis=0), rtol=1e-5, atol=1e-6)


def test_tracking_takes_the_noise_out_of_the_weights():
    """Orthogonal gradients of lengths 1 and 2 under noise: the weights of the shortest combination, (0.8, 0.2)."""
    rng = np.random.default_rng(2)
    noisy = jnp.asarray(np.diag([1.0, 2.0]) + rng.normal(size=(3000, 2, 2)), jnp.float32)
    balancer = moco(beta=0.5, beta_sigma=0.7, gamma=0.2, gamma_sigma=0.1)
    state = balancer.init(2, jnp.zeros(2))
    run = jax.jit(lambda state: jax.lax.scan(lambda s, rows: (step(balancer, rows, s)[1], None), state, noisy)[0])
    np.testing.assert_allclose(run(state).mixture, [0.8, 0.2], atol=0.1)


def test_an_inactive_task_keeps_its_state_and_has_no_part():
    rng = np.random.default_rng(3)
    balancer, rows = moco(beta=0.6), jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)
    _, state = step(balancer, rows, balancer.init(3, jnp.zeros(4)))
    active = jnp.array([True, False, True])
    direction, after = step(balancer, rows, state, active=active)
    np.testing.assert_array_equal(after.tracked[1], state.tracked[1])
    np.testing.assert_array_equal(after.mixture[1], state.mixture[1])
    np.testing.assert_allclose(np.sum(after.mixture), 1, rtol=1e-6)
    shares = after.mixture[np.array([0, 2])] / (after.mixture[0] + after.mixture[2])
    np.testing.assert_allclose(direction, shares @ after.tracked[np.array([0, 2])], rtol=1e-5)
    with_garbage, _ = balancer.combine(rows.at[1].set(1e9), jnp.zeros(3), state, None, active=active)
    np.testing.assert_allclose(with_garbage, direction, rtol=1e-6)


def test_leaves_keep_their_shape_and_type():
    params = {"kernel": jnp.zeros((4, 2), jnp.bfloat16), "scale": jnp.zeros(())}
    jacobian = {"kernel": jnp.ones((3, 4, 2), jnp.bfloat16), "scale": jnp.array([1.0, 2.0, 3.0])}
    direction, state = step(moco(), jacobian, moco().init(3, params))
    assert direction["kernel"].dtype == jnp.bfloat16 and direction["kernel"].shape == (4, 2)
    assert direction["scale"].shape == ()
    assert state.tracked["kernel"].dtype == jnp.float32


def test_the_losses_matter_for_norm_loss_only():
    assert not moco().reads_losses
    assert moco(tracking="norm_loss").reads_losses
    with pytest.raises(ConfigError, match="reads the loss"):
        aggregate(moco(tracking="norm_loss"), jnp.eye(2), moco().init(2, jnp.zeros(2)))


@pytest.mark.parametrize(
    "options", [{"beta": 1.5}, {"gamma": -0.1}, {"rho": -1.0}, {"tracking": "loss"}, {"simplex": "clip"}]
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match=f"moco\\({next(iter(options))}\\)"):
        moco(**options)
