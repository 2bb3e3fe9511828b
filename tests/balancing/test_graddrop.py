"""GradDrop: goldens, the paper's formula coordinate by coordinate, and its expectation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.balancing.base import NoState, aggregate
from mtl_jax.balancing.graddrop import draw_uniform, graddrop, pick_signs
from mtl_jax.errors import ConfigError
from mtl_jax.tasks import Task


def paper_loop(jacobian, uniform, leak):
    direction = np.zeros(jacobian.shape[1])
    for p, u in enumerate(uniform):
        column = jacobian[:, p]
        if np.sum(np.abs(column)) == 0:
            continue
        purity = 0.5 * (1 + np.sum(column) / np.sum(np.abs(column)))
        for gradient, part in zip(column, leak, strict=True):
            mask = (purity > u) * (gradient > 0) + (purity < u) * (gradient < 0)
            direction[p] += (part + (1 - part) * mask) * gradient
    return direction


@jax.jit
def direct(balancer, jacobian, key):
    return aggregate(balancer, jacobian, NoState(), key=key)[0]


def mean_direction(jacobian, leak, num_calls=20_000):
    draw = jax.vmap(lambda k: pick_signs(jacobian, draw_uniform(k, jacobian), leak))
    return np.mean(jax.jit(draw)(jax.random.split(jax.random.key(0), num_calls)), axis=0)


def test_goldens(graddrop_case, dtype, assert_golden):
    case = graddrop_case
    jacobian = jnp.asarray(case["jacobian"], dtype)
    leak = jnp.full(len(jacobian), case["params"]["leak"], dtype)
    if "expectation" in case:
        assert_golden(mean_direction(jacobian, leak), case["direction"], {**case, "tol": 0.05}, dtype)
    else:
        direction = pick_signs(jacobian, jnp.asarray(case["uniform"], dtype), leak)
        assert direction.dtype == dtype
        assert_golden(direction, case["direction"], case, dtype)


@pytest.mark.parametrize("num_tasks", [1, 2, 5])
def test_equals_the_papers_formula(num_tasks):
    rng = np.random.default_rng(num_tasks)
    jacobian = rng.normal(size=(num_tasks, 40)) * (rng.uniform(size=(num_tasks, 40)) < 0.8)
    leak, key = rng.uniform(size=num_tasks), jax.random.key(num_tasks)
    balancer, rows = graddrop(leak=list(leak)), jnp.asarray(jacobian, jnp.float32)
    direction, _ = balancer.combine(rows, jnp.zeros(num_tasks), NoState(), key)
    expected = paper_loop(jacobian, np.asarray(draw_uniform(key, rows)), leak)
    np.testing.assert_allclose(direction, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("leak", [0.0, 0.4])
def test_the_expectation_is_the_sum_for_any_common_leak(leak):
    jacobian = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    mean = mean_direction(jnp.asarray(jacobian), jnp.full(4, leak))
    # d is at most the sum of |g| and its standard error at most that over sqrt(20000)
    assert np.all(np.abs(mean - jacobian.sum(axis=0)) < 4 / np.sqrt(20_000) * np.abs(jacobian).sum(axis=0))


def test_leak_one_is_the_sum():
    jacobian = jnp.asarray(np.random.default_rng(1).normal(size=(3, 7)), jnp.float32)
    direction = direct(graddrop(leak=1.0), jacobian, jax.random.key(0))
    np.testing.assert_allclose(direction, jnp.sum(jacobian, axis=0), rtol=1e-5, atol=1e-6)


def test_coordinates_of_one_sign_pass_whole():
    jacobian = jnp.array([[1.0, -1.0, 0.0, 0.0], [2.0, -3.0, 0.0, -4.0]])
    draws = jax.jit(jax.vmap(lambda k: direct(graddrop(), jacobian, k)))
    directions = draws(jax.random.split(jax.random.key(0), 500))
    np.testing.assert_array_equal(directions, np.tile([3.0, -4.0, 0.0, -4.0], (500, 1)))


def test_coordinates_are_drawn_independently():
    """Of two leaves, too: 1600 coordinates with even odds, and no coordinate follows another."""
    signs = np.array([1.0, -1.0], np.float32)
    jacobian = {"kernel": np.tile(signs[:, None, None], (1, 40, 20)), "bias": np.tile(signs[:, None], (1, 800))}
    direction = direct(graddrop(), jacobian, jax.random.key(3))
    kernel, bias = np.ravel(direction["kernel"]), np.asarray(direction["bias"])
    for signs in (kernel, bias, kernel * bias, kernel[1:] * kernel[:-1]):
        assert abs(np.sum(signs)) < 4 * np.sqrt(len(signs))


def test_inactive_tasks_have_no_sign():
    jacobian = jnp.array([[1.0, 2.0], [-1e6, -1e6], [3.0, 1.0]])
    active = jnp.array([True, False, True])
    direction, _ = graddrop().combine(jacobian, jnp.zeros(3), NoState(), jax.random.key(0), active=active)
    np.testing.assert_array_equal(direction, [4, 3])


def test_the_direction_has_the_type_of_its_leaf():
    jacobian = {"half": jnp.ones((2, 3), jnp.bfloat16), "single": jnp.ones((2, 2))}
    direction = direct(graddrop(), jacobian, jax.random.key(0))
    assert direction["half"].dtype == jnp.bfloat16 and direction["single"].dtype == jnp.float32
    np.testing.assert_array_equal(direction["half"].astype(float), [2, 2, 2])


def test_leaks_go_by_task_name():
    tasks = [Task("click", "binary"), Task("buy", "binary")]
    bound = graddrop(leak={"buy": 1.0, "click": 0.0}).for_tasks(tasks)
    direction, _ = bound.combine(jnp.array([[1.0], [-3.0]]), jnp.zeros(2), bound.init(2), jax.random.key(0))
    assert direction[0] in (-3.0, -2.0)  # the second task always passes, the first only if its sign is drawn
    with pytest.raises(ConfigError, match=r"graddrop\(leak\)"):
        graddrop(leak=[0.1, 0.2, 0.3]).for_tasks(tasks)


@pytest.mark.parametrize("leak", [-0.1, 1.5, [0.0, 2.0]])
def test_options_out_of_range_are_refused(leak):
    with pytest.raises(ConfigError, match=r"graddrop\(leak\)"):
        graddrop(leak=leak)
