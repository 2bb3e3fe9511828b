"""IMTL-G: goldens, equal projections, and the guard of its sum."""

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax.balancing.base import aggregate, gramian, weigh
from mtl_jax.balancing.imtl_g import imtl_g


def test_goldens(imtl_g_case, dtype, assert_golden):
    case = imtl_g_case
    jacobian = jnp.asarray(case["jacobian"], dtype)
    num_tasks = len(jacobian)
    balancer = imtl_g(**case["params"])
    losses = jnp.asarray(case.get("losses", [1.0] * num_tasks), dtype)
    active = jnp.asarray(case.get("active", [True] * num_tasks))
    state = balancer.init(num_tasks)
    weights, _, _ = weigh(balancer, gramian(jacobian), losses, state, None, active)
    direction, _ = aggregate(balancer, jacobian, state, losses=losses, active=active)
    assert weights.dtype == direction.dtype == dtype
    if case["weights"] is not None:
        assert_golden(weights, case["weights"], case, dtype)
    assert_golden(direction, case["direction"], case, dtype)


def direction_of(balancer, jacobian, **options):
    jacobian = jnp.asarray(jacobian, float)
    return np.asarray(aggregate(balancer, jacobian, balancer.init(len(jacobian)), **options)[0])


def test_projections_on_unit_gradients_are_equal_and_positive():
    """Also where the sum of the unconstrained weights is negative: some 4 % of these matrices."""
    rows = np.random.default_rng(8).normal(size=(300, 3, 3))
    lengths = np.linalg.norm(rows, axis=2)
    sums = np.sum(np.linalg.solve(rows @ rows.transpose(0, 2, 1), lengths[..., None]), axis=(1, 2))
    assert 0.01 < np.mean(sums < 0) < 0.08
    with jax.enable_x64(True):
        directions, _ = jax.vmap(lambda jacobian: aggregate(imtl_g(), jacobian, imtl_g().init(3)))(jnp.asarray(rows))
    projections = np.einsum("ckp,cp->ck", rows, directions) / lengths
    np.testing.assert_allclose(projections, np.repeat(1 / np.abs(sums)[:, None], 3, axis=1), rtol=1e-6)


def test_short_gradients_are_not_taken_for_dependent_ones():
    rows = np.array([[1.0, 0.2, 0.0], [0.1, 1.0, 0.3], [0.0, 0.3, 1.0]]) * np.array([[1e-3], [1.0], [1e-2]])
    units = rows / np.linalg.norm(rows, axis=1)[:, None]
    projections = units @ direction_of(imtl_g(), rows)
    np.testing.assert_allclose(projections, projections[0], rtol=1e-4)


def test_opposite_gradients_cancel():
    np.testing.assert_array_equal(direction_of(imtl_g(), [[0.3, 0.1], [-0.3, -0.1]]), 0)


def test_the_guard_bounds_weights_whose_sum_vanishes():
    """Lengths chosen so that the positive and the negative weights add up to 0."""
    units = np.array([[1.0, 0.0, 0.0], [0.8, 0.6, 0.0], [0.995, 0.0995, 0.01]])
    units /= np.linalg.norm(units, axis=1)[:, None]
    shares = np.linalg.solve(units @ units.T, np.ones(3))
    assert np.min(shares) < 0 < np.max(shares)
    positive, negative = np.sum(shares[shares > 0]), -np.sum(shares[shares < 0])
    rows = units * np.where(shares > 0, positive / negative, 1.0)[:, None]
    balancer = imtl_g()
    weights, state, _ = weigh(balancer, jnp.asarray(rows @ rows.T), jnp.ones(3), balancer.init(3), None)
    assert balancer.diagnostics(state)["imtl_guard"] == 1
    np.testing.assert_allclose(np.sum(np.abs(weights)), 1, rtol=1e-5)
