"""SDMGrad: goldens, the published loop on explicit Jacobians, its fixed point, its scale."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.balancing.base import aggregate
from mtl_jax.balancing.mixture import MixtureState
from mtl_jax.balancing.sdmgrad import sdmgrad
from mtl_jax.errors import ConfigError
from mtl_jax.tasks import Task

step = jax.jit(lambda balancer, jacobians, state, active=None: aggregate(balancer, jacobians, state, active=active))


def nearest_on_simplex(point):
    """By bisection on the threshold."""
    low, high = np.min(point) - 1, np.max(point)
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if np.sum(np.maximum(point - middle, 0)) > 1 else (low, middle)
    return np.maximum(point - low, 0)


def published_loop(a, b, weights, lambda_, inner_lr, momentum, num_iterations, preferred):
    products = a @ b.T
    products = products / np.mean([np.sqrt(max(x, 0)) for x in np.diag(products)]) ** 2
    velocity = np.zeros(len(a))
    for _ in range(num_iterations):
        velocity = momentum * velocity + products @ (weights + lambda_ * preferred)
        weights = nearest_on_simplex(weights - inner_lr * velocity)
    return weights


def test_goldens(sdmgrad_case, dtype, assert_golden):
    case = sdmgrad_case
    balancer = sdmgrad(**case["params"])
    state = balancer.init(len(case["jacobian"]))
    for call in [*case.get("history", []), case]:
        products = jnp.asarray(call["cross_gramian"], dtype)
        weights, state = balancer.weigh(products, jnp.zeros(len(products), dtype), state, None)
    assert weights.dtype == dtype
    assert_golden(weights, case["weights"], case, dtype)
    assert_golden(weights @ jnp.asarray(case["jacobian"], dtype), case["direction"], case, dtype)


@pytest.mark.parametrize("preference", [None, [1.0, 0.0, 2.0, 1.0]])
def test_equals_the_published_loop(preference):
    """Several steps, of gradients with enough in common that the scale is known."""
    rng, weights = np.random.default_rng(0), np.full(4, 0.25)
    preferred = np.full(4, 0.25) if preference is None else np.array(preference) / np.sum(preference)
    balancer = sdmgrad(lambda_=0.5, inner_lr=0.3, momentum=0.6, num_iterations=7, preference=preference)
    with jax.enable_x64(True):
        state = balancer.init(4)
        for _ in range(4):
            a, b, c = jacobians = rng.normal(size=(4, 6)) + 0.5 * rng.normal(size=(3, 4, 6))
            weights = published_loop(a, b, weights, 0.5, 0.3, 0.6, 7, preferred)
            direction, state = step(balancer, jnp.asarray(jacobians), state)
            np.testing.assert_allclose(direction, (weights + 0.5 * preferred) / 1.5 @ c, rtol=1e-8)


def test_without_iterations_it_keeps_the_mean():
    jacobians = jnp.asarray(np.random.default_rng(1).normal(size=(3, 4, 5)), jnp.float32)
    balancer = sdmgrad(num_iterations=0)
    direction, state = step(balancer, jacobians, balancer.init(4))
    np.testing.assert_allclose(direction, np.mean(jacobians[2], axis=0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state.mixture, [0.25] * 4, rtol=1e-6)


def test_converges_to_the_combination_that_is_shortest_with_its_pull():
    """Orthogonal gradients of lengths 1 and 2: w_i + lambda / 2 in the ratio 4 : 1, so w = (0.8, 0.2) at lambda 0."""
    jacobians = jnp.asarray(np.stack([np.diag([1.0, 2.0])] * 3), jnp.float32)
    for lambda_ in (0.0, 0.3):
        balancer = sdmgrad(lambda_=lambda_, inner_lr=0.2, momentum=0.0, num_iterations=200)
        direction, state = step(balancer, jacobians, balancer.init(2))
        first = 0.8 * (1 + lambda_) - lambda_ / 2
        np.testing.assert_allclose(state.mixture, [first, 1 - first], rtol=1e-4)
        np.testing.assert_allclose(direction, [0.8, 0.4], rtol=1e-4)  # where the pull is reachable, it changes nothing


def test_a_strong_pull_is_the_preferred_direction():
    jacobians = np.random.default_rng(2).normal(size=(3, 3, 5)).astype(np.float32)
    balancer = sdmgrad(lambda_=1e5, preference=[0.0, 3.0, 1.0])
    direction, _ = step(balancer, jnp.asarray(jacobians), balancer.init(3))
    np.testing.assert_allclose(direction, 0.75 * jacobians[2, 1] + 0.25 * jacobians[2, 2], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_weights_do_not_change_with_the_scale(factor):
    jacobians = np.random.default_rng(3).normal(size=(4, 6)) + 0.3 * np.random.default_rng(4).normal(size=(3, 4, 6))
    balancer = sdmgrad(inner_lr=0.5)
    direction, _ = step(balancer, jnp.asarray(jacobians, jnp.float32), balancer.init(4))
    scaled, _ = step(balancer, jnp.asarray(factor * jacobians, jnp.float32), balancer.init(4))
    np.testing.assert_allclose(scaled / factor, direction, rtol=1e-3, atol=1e-5)


def test_without_a_scale_the_weights_stay():
    """Two batches that disagree in sign for every task: no A_ii is positive."""
    balancer, state = sdmgrad(lambda_=0.0), MixtureState(jnp.array([0.3, 0.7]))
    rows = jnp.asarray(np.random.default_rng(5).normal(size=(2, 4)), jnp.float32)
    direction, after = step(balancer, jnp.stack([rows, -rows, rows]), state)
    np.testing.assert_allclose(after.mixture, state.mixture, rtol=1e-6)
    np.testing.assert_allclose(direction, 0.3 * rows[0] + 0.7 * rows[1], rtol=1e-5)


def test_weights_come_from_the_first_two_batches_and_act_on_the_third():
    jacobians = np.random.default_rng(6).normal(size=(3, 3, 5)).astype(np.float32)
    jacobians[1] += jacobians[0]
    balancer = sdmgrad(inner_lr=0.1)
    direction, state = step(balancer, jnp.asarray(jacobians), balancer.init(3))
    other, same = step(
        balancer, jnp.asarray(jacobians * np.array([[[1.0]], [[1]], [[-7]]], np.float32)), balancer.init(3)
    )
    np.testing.assert_allclose(same.mixture, state.mixture, rtol=1e-6)
    np.testing.assert_allclose(other, -7 * direction, rtol=1e-4, atol=1e-5)
    exchanged = step(balancer, jnp.asarray(jacobians[[2, 0, 1]]), balancer.init(3))[1]
    assert not np.allclose(exchanged.mixture, state.mixture, rtol=1e-3)


def test_inactive_tasks_keep_their_weight_and_the_others_share_the_rest():
    jacobians = np.random.default_rng(7).normal(size=(3, 5)) + 0.3 * np.random.default_rng(8).normal(size=(3, 3, 5))
    balancer = sdmgrad(inner_lr=0.2, preference=[1.0, 5.0, 3.0])
    active = jnp.array([True, False, True])
    direction, state = step(balancer, jnp.asarray(jacobians, jnp.float32), balancer.init(3), active)
    a, b, c = jacobians[:, [0, 2]]
    weights = published_loop(a, b, np.full(2, 0.5), 0.3, 0.2, 0.5, 20, np.array([0.25, 0.75]))
    np.testing.assert_allclose(direction, (weights + 0.3 * np.array([0.25, 0.75])) / 1.3 @ c, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(state.mixture, [weights[0] * 2 / 3, 1 / 3, weights[1] * 2 / 3], rtol=1e-4, atol=1e-6)


def test_preferences_go_by_task_name():
    tasks = [Task("click", "binary"), Task("buy", "binary")]
    bound = sdmgrad(preference={"buy": 3.0, "click": 1.0}).for_tasks(tasks)
    np.testing.assert_array_equal(bound.preference, [1, 3])
    with pytest.raises(ConfigError, match=r"sdmgrad\(preference\)"):
        sdmgrad(preference=[1.0, 2.0, 3.0]).for_tasks(tasks)


@pytest.mark.parametrize(
    "options",
    [{"lambda_": -0.1}, {"inner_lr": -1.0}, {"momentum": 1.5}, {"num_iterations": -1}, {"preference": [1.0, -1.0]}],
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match=f"sdmgrad\\({next(iter(options))}\\)"):
        sdmgrad(**options)
