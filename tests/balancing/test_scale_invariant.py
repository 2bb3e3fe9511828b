"""The sum of the logarithms of the losses: goldens, its derivative, and the unit of a loss that does not matter."""

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax.balancing.base import NoState, aggregate
from mtl_jax.balancing.scale_invariant import scale_invariant


def objective(losses):
    return np.sum(np.log(losses))


def weights_of(losses, active=None):
    return np.asarray(scale_invariant().weigh(None, jnp.asarray(losses), NoState(), None, active=active)[0])


def test_goldens(scale_invariant_case, dtype, assert_golden):
    case = scale_invariant_case
    losses = jnp.asarray(case["losses"], dtype)
    weights = weights_of(losses)
    direction, _ = aggregate(scale_invariant(), jnp.asarray(case["jacobian"], dtype), NoState(), losses=losses)
    assert weights.dtype == direction.dtype == dtype
    assert_golden(weights, case["weights"], case, dtype)
    assert_golden(direction, case["direction"], case, dtype)
    np.testing.assert_allclose(objective(np.array(case["losses"])), case["objective"], atol=1e-10)


def test_weights_are_the_derivative_of_the_objective():
    losses, step = np.array([0.7, 0.2, 1.5, 30.0]), 1e-6
    with jax.enable_x64(True):
        weights = weights_of(losses)
    for weight, shift in zip(weights, step * np.eye(4), strict=True):
        rise = objective(losses + shift) - objective(losses - shift)
        np.testing.assert_allclose(weight, rise / (2 * step), rtol=1e-6)


def test_the_unit_of_a_loss_does_not_matter():
    """A loss in another unit, and its gradient with it: every w_i g_i stays."""
    jacobian = jnp.array([[1.0, 2.0], [-1.0, 1.0], [6.0, -3.0]])
    losses, units = jnp.array([0.7, 0.2, 1.5]), jnp.array([1.0, 10.0, 1e-3])
    direction, _ = aggregate(scale_invariant(), jacobian, NoState(), losses=losses)
    other, _ = aggregate(scale_invariant(), units[:, None] * jacobian, NoState(), losses=units * losses)
    np.testing.assert_allclose(other, direction, rtol=1e-5)


def test_losses_of_zero_have_finite_weights():
    np.testing.assert_allclose(weights_of(np.array([0.0, 4.0], np.float32)), [2.5e11, 0.25], rtol=1e-4)
    assert np.all(np.isfinite(weights_of(np.zeros(3, np.float32))))


def test_an_absent_task_weighs_nothing():
    weights = weights_of(np.array([0.0, np.nan, 2.0], np.float32), jnp.array([False, False, True]))
    np.testing.assert_allclose(weights, [0.0, 0.0, 0.5], rtol=1e-6)
