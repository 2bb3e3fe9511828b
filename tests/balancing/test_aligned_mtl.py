"""Aligned-MTL: goldens, the condition of the aligned gradients, and their scale."""

import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.balancing.aligned_mtl import aligned_mtl
from mtl_jax.balancing.base import aggregate, gramian, weigh
from mtl_jax.errors import ConfigError


def test_goldens(aligned_mtl_case, dtype, assert_golden):
    case = aligned_mtl_case
    jacobian = jnp.asarray(case["jacobian"], dtype)
    num_tasks = len(jacobian)
    balancer = aligned_mtl(**case["params"])
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


ROWS = np.random.default_rng(12).normal(size=(4, 7)) * np.array([[0.1], [1.0], [5.0], [0.3]])


def aligned_rows(rows, **options):
    """The rows of BJ, one for each unit preference."""
    return np.stack([direction_of(aligned_mtl(preference=p, **options), rows) for p in np.eye(len(rows))])


@pytest.mark.parametrize("scale_mode", ["min", "median", "rmse"])
def test_aligned_gradients_are_orthogonal_and_equally_long(scale_mode):
    """Their common length is the chosen mean of the singular values."""
    singular = np.linalg.svd(ROWS, compute_uv=False)
    length = {"min": singular[-1], "median": singular[2], "rmse": np.sqrt(np.mean(singular**2))}[scale_mode]
    rows = aligned_rows(ROWS, scale_mode=scale_mode)
    np.testing.assert_allclose(rows @ rows.T / length**2, np.eye(4), atol=1e-3)


def test_condition_number_is_1_on_what_dependent_gradients_span():
    rows = np.vstack([ROWS[:2], ROWS[0] - 2 * ROWS[1]])
    singular = np.linalg.svd(aligned_rows(rows), compute_uv=False)
    np.testing.assert_allclose(singular, [np.linalg.svd(rows, compute_uv=False)[1]] * 2 + [0], atol=1e-4)


def test_orthogonal_gradients_of_one_length_are_left_alone():
    np.testing.assert_allclose(direction_of(aligned_mtl(preference=[1.0, 3.0]), [[0, 2.0], [2, 0]]), [6, 2], rtol=1e-6)


def test_a_short_gradient_decides_the_scale():
    """Lengths 1 and 1e-4, orthogonal: everything shrinks to the shorter; in float32 it is not taken for rounding."""
    np.testing.assert_allclose(direction_of(aligned_mtl(), [[1.0, 0], [0, 1e-4]]), [1e-4, 1e-4], rtol=1e-5)


def test_options_out_of_range_are_refused():
    with pytest.raises(ConfigError, match=r"aligned_mtl\(scale_mode\) is 'max'"):
        aligned_mtl(scale_mode="max")
    with pytest.raises(ConfigError, match=r"aligned_mtl\(preference\)"):
        aligned_mtl(preference=-1.0)
