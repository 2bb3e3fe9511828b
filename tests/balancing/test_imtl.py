"""IMTL: goldens, IMTL-G of scaled gradients, and what its scales learn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.balancing.base import aggregate, gramian, weigh
from mtl_jax.balancing.imtl import imtl
from mtl_jax.balancing.imtl_g import imtl_g
from mtl_jax.balancing.learnable import learnable
from mtl_jax.errors import ConfigError


def test_goldens(imtl_case, dtype, assert_golden):
    case = imtl_case
    jacobian = jnp.asarray(case["jacobian"], dtype)
    num_tasks = len(jacobian)
    balancer = imtl(**case["params"])
    losses = jnp.asarray(case.get("losses", [1.0] * num_tasks), dtype)
    active = jnp.asarray(case.get("active", [True] * num_tasks))
    state = imtl().init(len(case["jacobian"]))._replace(scale=learnable(jnp.asarray(case["state"]["scale"], dtype)))
    weights, _, _ = weigh(balancer, gramian(jacobian), losses, state, None, active)
    direction, _ = aggregate(balancer, jacobian, state, losses=losses, active=active)
    assert weights.dtype == direction.dtype == dtype
    if case["weights"] is not None:
        assert_golden(weights, case["weights"], case, dtype)
    assert_golden(direction, case["direction"], case, dtype)


ROWS = jnp.asarray(np.random.default_rng(9).normal(size=(3, 5)), jnp.float32)


def test_starts_as_imtl_g():
    direction, _ = aggregate(imtl(), ROWS, imtl().init(3), losses=jnp.array([0.1, 1.0, 9.0]))
    np.testing.assert_array_equal(direction, aggregate(imtl_g(), ROWS, imtl_g().init(3))[0])


def test_is_imtl_g_of_the_scaled_losses():
    scale = jnp.array([0.5, -1.0, 0.2])
    direction, _ = aggregate(imtl(), ROWS, imtl().init(3)._replace(scale=learnable(scale)), losses=jnp.ones(3))
    scaled = jnp.exp(scale)[:, None] * ROWS
    np.testing.assert_allclose(direction, aggregate(imtl_g(), scaled, imtl_g().init(3))[0], rtol=1e-4)


def test_scaled_losses_tend_to_1():
    """The stationary point of e^s L - s."""
    losses = jnp.array([0.2, 1.0, 4.0])
    balancer = imtl(weight_lr=0.03)
    products = gramian(ROWS)
    state = jax.lax.fori_loop(
        0, 400, lambda _, state: balancer.weigh(products, losses, state, None)[1], balancer.init(3)
    )
    np.testing.assert_allclose(jnp.exp(state.scale.value) * losses, 1, rtol=1e-2)


def test_a_loss_of_zero_stops_at_the_bound():
    balancer = imtl(weight_lr=4.0)
    state = balancer.init(1)
    for _ in range(5):
        _, state = balancer.weigh(jnp.eye(1), jnp.zeros(1), state, None)
    np.testing.assert_array_equal(state.scale.value, [10.0])


def test_an_inactive_task_keeps_its_scale():
    balancer = imtl(weight_lr=0.1)
    active = jnp.array([True, False, True])
    _, state = balancer.weigh(gramian(ROWS), jnp.full(3, 5.0), balancer.init(3), None, active=active)
    np.testing.assert_allclose(state.scale.value, [-0.1, 0.0, -0.1], rtol=1e-4)


def test_a_negative_rate_is_refused():
    with pytest.raises(ConfigError, match=r"imtl\(weight_lr\)"):
        imtl(weight_lr=-1.0)


def test_heads_descend_the_scaled_losses():
    """By the scale that the weights were found with, which for an absent task is that of before."""
    balancer, scale = imtl(weight_lr=0.5), jnp.log(jnp.array([2.0, 0.5, 3.0]))
    state = balancer.init(3)._replace(scale=learnable(scale))
    weights, state, _ = weigh(balancer, ROWS @ ROWS.T, jnp.ones(3), state, None, jnp.array([True, True, False]))
    np.testing.assert_allclose(balancer.head_weights(weights, jnp.ones(3), state), [2.0, 0.5, 1.0], rtol=1e-6)
    assert np.any(np.asarray(state.scale.value) != scale)
