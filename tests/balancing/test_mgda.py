"""MGDA: goldens, and what the shortest vector of a hull has to be."""

import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.balancing.base import aggregate, gramian, weigh
from mtl_jax.balancing.mgda import mgda
from mtl_jax.errors import ConfigError


def test_goldens(mgda_case, dtype, assert_golden):
    case = mgda_case
    jacobian = jnp.asarray(case["jacobian"], dtype)
    num_tasks = len(jacobian)
    balancer = mgda(**case["params"])
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


def test_no_task_gains_less_than_the_squared_length():
    for seed in range(5):
        rows = np.random.default_rng(seed).normal(0.3, 1.0, size=(5, 8))
        direction = direction_of(mgda(), rows)
        assert np.linalg.norm(direction) <= np.min(np.linalg.norm(rows, axis=1)) + 1e-5
        assert np.all(rows @ direction >= direction @ direction - 1e-4)


def test_normalisation_decides_the_weights_only():
    """Weights of rows divided by nu, on the rows as they are."""
    rows, losses = np.array([[3.0, 0.0], [0.0, 1.0]]), np.array([0.5, 2.0])
    lengths = np.array([3.0, 1.0])
    for normalize, factors in {"l2": lengths, "loss": losses, "loss+": losses * lengths}.items():
        normalised = np.linalg.norm(rows, axis=1) / factors
        weights = normalised[::-1] ** 2 / np.sum(normalised**2)  # orthogonal rows
        direction = direction_of(mgda(normalize=normalize), rows, losses=losses)
        np.testing.assert_allclose(direction, weights @ rows, rtol=1e-5)


def test_a_loss_of_zero_is_a_non_finite_step():
    balancer = mgda(normalize="loss")
    weights, _, info = weigh(balancer, jnp.eye(2), jnp.array([0.0, 1.0]), balancer.init(2), None)
    assert info["nonfinite"] and not np.any(weights)


def test_the_solver_reports():
    balancer = mgda()
    rows = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)))
    _, state = aggregate(balancer, rows, balancer.init(3))
    report = balancer.diagnostics(state)
    assert report["solver_misses"] == 0 and report["solver_iterations"] >= 1 and report["solver_residual"] < 1e-5


def test_an_unknown_normalisation_is_refused():
    with pytest.raises(ConfigError, match=r"mgda\(normalize\) is 'norm'"):
        mgda(normalize="norm")
