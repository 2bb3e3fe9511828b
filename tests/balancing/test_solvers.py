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

NUM_CASES, NUM_PARAMS = 60, 12


@functools.cache
def jacobians(num_tasks):
    """Every fourth has a duplicate, an opposite, or an agreeing set of rows; ranks from 1, lengths over three decades."""
    rng = np.random.default_rng(num_tasks)
    cases = []
    for number in range(NUM_CASES):
        rank = rng.integers(1, num_tasks + 1)
        rows = rng.normal(size=(num_tasks, rank)) @ rng.normal(size=(rank, NUM_PARAMS))
        if number % 4 == 1:
            rows[1] = rows[0]
        if number % 4 == 2:
            rows[1] = -rows[0]
        if number % 4 == 3:
            rows[:, 0] = np.abs(rows[:, 0]) + 1
        cases.append(rows * 10 ** rng.uniform(-1.5, 1.5, size=(num_tasks, 1)))
    return np.stack(cases)


def solve(solver, rows, dtype):
    rows = jnp.asarray(rows, dtype)
    return jax.tree.map(
        np.asarray, jax.jit(jax.vmap(solver))(jnp.einsum("ckp,clp->ckl", rows, rows, precision="highest"))
    )


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


@pytest.mark.parametrize("num_tasks", [2, 3, 8])
def test_min_norm_is_the_shortest_combination(num_tasks, dtype):
    solved = solve(min_norm, jacobians(num_tasks), dtype)
    assert solved.value.dtype == dtype and not np.any(solved.missed)
    np.testing.assert_allclose(np.sum(solved.value, axis=1), 1, rtol=1e-5)
    for rows, weights in zip(jacobians(num_tasks), solved.value, strict=True):
        if not stationary(rows):
            assert error(weights, shortest(rows) @ rows, rows) <= (1e-3 if dtype == np.float32 else 1e-9)


def test_min_norm_meets_its_optimality_conditions_up_to_32_tasks():
    """Every row gains at least the squared length, rows with weight exactly that."""
    for num_tasks in (16, 32):
        rows = np.random.default_rng(num_tasks).normal(0.2, 1.0, size=(20, num_tasks, 24))
        with jax.enable_x64(True):
            solved = solve(min_norm, rows, np.float64)
        for matrix, weights in zip(rows, solved.value, strict=True):
            gains = matrix @ (weights @ matrix)
            squared = np.sum((weights @ matrix) ** 2)
            scale = np.max(np.sum(matrix**2, axis=1))
            assert np.min(gains) >= squared - 1e-10 * scale
            np.testing.assert_allclose(gains[weights > 0], squared, atol=1e-10 * scale)


@pytest.mark.parametrize("num_tasks", [2, 3, 8])
def test_dual_cone_is_the_non_negative_least_squares_solution(num_tasks, dtype):
    bounds = np.eye(num_tasks) / num_tasks
    solved = solve(lambda gramian: dual_cone(gramian, jnp.asarray(bounds, dtype)), jacobians(num_tasks), dtype)
    assert not np.any(solved.missed)
    for rows, columns in zip(jacobians(num_tasks), solved.value, strict=True):
        assert np.all(columns >= bounds.astype(dtype))
        for weights, bound in zip(columns, bounds, strict=True):
            assert error(weights, projected(rows, bound), rows) <= (2e-3 if dtype == np.float32 else 1e-9)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 4.0])
def test_power_fixed_point_solves_its_equation(alpha):
    """G w = w^(-1/alpha), w > 0, wherever there is a solution."""
    for num_tasks in (2, 3, 8):
        with jax.enable_x64(True):
            solved = solve(lambda gramian: power_fixed_point(gramian, alpha), jacobians(num_tasks), np.float64)
        regular = np.array([not stationary(rows) for rows in jacobians(num_tasks)])
        assert np.sum(regular) > 10
        assert np.median(solved.iterations[regular]) <= 15
        for rows, weights in zip(jacobians(num_tasks)[regular], solved.value[regular], strict=True):
            np.testing.assert_allclose(rows @ (weights @ rows), weights ** (-1 / alpha), rtol=1e-8)
        assert np.all(np.isfinite(solved.value))


def test_power_fixed_point_in_float32():
    """To 1e-3 of the solution in float64; 0 in the hull is bounded by the regulariser: x <= 1 / sqrt(1e-6)."""
    rows = jacobians(8)
    solved = solve(power_fixed_point, rows, np.float32)
    with jax.enable_x64(True):
        expected = solve(power_fixed_point, rows, np.float64)
    regular = np.array([not stationary(matrix) for matrix in rows])
    assert not np.any(solved.missed[regular])
    for matrix, weights, exact in zip(rows[regular], solved.value[regular], expected.value[regular], strict=True):
        assert error(weights, exact @ matrix, matrix) <= 1e-3
    opposite = power_fixed_point(jnp.array([[1.0, -1.0], [-1.0, 1.0]]))
    np.testing.assert_allclose(opposite.value, [1e3, 1e3], rtol=0.05)


@pytest.mark.parametrize("c", [0.2, 1.0])
def test_cagrad_weights_reach_the_minimum_that_scipy_finds(c):
    for num_tasks in (2, 3, 5):
        rows = np.random.default_rng(num_tasks).normal(0.3, 1.0, size=(20, num_tasks, 6))
        with jax.enable_x64(True):
            solved = solve(lambda gramian: cagrad_weights(gramian, c), rows, np.float64)
        assert not np.any(solved.missed)
        np.testing.assert_allclose(np.sum(solved.value, axis=1), 1, rtol=1e-10)
        for matrix, weights in zip(rows, solved.value, strict=True):
            mean = np.mean(matrix, axis=0)

            def objective(point, matrix=matrix, mean=mean):
                return point @ matrix @ mean + c * np.linalg.norm(mean) * np.linalg.norm(point @ matrix)

            simplex = {"type": "eq", "fun": lambda point: np.sum(point) - 1}
            start = np.full(num_tasks, 1 / num_tasks)
            found = minimize(objective, start, bounds=[(0, 1)] * num_tasks, constraints=simplex, tol=1e-10)
            assert objective(weights) <= found.fun + 1e-8


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


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 8])
def test_eigenpairs_are_those_of_the_jacobian(num_tasks):
    """Singular values of J, and its rank, whichever rows depend on each other."""
    rows = jacobians(num_tasks) if num_tasks > 1 else np.array([[[3.0, 4.0]]])
    with jax.enable_x64(True):
        pairs = solve(gramian_eigenpairs, rows, np.float64)
    for matrix, values, kept in zip(rows, pairs.values, pairs.kept, strict=True):
        lengths = np.linalg.norm(matrix, axis=1)
        rank = np.linalg.matrix_rank(matrix / lengths[:, None], tol=1e-7)
        assert np.sum(kept) == rank and np.all(kept[:rank])
        expected = np.linalg.svd(matrix / np.max(lengths), compute_uv=False)[:rank]
        np.testing.assert_allclose(np.sqrt(values[:rank]), expected, rtol=1e-6)


def test_rank_of_cosines():
    rows = np.array([[1.0, 0, 0], [0, 1, 0], [np.sqrt(0.5), np.sqrt(0.5), 0]], np.float32)
    np.testing.assert_array_equal(cosine_eigenpairs(jnp.asarray(rows @ rows.T)).kept, [True, True, False])
