"""GradNorm: goldens, the paper's objective by finite differences, its fixed point, its sum of weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.balancing.base import weigh
from mtl_jax.balancing.gradnorm import gradnorm
from mtl_jax.errors import ConfigError
from mtl_jax.tasks import Task

J2 = np.array([[-4.0, 1, 1], [6, 1, 1]])


def products(jacobian):
    return jnp.asarray(np.asarray(jacobian) @ np.asarray(jacobian).T)


def test_goldens(gradnorm_case, dtype, assert_golden):
    case = gradnorm_case
    balancer = gradnorm(**case["params"])
    state = balancer.init(len(case["losses"]))._replace(first_losses=jnp.asarray(case["initial_losses"], dtype))
    for call in [*case.get("history", []), case]:
        jacobian, losses = jnp.asarray(call["jacobian"], dtype), jnp.asarray(call["losses"], dtype)
        weights, state = balancer.weigh(jacobian @ jacobian.T, losses, state, None)
    assert weights.dtype == dtype
    assert_golden(weights, case["weights"], case, dtype)
    assert_golden(weights @ jacobian, case["direction"], case, dtype)


def test_weights_descend_the_papers_objective():
    """One step of plain descent: the derivative of sum |w_i n_i - target_i| / mean, by finite differences."""
    rng, rate, step = np.random.default_rng(0), 0.02, 1e-6
    jacobian, losses, first = rng.normal(size=(4, 9)), rng.uniform(0.2, 2, 4), rng.uniform(0.5, 2, 4)
    norms = np.linalg.norm(jacobian, axis=1)
    rates = losses / first / np.mean(losses / first)
    targets = np.mean(norms) * rates**0.7

    def objective(weights):
        return np.sum(np.abs(weights * norms - targets)) / np.mean(norms)

    shifts = step * np.eye(4)
    slope = np.array([(objective(1 + shift) - objective(1 - shift)) / (2 * step) for shift in shifts])
    expected = np.maximum(1 - rate * slope, 1e-3)
    balancer = gradnorm(alpha=0.7, weight_lr=rate, weight_optimizer="sgd")
    with jax.enable_x64(True):
        state = balancer.init(4)._replace(first_losses=jnp.asarray(first))
        weights, state = balancer.weigh(products(jacobian), jnp.asarray(losses), state, None)
        np.testing.assert_array_equal(weights, np.ones(4))
        np.testing.assert_allclose(state.weights.value, 4 * expected / np.sum(expected), rtol=1e-7)


def test_equal_lengths_and_equal_rates_are_a_fixed_point():
    balancer = gradnorm()
    state = balancer.init(3)
    gramian = jnp.array([[4.0, 1.0, -2.0], [1.0, 4.0, 0.0], [-2.0, 0.0, 4.0]])
    for factor in (1.0, 0.5, 0.25):
        _, state = balancer.weigh(gramian, factor * jnp.array([1.0, 2.0, 4.0]), state, None)
    np.testing.assert_array_equal(state.weights.value, np.ones(3))


@pytest.mark.parametrize("weight_optimizer", ["adam", "sgd"])
def test_weights_stay_positive_and_sum_to_the_number_of_tasks(weight_optimizer):
    """Whatever batches a task is missing from, and with steps that would take a weight below zero."""
    balancer = gradnorm(weight_lr=0.5, weight_optimizer=weight_optimizer)
    rng = np.random.default_rng(1)

    @jax.jit
    def step(gramian, losses, state, active):
        return weigh(balancer, gramian, losses, state, None, active)[1]

    state = balancer.init(4)
    for _ in range(30):
        jacobian, losses = rng.normal(size=(4, 9)) * 10 ** rng.uniform(-2, 2, (4, 1)), rng.uniform(0.1, 3, 4)
        active = rng.uniform(size=4) < 0.6
        before = state.weights.value
        state = step(products(jacobian), jnp.asarray(losses), state, jnp.asarray(active))
        np.testing.assert_array_equal(state.weights.value[~active], before[~active])
        np.testing.assert_allclose(np.sum(state.weights.value), 4, rtol=1e-5)
        assert np.min(state.weights.value) > 0
    assert np.ptp(state.weights.value) > 0.1


def test_the_task_that_trains_slowly_gains_weight():
    balancer = gradnorm()
    state = balancer.init(2)
    for losses in ([1.0, 4.0], [0.5, 4.0], [0.25, 4.0], [0.12, 4.0]):
        _, state = balancer.weigh(jnp.eye(2), jnp.array(losses), state, None)
    assert state.weights.value[1] > 1.05 > 0.95 > state.weights.value[0]


def test_the_first_loss_is_that_of_the_first_batch_with_labels():
    balancer = gradnorm()
    state = balancer.init(2)
    _, state = balancer.weigh(jnp.eye(2), jnp.array([3.0, 9.0]), state, None, active=jnp.array([True, False]))
    _, state = balancer.weigh(jnp.eye(2), jnp.array([1.0, 2.0]), state, None)
    np.testing.assert_array_equal(state.first_losses, [3.0, 2.0])


def test_log2_stands_for_the_first_loss_of_binary_tasks():
    tasks = [Task("click", "binary"), Task("spend", "regression")]
    np.testing.assert_allclose(gradnorm(initial="log2").for_tasks(tasks).init(2).first_losses, [np.log(2), 0])
    np.testing.assert_allclose(gradnorm(initial="log2").init(2).first_losses, [np.log(2)] * 2)
    np.testing.assert_allclose(gradnorm().for_tasks(tasks).init(2).first_losses, [0, 0])


@pytest.mark.parametrize("losses", [[1.0, -1.0], [1.0, 0.0]])
def test_losses_without_a_ratio_skip_the_step(losses):
    balancer = gradnorm()
    state = balancer.init(2)
    weights, after, info = weigh(balancer, products(J2).astype(jnp.float32), jnp.array(losses), state, None)
    assert info["nonfinite"] and not np.any(weights)
    jax.tree.map(np.testing.assert_array_equal, after, state)


@pytest.mark.parametrize(
    "options", [{"weight_lr": -1.0}, {"alpha": np.nan}, {"weight_optimizer": "lion"}, {"initial": 1}]
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match=f"gradnorm\\({next(iter(options))}\\)"):
        gradnorm(**options)
