"""Trimmed mean: goldens, SciPy's trimmed mean, and its limits."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from mtl_jax.balancing.base import NoState, aggregate
from mtl_jax.balancing.trimmed_mean import trimmed_mean
from mtl_jax.errors import ConfigError
from mtl_jax.tasks import Task


def direction_of(trim, jacobian, active=None):
    active = None if active is None else jnp.asarray(active)
    jacobian = jnp.asarray(jacobian, jnp.float32)
    return trimmed_mean(trim=trim).combine(jacobian, jnp.zeros(len(jacobian)), NoState(), None, active=active)[0]


def test_goldens(trimmed_mean_case, dtype, assert_golden):
    case = trimmed_mean_case
    jacobian = jnp.asarray(case["jacobian"], dtype)
    # Called directly: next to 1e11 the last row would count as one without a gradient.
    direction, _ = trimmed_mean(**case["params"]).combine(jacobian, jnp.zeros(len(jacobian), dtype), NoState(), None)
    assert direction.dtype == dtype
    assert_golden(direction, case["direction"], case, dtype)


@pytest.mark.parametrize(("num_tasks", "trim"), [(4, 1), (7, 2), (8, 3)])
def test_equals_scipy(num_tasks, trim):
    jacobian = np.random.default_rng(num_tasks).standard_cauchy(size=(num_tasks, 20)).astype(np.float32)
    # half a row more than the share to cut, because SciPy rounds down
    expected = scipy.stats.trim_mean(jacobian.astype(np.float64), (trim + 0.5) / num_tasks)
    np.testing.assert_allclose(direction_of(trim, jacobian), expected, rtol=1e-5, atol=1e-5)


def test_limits():
    jacobian = np.random.default_rng(0).normal(size=(3, 7))
    np.testing.assert_allclose(direction_of(0, jacobian), np.mean(jacobian, axis=0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(direction_of(1, jacobian), np.median(jacobian, axis=0), rtol=1e-5)


def test_lies_within_the_values_of_the_good_tasks():
    """Whatever one task sends, every coordinate stays between the extremes of the others."""
    rng = np.random.default_rng(1)
    good = rng.normal(size=(4, 9))
    for bad in 10 ** rng.uniform(-3, 9, size=(5, 9)) * rng.choice([-1, 1], size=(5, 9)):
        direction = direction_of(1, np.vstack([good, bad]))
        assert np.all((direction >= good.min(axis=0) - 1e-6) & (direction <= good.max(axis=0) + 1e-6))


def test_inactive_tasks_are_no_values():
    jacobian = np.random.default_rng(2).normal(size=(5, 6))
    active = np.array([True, False, True, True, True])
    np.testing.assert_allclose(direction_of(1, jacobian, active), direction_of(1, jacobian[active]), rtol=1e-6)
    few = np.array([True, False, False, True, False])
    np.testing.assert_allclose(direction_of(2, jacobian, few), np.mean(jacobian[few], axis=0), rtol=1e-5)
    three = np.array([True, False, True, True, False])
    np.testing.assert_allclose(direction_of(2, jacobian, three), np.median(jacobian[three], axis=0), rtol=1e-5)


def test_the_direction_has_the_shape_and_type_of_its_leaf():
    jacobian = {"kernel": jnp.ones((3, 2, 4), jnp.bfloat16), "scale": jnp.array([1.0, 5.0, 2.0])}
    direction, _ = aggregate(trimmed_mean(), jacobian, NoState())
    assert direction["kernel"].dtype == jnp.bfloat16 and direction["kernel"].shape == (2, 4)
    assert direction["scale"] == 2.0


def test_too_few_tasks_are_refused():
    tasks = [Task("click", "binary"), Task("buy", "binary")]
    for call in (lambda: trimmed_mean().for_tasks(tasks), lambda: trimmed_mean(trim=2).init(4)):
        with pytest.raises(ConfigError, match="expected at least"):
            call()


@pytest.mark.parametrize("trim", [-1, 1.0, "1"])
def test_options_out_of_range_are_refused(trim):
    with pytest.raises(ConfigError, match=r"trimmed_mean\(trim\)"):
        trimmed_mean(trim=trim)
