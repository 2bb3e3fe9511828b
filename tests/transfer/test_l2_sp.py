"""L2-SP: a closed form, the sum over all entries, rows of new ids, and what it adds to a step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtl_jax.train import Optimizer
from mtl_jax.transfer import L2SP, FineTune

RATE = 0.1


def penalty_of(strategy, start, origin):
    """Parameters -> penalty, anchored at the start."""
    _, kept = strategy.init(start, origin, jax.random.key(0))
    return lambda params: strategy.penalty(params, kept, None)


def test_the_minimum_with_a_mean_squared_error_is_that_of_ridge_regression_around_the_start():
    x, y, start = np.array([[1.0, 0], [0, 1], [1, 1]]), np.array([1.0, 2, 2]), np.array([1.0, 0])
    with jax.enable_x64(True):
        penalty = penalty_of(L2SP(alpha=0.5), {"w": jnp.asarray(start)}, {"w": True})

        def objective(w):
            return jnp.mean(jnp.square(x @ w - y)) + penalty({"w": w})

        slope, curvature = jax.grad(objective)(jnp.zeros(2)), jax.hessian(objective)(jnp.zeros(2))
        found = -np.linalg.solve(curvature, slope)  # the objective is quadratic
    np.testing.assert_allclose(found, [0.96190476, 1.10476190], rtol=1e-8)
    normal = 2 * x.T @ x / 3 + 0.5 * np.eye(2)
    np.testing.assert_allclose(found, np.linalg.solve(normal, 2 * x.T @ y / 3 + 0.5 * start), rtol=1e-12)


START = {
    "tables/user/rows": np.arange(8.0, dtype=np.float32).reshape(4, 2),
    "sharing/kernel": np.array([[1.0, -2.0]], np.float32),
    "task/click/bias": np.array([0.5], np.float32),
    "task/click/outputs/kappa": np.float32(2.0),
}
ORIGIN = {"tables/user/rows": np.array([True, False, True, False]), "sharing/kernel": True}


@pytest.mark.parametrize(("alpha", "beta"), [(0.3, 0.0), (0.0, 0.7), (0.3, 0.7)])
def test_it_is_a_sum_over_entries_from_the_source_and_new_ones(alpha, beta):
    """In tables row by row: those of ids that the source lacks are new, as is what the origin does not name."""
    rng = np.random.default_rng(0)
    params = {path: array + rng.normal(size=np.shape(array)).astype(np.float32) for path, array in START.items()}
    expected = 0.0
    for path, array in params.items():
        for index in np.ndindex(np.shape(array)):
            found = ORIGIN.get(path, False)
            old = found[index[0]] if isinstance(found, np.ndarray) else found
            value, anchor = float(array[index]), float(START[path][index])
            expected += alpha / 2 * (value - anchor) ** 2 if old else beta / 2 * value**2
    start = {path: jnp.asarray(array) for path, array in START.items()}
    value = penalty_of(L2SP(alpha, beta), start, ORIGIN)({path: jnp.asarray(a) for path, a in params.items()})
    np.testing.assert_allclose(value, expected, rtol=1e-6)


def test_value_and_gradient_are_exactly_zero_at_the_source():
    start = {path: jnp.asarray(array) for path, array in START.items()}
    value, gradient = jax.value_and_grad(penalty_of(L2SP(), start, dict.fromkeys(START, True)))(start)
    assert value == 0 and all(not np.any(leaf) for leaf in gradient.values())


def test_a_step_is_that_of_fine_tuning_and_a_pull(make_model, make_step, make_batch, arrays_of, perturbed):
    """Under SGD, with a new tower and new ids."""
    model, batch = make_model(), make_batch(20)
    loaded = arrays_of(model)
    origin = {path: True for path in loaded if not path.startswith("task/spend")}
    origin["tables/user/rows"] = np.arange(10) % 2 > 0
    found = {}
    for strategy in (FineTune(), L2SP(0.5, 0.2)):
        step, state = make_step(model, strategy, origin=origin, optimizer=Optimizer(optax.identity(), RATE))
        before = perturbed(state, 0.1)
        found[type(strategy)] = jax.jit(step)(before, batch)[0].params
    for path, plain in found[FineTune].items():
        start = np.asarray(before.params[path], np.float64)
        old = np.reshape(origin.get(path, False), (-1,) + (1,) * (start.ndim - 1))
        pull = np.where(old, 0.5 * (start - loaded[path]), 0.2 * start)
        np.testing.assert_allclose(found[L2SP][path], plain - RATE * pull, rtol=1e-5, atol=1e-6, err_msg=path)


def test_the_anchor_is_a_copy_that_outlives_the_arrays_it_was_made_of(make_model, make_step, make_batch):
    """The state is donated to the program of a step."""
    step, state = make_step(make_model(), L2SP())
    anchor = jax.tree.map(np.array, state.kept.arrays["anchor"])
    run = jax.jit(step, donate_argnums=0)
    for _ in range(2):
        state, _ = run(state, make_batch(20))
    jax.tree.map(np.testing.assert_array_equal, state.kept.arrays["anchor"], anchor)
