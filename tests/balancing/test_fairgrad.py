"""FairGrad: goldens, its equation, and its limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.balancing.base import aggregate, gramian, weigh
from mtl_jax.balancing.fairgrad import fairgrad
from mtl_jax.balancing.mgda import mgda
from mtl_jax.errors import ConfigError


def test_goldens(fairgrad_case, dtype, assert_golden):
    case = fairgrad_case
    jacobian = jnp.asarray(case["jacobian"], dtype)
    num_tasks = len(jacobian)
    balancer = fairgrad(**case["params"])
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


ROWS = np.random.default_rng(3).normal(0.3, 1.0, size=(4, 9))


@pytest.mark.parametrize("alpha", [0.5, 1.0, 3.0])
def test_gains_are_a_power_of_the_weights(alpha):
    balancer = fairgrad(alpha=alpha)
    with jax.enable_x64(True):
        rows = jnp.asarray(ROWS)
        weights, _, _ = weigh(balancer, rows @ rows.T, jnp.ones(4), balancer.init(4), None)
        np.testing.assert_allclose(rows @ (weights @ rows), weights ** (-1 / alpha), rtol=1e-8)


def test_alpha_0_is_the_mean():
    np.testing.assert_allclose(direction_of(fairgrad(alpha=0.0), ROWS), np.mean(ROWS, axis=0), rtol=1e-5)


def test_large_alpha_tends_to_the_direction_of_mgda():
    cosines = []
    shortest = direction_of(mgda(), ROWS)
    for alpha in (1.0, 4.0, 16.0):
        direction = direction_of(fairgrad(alpha=alpha), ROWS)
        cosines.append(direction @ shortest / np.linalg.norm(direction) / np.linalg.norm(shortest))
    assert cosines[0] < cosines[1] < cosines[2] and cosines[2] > 0.998


@pytest.mark.parametrize("alpha", [0.5, 1.0, 3.0])
def test_one_task(alpha):
    """w n^2 = w^(-1/alpha)."""
    expected = 5.0 ** (-2 * alpha / (1 + alpha)) * np.array([3.0, 4.0])
    np.testing.assert_allclose(direction_of(fairgrad(alpha=alpha), [[3.0, 4.0]]), expected, rtol=1e-5)


def test_alpha_is_a_leaf_that_a_run_axis_maps():
    alphas = jnp.array([0.0, 0.5, 2.0])
    rows = jnp.asarray(ROWS, jnp.float32)
    together = jax.vmap(lambda alpha: aggregate(fairgrad(alpha=alpha), rows, fairgrad().init(4))[0])(alphas)
    alone = [direction_of(fairgrad(alpha=float(alpha)), ROWS) for alpha in alphas]
    np.testing.assert_allclose(together, alone, rtol=1e-3)


@pytest.mark.parametrize("options", [{"alpha": -0.5}, {"alpha": np.nan}, {"reg_eps": -1e-6}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match=f"fairgrad\\({next(iter(options))}\\)"):
        fairgrad(**options)
