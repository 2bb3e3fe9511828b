"""FAMO: goldens over a call and its observation, its objective, its gradient, what is absent or not observed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.balancing.base import NoState, aggregate, weigh
from mtl_jax.balancing.famo import famo
from mtl_jax.balancing.scale_invariant import scale_invariant
from mtl_jax.errors import ConfigError
from mtl_jax.tasks import Task

# Compiled whole, because each operation alone costs a compilation of its own.
call = jax.jit(lambda balancer, losses, state, active=None: balancer.weigh(None, losses, state, None, active=active))


def step(balancer, losses, after, state, active=None):
    """Weights of one call, and the state after its observation."""
    weights, state = call(balancer, jnp.asarray(losses), state, active)
    return np.asarray(weights), balancer.observe(jnp.asarray(after), state, active=active)


def softmax(logits):
    return np.exp(logits) / np.exp(logits).sum()


def test_goldens(famo_case, dtype, assert_golden):
    case = famo_case
    balancer = famo(**case["params"])
    state = balancer.init(len(case["losses"]))
    for earlier in case.get("history", []):
        _, state = step(balancer, np.array(earlier["losses"], dtype), np.array(earlier["losses_after"], dtype), state)
    losses = jnp.asarray(case["losses"], dtype)
    weights, _ = call(balancer, losses, state)
    direction, _ = jax.jit(aggregate)(balancer, jnp.asarray(case["jacobian"], dtype), state, losses=losses)
    assert weights.dtype == direction.dtype == dtype
    assert_golden(weights, case["weights"], case, dtype)
    assert_golden(direction, case["direction"], case, dtype)
    if "state_after" in case:
        np.testing.assert_allclose(state.logits.value, case["state_after"]["logits"], rtol=1e-4)


def test_weights_are_the_derivative_of_the_objective():
    """O = c sum_i z_i log(L_i - b_i), with c held at its value."""
    logits, bound, losses = np.array([0.5, -1.0, 0.2]), np.array([0.1, -3.0, 0.0]), np.array([0.7, 0.2, 1.5])
    constant = 1 / np.sum(softmax(logits) / (losses - bound))

    def objective(values):
        return constant * softmax(logits) @ np.log(values - bound)

    with jax.enable_x64(True):
        state = famo(bound=bound).init(3)
        state = state._replace(logits=state.logits._replace(value=jnp.asarray(logits)))
        weights, _ = call(famo(bound=bound), jnp.asarray(losses), state)
        weights = np.asarray(weights)
    for weight, shift in zip(weights, 1e-6 * np.eye(3), strict=True):
        np.testing.assert_allclose(weight, (objective(losses + shift) - objective(losses - shift)) / 2e-6, rtol=1e-6)


def test_starts_as_the_sum_of_logarithms_at_the_length_of_a_mean():
    losses = jnp.array([0.7, 0.2, 1.5])
    weights, _ = call(famo(), losses, famo().init(3))
    inverse, _ = call(scale_invariant(), losses, NoState())
    np.testing.assert_allclose(weights, inverse / inverse.sum(), rtol=1e-6)
    np.testing.assert_allclose(weights.sum(), 1, rtol=1e-6)


def test_logits_follow_adam_on_the_change_of_the_logarithms():
    """Ten steps against a NumPy loop: the Jacobian of softmax times the falls, weight decay, bias-corrected moments."""
    rng, balancer = np.random.default_rng(0), famo(weight_lr=0.1, weight_decay=0.05)
    state, logits, first, second = balancer.init(3), np.zeros(3), np.zeros(3), np.zeros(3)
    for number in range(1, 11):
        losses, after = rng.uniform(0.1, 3.0, size=(2, 3))
        weights, state = step(balancer, losses.astype(np.float32), after.astype(np.float32), state)
        shares = softmax(logits)
        np.testing.assert_allclose(weights, (shares / losses) / np.sum(shares / losses), rtol=1e-4)
        jacobian = np.diag(shares) - np.outer(shares, shares)
        gradient = jacobian @ (np.log(losses) - np.log(after)) + 0.05 * logits
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        corrected = first / (1 - 0.9**number), second / (1 - 0.999**number)
        logits = logits - 0.1 * corrected[0] / (np.sqrt(corrected[1]) + 1e-8)
        np.testing.assert_allclose(state.logits.value, logits, rtol=1e-3, atol=1e-4)
    assert np.ptp(logits) > 0.1


def test_the_task_that_improved_more_gets_less():
    weights, state = step(famo(), [1.0, 1.0, 1.0], [0.5, 0.9, 1.0], famo().init(3))
    later, _ = call(famo(), jnp.ones(3), state)
    np.testing.assert_allclose(weights, np.full(3, 1 / 3), rtol=1e-6)
    assert later[0] < 1 / 3 < later[2]


def test_losses_that_did_not_change_leave_equal_logits():
    _, state = step(famo(), [1.0, 2.0], [1.0, 2.0], famo().init(2))
    np.testing.assert_array_equal(state.logits.value, [0, 0])


def test_an_absent_task_is_no_part_of_a_step_and_keeps_its_own():
    """Two tasks of three, whatever stands in the third: weights and logits of the two alone."""
    balancer, active = famo(weight_lr=0.1), jnp.array([True, False, True])
    state, pair = balancer.init(3), balancer.init(2)
    for losses, after in (([1.0, np.nan, 2.0], [0.5, np.nan, 1.9]), ([0.5, -1.0, 2.0], [0.4, 0.0, 2.2])):
        weights, state = step(balancer, losses, after, state, active)
        expected, pair = step(balancer, losses[::2], after[::2], pair)
        np.testing.assert_allclose(weights[::2], expected, rtol=1e-6)
        assert weights[1] == 0
    np.testing.assert_allclose(state.logits.value[::2], pair.logits.value, rtol=1e-6)
    assert state.logits.value[1] == 0 and state.logits.adam.count[1] == 0
    np.testing.assert_array_equal(state.logits.adam.count[::2], [2, 2])


def test_an_observation_counts_once_and_belongs_to_the_latest_call():
    balancer = famo(weight_lr=0.1)
    _, once = step(balancer, [1.0, 2.0], [0.5, 1.5], balancer.init(2))
    jax.tree.map(np.testing.assert_array_equal, balancer.observe(jnp.array([0.1, 1.0]), once), once)
    _, waiting = call(balancer, jnp.array([9.0, 0.1]), balancer.init(2))
    _, replaced = step(balancer, [1.0, 2.0], [0.5, 1.5], waiting)
    jax.tree.map(np.testing.assert_array_equal, replaced, once)


def test_a_loss_below_its_bound_skips_the_step_and_one_at_its_bound_does_not():
    balancer = famo(bound=[0.5, 0.0])
    for losses, skipped in (([0.4, 1.0], True), ([0.5, 1.0], False), ([0.5, 0.0], True)):
        weights, state, info = jax.jit(weigh)(balancer, None, jnp.array(losses), balancer.init(2), None)
        assert info["nonfinite"] == skipped and np.isfinite(weights).all()
        assert np.all(np.asarray(state.pending) != skipped)  # a skipped step has no observation


@pytest.mark.parametrize("after", [[-0.1, 1.0], [np.nan, 1.0], [np.inf, 1.0]])
def test_an_observation_that_is_not_finite_moves_nothing(after):
    _, before = step(famo(), [1.0, 2.0], [0.5, 1.5], famo().init(2))
    _, state = step(famo(), [1.0, 2.0], after, before)
    jax.tree.map(np.testing.assert_array_equal, state.logits, before.logits)


def test_bounds_go_by_task_name():
    bound = famo(bound={"spend": 1.0, "click": 0.2}).for_tasks([Task("click", "binary"), Task("spend", "regression")])
    weights, _ = call(bound, jnp.array([0.5, 2.0]), bound.init(2))
    np.testing.assert_allclose(weights, [0.769230765, 0.230769235], rtol=1e-6)


@pytest.mark.parametrize("options", [{"weight_lr": -1.0}, {"weight_decay": -1e-3}, {"bound": [0.0, np.inf]}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match=f"famo\\({next(iter(options))}\\)"):
        famo(**options)
