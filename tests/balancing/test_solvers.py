"""Solvers against scipy in float64, on matrices with dependent, duplicate, opposite and very unequal rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize, nnls

from mtl_jax.balancing.solvers import (
    cagrad_weights,
    cosine_eigenpairs,
    dual_cone,
    gramian_eigenpairs,
    min_norm,
    power_fixed_point,
    simplex_projection,
)

NUM_CASES, NUM_TASKS, NUM_PARAMS = 60, 8, 12


@functools.cache
def jacobians():
    """2 to 8 rows each, ranks from 1, lengths over three decades; some have duplicate, opposite or agreeing rows."""
    rng = np.random.default_rng(0)
    cases = []
    for number in range(NUM_CASES):
        num_tasks = rng.integers(2, NUM_TASKS + 1)
        rank = rng.integers(1, num_tasks + 1)
        rows = rng.normal(size=(num_tasks, rank)) @ rng.normal(size=(rank, NUM_PARAMS))
        if number % 4 == 1:
            rows[1] = rows[0]
        if number % 4 == 2:
            rows[1] = -rows[0]
        if number % 4 == 3:
            rows[:, 0] = np.abs(rows[:, 0]) + 1
        cases.append(rows * 10 ** rng.uniform(-1.5, 1.5, size=(num_tasks, 1)))
    return cases


def solve(solver, cases, dtype, num_tasks=NUM_TASKS):
    """All cases in one call: padded to one shape with tasks that are not active."""
    products = np.full((len(cases), num_tasks, num_tasks), -7.0, dtype)
    active = np.zeros((len(cases), num_tasks), bool)
    for gramian, present, rows in zip(products, active, cases, strict=True):
        size = len(rows)
        gramian[:size, :size] = rows.astype(dtype) @ rows.astype(dtype).T
        present[:size] = True
    return jax.tree.map(np.asarray, jax.jit(jax.vmap(solver))(jnp.asarray(products), jnp.asarray(active)))


def shortest(rows):
    """The point of the hull nearest to 0: y >= 0 with U'y near 0 and y'(1/n) near 1, up to a factor."""
    lengths = np.linalg.norm(rows, axis=1)
    target = min(lengths) / lengths
    system = np.vstack([(rows / lengths[:, None]).T, target])
    values, _ = nnls(system, np.eye(len(system))[-1], maxiter=1000)
    return values / lengths / np.sum(values / lengths)


def projected(rows, bound):
    """The direction of the smallest v >= bound: scipy's non-negative least squares on what is added to the bound."""
    lengths = np.linalg.norm(rows, axis=1)
    units = rows / lengths[:, None]
    added, _ = nnls(units.T, -units.T @ (bound * lengths), maxiter=1000)
    return units.T @ (bound * lengths + added)


def stationary(rows):
    """Whether 0 is all but in the hull of the rows."""
    weights = shortest(rows)
    return np.linalg.norm(weights @ rows) < 1e-3 * np.max(weights * np.linalg.norm(rows, axis=1))


def error(weights, expected, rows):
    """Largest difference of directions, relative to the largest term of the sum."""
    return np.max(np.abs(weights @ rows - expected)) / np.max(np.abs(weights[:, None] * rows))


@pytest.mark.parametrize("num_tasks", [2, 8], ids=["closed form", "pivoting"])
def test_min_norm_is_the_shortest_combination(num_tasks, dtype):
    cases = [rows[:num_tasks] for rows in jacobians()]
    solved = solve(min_norm, cases, dtype, num_tasks)
    assert solved.value.dtype == dtype and not np.any(solved.missed)
    np.testing.assert_allclose(np.sum(solved.value, axis=1), 1, rtol=1e-5)
    for rows, weights in zip(cases, solved.value, strict=True):
        assert np.all(weights[len(rows) :] == 0)
        if not stationary(rows):
            found = error(weights[: len(rows)], shortest(rows) @ rows, rows)
            assert found <= (1e-3 if dtype == np.float32 else 1e-9)


def test_min_norm_meets_its_optimality_conditions_up_to_32_tasks():
    """Every row gains at least the squared length, rows with weight exactly that."""
    rng = np.random.default_rng(0)
    cases = [rng.normal(0.2, 1.0, size=(num_tasks, 24)) for num_tasks in (1, 2, 5, 11, 16, 22, 27, 30, 31, 32)]
    with jax.enable_x64(True):
        solved = solve(min_norm, cases, np.float64, num_tasks=32)
    for rows, padded in zip(cases, solved.value, strict=True):
        weights = padded[: len(rows)]
        gains = rows @ (weights @ rows)
        squared = np.sum((weights @ rows) ** 2)
        scale = np.max(np.sum(rows**2, axis=1))
        assert np.min(gains) >= squared - 1e-10 * scale
        np.testing.assert_allclose(gains[weights > 0], squared, atol=1e-10 * scale)


def test_dual_cone_is_the_non_negative_least_squares_solution(dtype):
    bounds = np.eye(NUM_TASKS) / NUM_TASKS
    solved = solve(lambda gramian, active: dual_cone(gramian, jnp.asarray(bounds), 0.0, active), jacobians(), dtype)
    assert solved.value.dtype == dtype and not np.any(solved.missed)
    for rows, columns in zip(jacobians(), solved.value, strict=True):
        size = len(rows)
        assert np.all(columns[:size, :size] >= bounds[:size, :size].astype(dtype))
        for weights, bound in zip(columns[:size, :size], bounds[:size, :size], strict=True):
            found = error(weights, projected(rows, bound), rows)
            assert found <= (2e-3 if dtype == np.float32 else 1e-9)


def test_power_fixed_point_solves_its_equation():
    """G w = w^(-1/alpha), w > 0, wherever there is a solution; elsewhere it is finite and counted."""
    alphas = np.array([0.5, 1.0, 4.0])
    regular = np.array([not stationary(rows) for rows in jacobians()])
    assert 20 < np.sum(regular) < NUM_CASES

    def solver(gramian, active):
        return jax.vmap(lambda alpha: power_fixed_point(gramian, alpha, None, active))(jnp.asarray(alphas))

    with jax.enable_x64(True):
        solved = solve(solver, jacobians(), np.float64)
    assert np.all(np.isfinite(solved.value)) and np.all(solved.missed[~regular])
    assert np.median(solved.iterations[regular]) <= 12
    for rows, weights in zip(np.array(jacobians(), object)[regular], solved.value[regular], strict=True):
        for alpha, padded in zip(alphas, weights, strict=True):
            weight = padded[: len(rows)]
            np.testing.assert_allclose(rows @ (weight @ rows), weight ** (-1 / alpha), rtol=1e-8)


def test_power_fixed_point_in_float32():
    """The gains g_i . d = 1 / w_i, to 1e-3 of the largest term of d."""
    solved = solve(lambda gramian, active: power_fixed_point(gramian, 1.0, None, active), jacobians(), np.float32)
    for rows, weights, missed in zip(jacobians(), solved.value, solved.missed, strict=True):
        if not stationary(rows):
            weight = weights[: len(rows)].astype(float)
            gains = rows @ (weight @ rows)
            tolerance = 1e-3 * np.max(weight * np.linalg.norm(rows, axis=1)) * np.linalg.norm(rows, axis=1)
            assert not missed and np.all(np.abs(gains - 1 / weight) <= tolerance)


def test_the_regulariser_bounds_opposite_rows():
    """x <= 1 / sqrt(1e-6), up to rounding."""
    opposite = power_fixed_point(jnp.array([[1.0, -1.0], [-1.0, 1.0]]))
    np.testing.assert_allclose(opposite.value, [1e3, 1e3], rtol=0.05)


def test_cagrad_weights_reach_the_minimum_that_scipy_finds():
    rng = np.random.default_rng(1)
    radii = np.array([0.2, 1.0])
    cases = [rng.normal(0.3, 1.0, size=(num_tasks, 6)) for num_tasks in [2, 3, 5, 8] * 4]

    def solver(gramian, active):
        return jax.vmap(lambda c: cagrad_weights(gramian, c, active))(jnp.asarray(radii))

    with jax.enable_x64(True):
        solved = solve(solver, cases, np.float64)
    assert not np.any(solved.missed)
    np.testing.assert_allclose(np.sum(solved.value, axis=-1), 1, rtol=1e-10)
    for rows, weights in zip(cases, solved.value, strict=True):
        size, mean = len(rows), np.mean(rows, axis=0)
        for c, padded in zip(radii, weights, strict=True):

            def objective(point, c=c, rows=rows, mean=mean):
                return point @ rows @ mean + c * np.linalg.norm(mean) * np.linalg.norm(point @ rows)

            simplex = {"type": "eq", "fun": lambda point: np.sum(point) - 1}
            start = np.full(size, 1 / size)
            found = minimize(objective, start, bounds=[(0, 1)] * size, constraints=simplex, tol=1e-10)
            assert objective(padded[:size]) <= found.fun + 1e-8


@pytest.mark.parametrize("total", [0.0, 0.3, 1.0, 5.0])
def test_simplex_projection_is_the_nearest_point(total, dtype):
    """Kolmogorov's criterion: the residual is at its largest on the support, and constant there."""
    points = np.random.default_rng(0).normal(0, 3, size=(50, 7))
    present = np.random.default_rng(1).uniform(size=(50, 7)) < 0.7
    present[:, 0] = True
    project = jax.vmap(lambda point, active: simplex_projection(point, total, active))
    projections = np.asarray(project(jnp.asarray(np.where(present, points, 1e9), dtype), jnp.asarray(present)))
    assert projections.dtype == dtype and np.all(projections >= 0) and np.all(projections[~present] == 0)
    np.testing.assert_allclose(np.sum(projections, axis=1), total, atol=1e-5)
    for point, projection, active in zip(points, projections, present, strict=True):
        residual = (point - projection)[active]
        support = projection[active] > 0
        if np.any(support):
            np.testing.assert_allclose(residual[support], np.max(residual), atol=1e-5)


def test_simplex_projection_far_away():
    np.testing.assert_allclose(simplex_projection(jnp.array([1e7, 1e7 + 1, -1e7])), [0.0, 1.0, 0.0])


def test_eigenpairs_of_graded_rows():
    """Orthogonal rows of lengths 1, 1e-2, 1e-4: eigenvalues 1, 1e-4, 1e-8, each to float32's own relative accuracy."""
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    cosines = np.eye(3) + 0.3 * (rotation @ np.diag([1, -1, 0]) @ rotation.T)
    lengths = np.array([1e-2, 1.0, 1e-4])
    gramian = lengths[:, None] * cosines / np.sqrt(np.outer(np.diag(cosines), np.diag(cosines))) * lengths
    pairs = gramian_eigenpairs(jnp.asarray(gramian, jnp.float32))
    assert np.all(pairs.kept)
    np.testing.assert_allclose(pairs.values, np.linalg.eigvalsh(gramian)[::-1], rtol=1e-5)
    rebuilt = pairs.vectors * pairs.values @ pairs.vectors.T
    np.testing.assert_allclose(rebuilt / np.outer(lengths, lengths), gramian / np.outer(lengths, lengths), atol=1e-5)


def test_eigenpairs_are_those_of_the_jacobian():
    """Singular values of J, and its rank, whichever rows depend on each other."""
    cases = [*jacobians(), np.array([[3.0, 4.0]])]
    with jax.enable_x64(True):
        pairs = solve(gramian_eigenpairs, cases, np.float64)
    for rows, values, kept in zip(cases, pairs.values, pairs.kept, strict=True):
        lengths = np.linalg.norm(rows, axis=1)
        rank = np.linalg.matrix_rank(rows / lengths[:, None], tol=1e-7)
        assert np.sum(kept) == rank and np.all(kept[:rank])
        expected = np.linalg.svd(rows / np.max(lengths), compute_uv=False)[:rank]
        np.testing.assert_allclose(np.sqrt(values[:rank]), expected, rtol=1e-6)


@pytest.mark.parametrize("num_tasks", [1, 2, 3])
def test_eigenpairs_rebuild_small_gramians(num_tasks):
    rows = np.random.default_rng(num_tasks).normal(size=(num_tasks, 4))
    pairs = gramian_eigenpairs(jnp.asarray(rows @ rows.T))
    expected = rows @ rows.T / np.max(np.sum(rows**2, axis=1))
    np.testing.assert_allclose(pairs.vectors * pairs.values @ pairs.vectors.T, expected, atol=1e-6)


def test_rank_of_cosines():
    rows = np.array([[1.0, 0, 0], [0, 1, 0], [np.sqrt(0.5), np.sqrt(0.5), 0]], np.float32)
    np.testing.assert_array_equal(cosine_eigenpairs(jnp.asarray(rows @ rows.T)).kept, [True, True, False])
