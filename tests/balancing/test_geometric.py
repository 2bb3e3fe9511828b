"""The geometric mean of the losses: goldens, its derivative, and the units it does not depend on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.balancing.base import NoState, aggregate, weigh
from mtl_jax.balancing.geometric import geometric
from mtl_jax.balancing.scale_invariant import scale_invariant


def objective(losses):
    return np.prod(losses) ** (1 / len(losses))


def weights_of(losses, active=None, balancer=geometric()):
    return np.asarray(balancer.weigh(None, jnp.asarray(losses), NoState(), None, active=active)[0])


def test_goldens(geometric_case, dtype, assert_golden):
    case = geometric_case
    losses = jnp.asarray(case["losses"], dtype)
    weights = weights_of(losses)
    direction, _ = aggregate(geometric(), jnp.asarray(case["jacobian"], dtype), NoState(), losses=losses)
    assert weights.dtype == direction.dtype == dtype
    assert_golden(weights, case["weights"], case, dtype)
    assert_golden(direction, case["direction"], case, dtype)
    np.testing.assert_allclose(objective(np.array(case["losses"])), case["objective"], rtol=1e-10)


def test_weights_are_the_derivative_of_the_objective():
    losses, step = np.array([0.7, 0.2, 1.5, 30.0]), 1e-6
    with jax.enable_x64(True):
        weights = weights_of(losses)
    for weight, shift in zip(weights, step * np.eye(4), strict=True):
        rise = objective(losses + shift) - objective(losses - shift)
        np.testing.assert_allclose(weight, rise / (2 * step), rtol=1e-7)


def test_every_task_contributes_the_same_and_the_contributions_add_up_to_the_objective():
    losses = np.array([0.7, 0.2, 1.5, 30.0], np.float32)
    np.testing.assert_allclose(weights_of(losses) * losses, np.full(4, objective(losses) / 4), rtol=1e-5)


def test_is_the_sum_of_logarithms_up_to_its_length():
    losses = np.array([0.7, 0.2, 1.5], np.float32)
    expected = objective(losses) / 3 * weights_of(losses, balancer=scale_invariant())
    np.testing.assert_allclose(weights_of(losses), expected, rtol=1e-5)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_the_product_of_the_losses_may_leave_the_range(size):
    losses = size * np.array([1.0, 4.0, 1.0, 4.0, 1.0, 4.0], np.float32)
    np.testing.assert_allclose(weights_of(losses), np.tile([1 / 3, 1 / 12], 3), rtol=1e-4)


def test_an_absent_task_does_not_count():
    weights = weights_of(np.array([0.5, np.nan, 2.0], np.float32), jnp.array([True, False, True]))
    np.testing.assert_allclose(weights, [1.0, 0.0, 0.25], rtol=1e-6)


def test_losses_of_zero():
    weights = weights_of(np.array([0.0, 1.0], np.float32))
    np.testing.assert_allclose(weights[0] * 1e-12, weights[1], rtol=1e-4)
    np.testing.assert_allclose(weights_of(np.zeros(4, np.float32)), np.full(4, 0.25))


@pytest.mark.parametrize("balancer", [geometric(), scale_invariant()], ids=["geometric", "scale_invariant"])
def test_a_negative_loss_skips_the_step(balancer):
    weights, _, info = weigh(balancer, None, jnp.array([1.0, -1e-3]), NoState(), None)
    np.testing.assert_array_equal(weights, [0, 0])
    assert info["nonfinite"]
    weights, _, info = weigh(balancer, None, jnp.array([1.0, -1e-3]), NoState(), None, jnp.array([True, False]))
    assert not info["nonfinite"] and weights[0] == 1
