"""Uncertainty weighting: goldens, its objective by finite differences and autodiff, its fixed point."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtl_jax.balancing import aggregate, uncertainty
from mtl_jax.balancing.learnable import learnable
from mtl_jax.balancing.uncertainty import UncertaintyState
from mtl_jax.errors import ConfigError
from mtl_jax.tasks import Task

FACTOR = {"classification": 1.0, "regression": 0.5}


def objective(losses, log_var, factors):
    """The paper's equation (10), with its Gaussian factor 1/2 and its softmax factor 1."""
    return sum(c * np.exp(-s) * loss + 0.5 * s for loss, s, c in zip(losses, log_var, factors, strict=True))


def test_goldens(uncertainty_case, dtype, assert_golden):
    case = uncertainty_case
    balancer = uncertainty(**case["params"])
    state = UncertaintyState(learnable(jnp.asarray(case["state"]["log_var"], dtype)))
    losses = jnp.asarray(case["losses"], dtype)
    weights, _ = balancer.weigh(None, losses, state, None)
    direction, _ = aggregate(balancer, jnp.asarray(case["jacobian"], dtype), state, losses=losses)
    assert weights.dtype == direction.dtype == dtype
    assert_golden(weights, case["weights"], case, dtype)
    assert_golden(direction, case["direction"], case, dtype)


def test_weights_are_the_derivative_of_the_objective(uncertainty_case):
    case, step = uncertainty_case, 1e-6
    factors = [FACTOR[name] for name in case["params"]["likelihood"]]
    losses, log_var = np.array(case["losses"]), case["state"]["log_var"]
    np.testing.assert_allclose(objective(losses, log_var, factors), case["objective"], rtol=1e-10)
    balancer = uncertainty(**case["params"])
    with jax.enable_x64(True):
        weights, _ = balancer.weigh(None, jnp.asarray(losses), UncertaintyState(learnable(jnp.array(log_var))), None)
    for task, weight in enumerate(np.asarray(weights)):
        shift = step * np.eye(len(losses))[task]
        rise = objective(losses + shift, log_var, factors) - objective(losses - shift, log_var, factors)
        np.testing.assert_allclose(weight, rise / (2 * step), rtol=1e-8)


def test_log_variance_follows_adam_on_the_objective():
    """Twenty steps: the closed-form gradient and its Adam against autodiff and optax.adam."""
    factors, rate = jnp.array([1.0, 0.5, 0.5]), 0.05
    balancer = uncertainty(likelihood=["classification", "regression", "regression"], initial=0.2, weight_lr=rate)
    state, adam = balancer.init(3), optax.adam(rate)
    expected = jnp.full(3, 0.2)
    adam_state = adam.init(expected)
    gradient = jax.jit(jax.grad(lambda s, losses: jnp.sum(factors * jnp.exp(-s) * losses + 0.5 * s)))
    for losses in np.random.default_rng(0).uniform(0.0, 3.0, size=(20, 3)).astype(np.float32):
        weights, state = balancer.weigh(None, jnp.asarray(losses), state, None)
        np.testing.assert_allclose(weights, factors * jnp.exp(-expected), rtol=1e-5)  # read before the update
        updates, adam_state = adam.update(gradient(expected, losses), adam_state)
        expected = expected + updates
    np.testing.assert_allclose(state.log_var.value, expected, rtol=1e-5)
    assert np.ptp(expected) > 0.1


def test_stays_at_its_stationary_point():
    """e^s = 2 c L: nothing moves s, no weight decay either; and every weighted loss is 1/2."""
    losses = np.array([0.3, 2.0])
    balancer = uncertainty(likelihood="classification", initial=np.log(2 * losses), weight_lr=0.1)
    with jax.enable_x64(True):
        state = balancer.init(2)
        for _ in range(5):
            weights, state = balancer.weigh(None, jnp.asarray(losses), state, None)
        weights, log_var = np.asarray(weights), np.asarray(state.log_var.value)
    np.testing.assert_allclose(log_var, np.log(2 * losses), atol=1e-6)
    np.testing.assert_allclose(weights * losses, [0.5, 0.5], rtol=1e-6)


def test_learns_the_variance_of_gaussian_noise():
    """With a Gaussian likelihood and L the squared error, e^s at the optimum is the noise variance."""
    losses = jnp.array([0.25, 4.0])
    balancer = uncertainty(likelihood="regression", weight_lr=0.05)
    final = jax.lax.fori_loop(0, 500, lambda _, s: balancer.weigh(None, losses, s, None)[1], balancer.init(2))
    np.testing.assert_allclose(jnp.exp(final.log_var.value), losses, rtol=1e-2)


def test_a_loss_of_zero_stops_at_the_bound():
    balancer = uncertainty(weight_lr=4.0)
    state = balancer.init(1)
    for _ in range(5):
        weights, state = balancer.weigh(None, jnp.zeros(1), state, None)
    np.testing.assert_array_equal(state.log_var.value, [-10.0])
    np.testing.assert_allclose(weights, [np.exp(10.0)], rtol=1e-5)


def test_an_inactive_task_resumes_where_it_stopped():
    """Batches without its labels leave no trace: the same s as a task that never met them."""
    balancer = uncertainty(weight_lr=0.1)
    losses = jnp.array([2.0, 0.1])
    state = with_gap = balancer.init(2)
    for _ in range(3):
        _, state = balancer.weigh(None, losses, state, None)
    for active in ([True, True], [True, False], [True, True], [True, False], [True, True]):
        _, with_gap = balancer.weigh(None, losses, with_gap, None, active=jnp.array(active))
    np.testing.assert_array_equal(with_gap.log_var.value[1], state.log_var.value[1])
    assert with_gap.log_var.value[0] > state.log_var.value[0]


def test_likelihoods_come_from_the_kinds_of_the_tasks():
    tasks = [Task("click", "binary"), Task("spend", "regression"), Task("brand", "multiclass")]
    bound = uncertainty().for_tasks(tasks)
    np.testing.assert_array_equal(bound.weigh(None, jnp.ones(3), bound.init(3), None)[0], [1.0, 0.5, 1.0])
    given = uncertainty(likelihood="regression", initial={"brand": 0.0, "click": 1.0, "spend": 0.0}).for_tasks(tasks)
    weights, _ = given.weigh(None, jnp.ones(3), given.init(3), None)
    np.testing.assert_allclose(weights, [0.5 * np.exp(-1), 0.5, 0.5], rtol=1e-6)


@pytest.mark.parametrize(
    "options", [{"likelihood": ["poisson"]}, {"initial": 11.0}, {"weight_lr": -1e-3}, {"weight_lr": np.inf}]
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match=f"uncertainty\\({next(iter(options))}\\)"):
        uncertainty(**options)


def test_a_likelihood_list_of_another_length_is_refused():
    tasks = [Task("click", "binary"), Task("spend", "regression")]
    with pytest.raises(ConfigError, match=r"uncertainty\(likelihood\)"):
        uncertainty(likelihood=["regression"] * 3).for_tasks(tasks)
