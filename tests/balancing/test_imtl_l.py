"""IMTL-L: goldens, its objective by finite differences and autodiff, its fixed point, its relation to uncertainty."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtl_jax.balancing.base import aggregate
from mtl_jax.balancing.imtl_l import ImtlLState, imtl_l
from mtl_jax.balancing.learnable import learnable
from mtl_jax.balancing.uncertainty import uncertainty
from mtl_jax.errors import ConfigError
from mtl_jax.tasks import Task

# Compiled whole, because each operation alone costs a compilation of its own.
call = jax.jit(lambda balancer, losses, state, active=None: balancer.weigh(None, losses, state, None, active=active))


def objective(losses, scale):
    return np.sum(np.exp(scale) * losses - scale)


def test_goldens(imtl_l_case, dtype, assert_golden):
    case = imtl_l_case
    balancer = imtl_l(**case["params"])
    state = ImtlLState(learnable(jnp.asarray(case["state"]["scale"], dtype)))
    losses = jnp.asarray(case["losses"], dtype)
    weights, _ = call(balancer, losses, state)
    direction, _ = jax.jit(aggregate)(balancer, jnp.asarray(case["jacobian"], dtype), state, losses=losses)
    assert weights.dtype == direction.dtype == dtype
    assert_golden(weights, case["weights"], case, dtype)
    assert_golden(direction, case["direction"], case, dtype)


def test_weights_are_the_derivative_of_the_objective(imtl_l_case):
    losses, scale, step = np.array(imtl_l_case["losses"]), np.array(imtl_l_case["state"]["scale"]), 1e-6
    np.testing.assert_allclose(objective(losses, scale), imtl_l_case["objective"], rtol=1e-10)
    with jax.enable_x64(True):
        weights, _ = call(imtl_l(), jnp.asarray(losses), ImtlLState(learnable(jnp.asarray(scale))))
    for weight, shift in zip(np.asarray(weights), step * np.eye(len(losses)), strict=True):
        rise = objective(losses + shift, scale) - objective(losses - shift, scale)
        np.testing.assert_allclose(weight, rise / (2 * step), rtol=1e-8)


def test_scales_follow_adam_on_the_objective():
    """Ten steps: the closed-form gradient and its Adam against autodiff and optax.adam."""
    balancer, adam = imtl_l(initial=0.2, weight_lr=0.05), optax.adam(0.05)
    state, expected = balancer.init(3), jnp.full(3, 0.2)
    adam_state = adam.init(expected)
    gradient = jax.jit(jax.grad(lambda s, losses: jnp.sum(jnp.exp(s) * losses - s)))
    for losses in np.random.default_rng(0).uniform(0.0, 3.0, size=(10, 3)).astype(np.float32):
        weights, state = call(balancer, jnp.asarray(losses), state)
        np.testing.assert_allclose(weights, jnp.exp(expected), rtol=1e-5)  # read before the update
        updates, adam_state = adam.update(gradient(expected, losses), adam_state)
        expected = expected + updates
    np.testing.assert_allclose(state.scale.value, expected, rtol=1e-5)
    assert np.ptp(expected) > 0.05


def test_weighted_losses_become_1():
    losses = jnp.array([0.25, 4.0, 1.0])
    balancer = imtl_l(weight_lr=0.05)
    final = jax.lax.fori_loop(0, 500, lambda _, s: call(balancer, losses, s)[1], balancer.init(3))
    weights, _ = call(balancer, losses, final)
    np.testing.assert_allclose(weights * losses, np.ones(3), rtol=1e-2)


def test_is_twice_uncertainty_of_a_gaussian_with_its_sign_turned():
    """Weights and, under Adam, which ignores the factor 2, the whole path: s of one is minus s of the other."""
    scale = np.array([0.3, -0.7])
    ours = imtl_l(initial=scale, weight_lr=0.1)
    theirs = uncertainty(likelihood="regression", initial=-scale, weight_lr=0.1)
    state, other = ours.init(2), theirs.init(2)
    for losses in ([0.5, 2.0], [0.4, 1.0], [1.0, 3.0]):
        weights, state = call(ours, jnp.array(losses), state)
        half, other = call(theirs, jnp.array(losses), other)
        np.testing.assert_allclose(weights, 2 * half, rtol=1e-4)


def test_a_loss_of_zero_stops_at_the_bound():
    balancer = imtl_l(weight_lr=4.0)
    state = balancer.init(1)
    for _ in range(5):
        weights, state = call(balancer, jnp.zeros(1), state)
    np.testing.assert_array_equal(state.scale.value, [10.0])
    np.testing.assert_allclose(weights, [np.exp(10.0)], rtol=1e-5)


def test_an_absent_task_resumes_where_it_stopped():
    balancer, losses = imtl_l(weight_lr=0.1), jnp.array([2.0, 0.1])
    state = with_gap = balancer.init(2)
    for _ in range(2):
        _, state = call(balancer, losses, state)
    for active in ([True, True], [True, False], [True, True]):
        _, with_gap = call(balancer, losses, with_gap, jnp.array(active))
    np.testing.assert_array_equal(with_gap.scale.value[1], state.scale.value[1])
    assert with_gap.scale.value[0] < state.scale.value[0]


def test_initial_values_go_by_task_name():
    tasks = [Task("click", "binary"), Task("spend", "regression")]
    bound = imtl_l(initial={"spend": 1.0, "click": 0.0}).for_tasks(tasks)
    np.testing.assert_allclose(call(bound, jnp.ones(2), bound.init(2))[0], [1.0, np.e], rtol=1e-6)
    with pytest.raises(ConfigError, match=r"imtl_l\(initial\)"):
        imtl_l(initial={"spend": 1.0}).for_tasks(tasks)


@pytest.mark.parametrize("options", [{"initial": -11.0}, {"weight_lr": -1e-3}, {"weight_lr": np.nan}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match=f"imtl_l\\({next(iter(options))}\\)"):
        imtl_l(**options)
