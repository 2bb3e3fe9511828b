"""LDC-MTL: goldens, its objective by finite differences, its router, neighbours, first losses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.balancing.base import aggregate, weigh
from mtl_jax.balancing.ldc_mtl import discrepancy_slopes, ldc_mtl
from mtl_jax.errors import ConfigError

# Compiled whole, because each operation alone costs a compilation of its own.
call = jax.jit(lambda balancer, losses, state, active=None: balancer.weigh(None, losses, state, None, active=active))


def sigmoid(logits):
    return 1 / (1 + np.exp(-logits))


def normalised(losses, initial, normalize):
    if normalize == "none":
        return losses
    return np.log(losses / initial) if normalize == "log" else losses * initial.min() / initial


def objective(losses, logits, total, initial, normalize, lambda_):
    """The paper's penalised sum; ``total`` is the sum of the router that is held constant."""
    terms = sigmoid(logits) * normalised(losses, initial, normalize)
    return terms.sum() / total + lambda_ * np.sum(np.abs(terms[:-1] - terms[1:]))


def state_with(balancer, logits, initial=None):
    state = balancer.init(len(logits))
    initial = state.initial_losses if initial is None else jnp.asarray(initial)
    return state._replace(logits=state.logits._replace(value=jnp.asarray(logits)), initial_losses=initial)


def weights_of(balancer, losses, state, active=None):
    return np.asarray(call(balancer, jnp.asarray(losses, float), state, active)[0])


def test_goldens(ldc_mtl_case, dtype, assert_golden):
    case = ldc_mtl_case
    balancer, given, losses = ldc_mtl(**case["params"]), case["state"], jnp.asarray(case["losses"], dtype)
    state = state_with(balancer, np.array(given["logits"], dtype), np.array(given.get("initial_losses", losses), dtype))
    weights, _ = call(balancer, losses, state)
    direction, _ = jax.jit(aggregate)(balancer, jnp.asarray(case["jacobian"], dtype), state, losses=losses)
    assert weights.dtype == direction.dtype == dtype
    assert_golden(weights, case["weights"], case, dtype)
    assert_golden(direction, case["direction"], case, dtype)


@pytest.mark.parametrize("normalize", ["init", "none", "log"])
@pytest.mark.parametrize("lambda_", [0.0, 0.05, 2.0])
def test_weights_and_the_routers_gradient_are_derivatives_of_the_objective(normalize, lambda_):
    """The gradient is read off Adam's first moment, which is a tenth of it after one step."""
    losses, initial, logits = np.array([0.7, 0.2, 1.5, 0.9]), np.array([0.5, 0.4, 1.0, 2.0]), np.array([1.0, 0, -1, 2])
    options = {"total": sigmoid(logits).sum(), "initial": initial, "normalize": normalize, "lambda_": lambda_}
    balancer = ldc_mtl(normalize=normalize, lambda_=lambda_)
    with jax.enable_x64(True):
        weights, state = call(balancer, jnp.asarray(losses), state_with(balancer, logits, initial))
        weights, gradient = np.asarray(weights), 10 * np.asarray(state.logits.adam.mu)
    for task, shift in enumerate(1e-6 * np.eye(4)):
        rise = objective(losses + shift, logits, **options) - objective(losses - shift, logits, **options)
        np.testing.assert_allclose(weights[task], rise / 2e-6, rtol=1e-6, atol=1e-9)
        rise = objective(losses, logits + shift, **options) - objective(losses, logits - shift, **options)
        np.testing.assert_allclose(gradient[task], rise / 2e-6, rtol=1e-6, atol=1e-9)


def test_without_a_penalty_equal_logits_give_the_mean():
    balancer = ldc_mtl(lambda_=0.0, normalize="none")
    np.testing.assert_allclose(
        weights_of(balancer, [0.7, 0.2, 1.5, 3.0], balancer.init(4)), np.full(4, 0.25), rtol=1e-6
    )


def test_the_slopes_are_those_of_the_neighbours_that_are_there():
    values = jnp.array([3.0, 1.0, 2.0, 2.0, 5.0])
    full = jnp.ones(5, bool)
    np.testing.assert_array_equal(discrepancy_slopes(values, full), [1, -2, 1, -1, 1])
    np.testing.assert_array_equal(discrepancy_slopes(values, full.at[1].set(False)), [1, 0, -1, -1, 1])
    np.testing.assert_array_equal(discrepancy_slopes(values, jnp.arange(5) == 2), np.zeros(5))
    np.testing.assert_array_equal(discrepancy_slopes(values[:1], full[:1]), [0])


def test_the_first_step_has_no_discrepancy():
    """Under ``init`` all normalised losses start as the smallest loss, however that is rounded, compiled or not."""
    losses = np.random.default_rng(0).uniform(0.1, 5.0, size=8).astype(np.float32)
    balancer = ldc_mtl(lambda_=0.5)
    weights, _ = call(balancer, jnp.asarray(losses), balancer.init(8))
    np.testing.assert_allclose(weights, losses.min() / losses / 8, rtol=1e-5)
    with jax.disable_jit():
        eager, _ = balancer.weigh(None, jnp.asarray(losses), balancer.init(8), None)
    np.testing.assert_allclose(eager, weights, rtol=1e-5)


def test_a_penalty_makes_neighbours_equal():
    """Descending the effective weights with the losses as parameters themselves closes their gaps."""
    balancer = ldc_mtl(lambda_=0.5, normalize="none")
    losses, state = jnp.array([1.0, 3.0, 2.0]), balancer.init(3)
    for _ in range(10):
        weights, state = call(balancer, losses, state)
        losses = losses - 0.1 * weights
    assert np.ptp(losses) < 1.2 and losses[0] > 0.9


def test_first_losses_are_taken_once_each_task_at_its_own_first_step():
    balancer, state = ldc_mtl(), ldc_mtl().init(3)
    for losses, active in (
        ([2.0, np.nan, 0.0], [True, False, True]),  # a first loss of zero is no measure
        ([1.0, 4.0, 0.5], [True, True, True]),
        ([9.0, 9.0, 9.0], [True, True, True]),
    ):
        _, state = call(balancer, jnp.array(losses), state, jnp.array(active))
    np.testing.assert_array_equal(state.initial_losses, [2.0, 4.0, 0.5])


@pytest.mark.parametrize("normalize", ["init", "none", "log"])
def test_an_absent_task_leaves_the_two_others(normalize):
    balancer, active = ldc_mtl(normalize=normalize, lambda_=0.2), jnp.array([True, False, True])
    state, pair = balancer.init(3), balancer.init(2)
    for losses in ([0.5, np.nan, 2.0], [0.4, -1.0, 1.0]):
        weights, state = call(balancer, jnp.array(losses), state, active)
        expected, pair = call(balancer, jnp.array(losses[::2]), pair)
        np.testing.assert_allclose(weights[::2], expected, rtol=1e-5)
        assert weights[1] == 0
    np.testing.assert_allclose(state.logits.value[::2], pair.logits.value, rtol=1e-6)
    assert state.logits.value[1] == 1 and state.logits.adam.count[1] == 0 and state.initial_losses[1] == 0


def test_logits_far_down_keep_their_proportions():
    """sigmoid(-200) is 0 in float32; the shares of the tasks are not."""
    balancer = ldc_mtl(normalize="none")
    weights = weights_of(balancer, [1.0, 1.0], state_with(balancer, np.float32([-200.0, -200.0 + np.log(3)])))
    np.testing.assert_allclose(weights, [0.25, 0.75], rtol=1e-4)


def test_negative_weights_are_counted_not_clipped():
    balancer = ldc_mtl(lambda_=2.0, normalize="none")
    weights, state = call(balancer, jnp.array([1.0, 0.5, 1.0]), balancer.init(3))
    assert weights[1] < 0 < weights[0]
    assert balancer.diagnostics(state) == {"negative_weights": 1}


@pytest.mark.parametrize(("normalize", "skipped"), [("init", True), ("log", True), ("none", False)])
def test_a_negative_first_loss_skips_the_step_where_it_is_a_measure(normalize, skipped):
    balancer = ldc_mtl(normalize=normalize)
    assert jax.jit(weigh)(balancer, None, jnp.array([1.0, -0.1]), balancer.init(2), None)[2]["nonfinite"] == skipped
    assert not jax.jit(weigh)(balancer, None, jnp.array([1.0, 0.0]), balancer.init(2), None)[2]["nonfinite"]


@pytest.mark.parametrize("options", [{"lambda_": -1.0}, {"normalize": "mean"}, {"weight_lr": np.nan}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match=f"ldc_mtl\\({next(iter(options))}\\)"):
        ldc_mtl(**options)
