"""Small problems on a Gramian: static shapes, masked tasks, a bounded number of iterations, no exception inside jit.

All of them work on the cosines :math:`R = D^{-1} G D^{-1}`, :math:`D = \\mathrm{diag}(\\lVert g_i \\rVert)`, so that
neither the scale of the gradients nor the ratio of their lengths costs digits. A solver that misses its tolerance
returns its best iterate and says so.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mtl_jax.balancing.base import num_active, only_active


class Solved(NamedTuple):
    """What a solver found.

    Attributes:
      value: The solution, 0 for inactive tasks.
      residual: Violation of the optimality conditions, relative to the scale of the problem.
      iterations: Linear systems solved.
      missed: 1 if the residual is above the solver's tolerance, else 0.
    """

    value: Float[Array, "..."]
    residual: Float[Array, ""]
    iterations: Int[Array, ""]
    missed: Int[Array, ""]


class SolverState(NamedTuple):
    """The latest call of a solver, kept in the state of a balancer for its diagnostics."""

    residual: Float[Array, ""]
    iterations: Int[Array, ""]
    missed: Int[Array, ""]


def solver_state(solved: Solved | None = None) -> SolverState:
    """The state after a call, or before the first one."""
    if solved is None:
        return SolverState(jnp.zeros(()), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))
    return SolverState(solved.residual.astype(float), solved.iterations, solved.missed)


def solver_diagnostics(state: SolverState) -> dict[str, Float[Array, ""]]:
    """The same for the history of a run."""
    return {
        "solver_residual": state.residual,
        "solver_iterations": state.iterations,
        "solver_misses": state.missed,
    }


class Scaled(NamedTuple):
    """A Gramian taken apart, with 0 for inactive tasks.

    Attributes:
      cosines: R, 1 on the diagonal of active tasks.
      norms: Lengths of the gradients relative to the longest.
      inverse_norms: Their inverses.
      longest: The length that they are relative to.
    """

    cosines: Float[Array, "task task"]
    norms: Float[Array, " task"]
    inverse_norms: Float[Array, " task"]
    longest: Float[Array, ""]


def scaled(gramian: Float[Array, "task task"], active: Bool[Array, " task"] | None = None) -> Scaled:
    """Cosines and relative lengths; a gradient of length 0 is as inactive."""
    gramian = only_active(gramian, active)
    lengths = jnp.sqrt(jnp.maximum(jnp.diagonal(gramian), 0))
    longest = jnp.max(lengths)
    present = lengths > 0
    inverse = jnp.where(present, 1 / jnp.where(present, lengths, 1), 0)
    cosines = inverse[:, None] * gramian * inverse
    return Scaled(cosines, lengths / jnp.where(longest > 0, longest, 1), longest * inverse, longest)


@jax.jit
def simplex_projection(
    point: Float[Array, " task"],
    total: float | Float[Array, ""] = 1.0,
    active: Bool[Array, " task"] | None = None,
) -> Float[Array, " task"]:
    r"""The nearest point of :math:`\{x \ge 0, \sum_i x_i = s\}`, s >= 0, by sorting; inactive entries are 0."""
    active = jnp.ones(point.shape, bool) if active is None else active
    # Relative to the largest entry: the sums below keep their digits for far-away points.
    point = jnp.where(active, point, -jnp.inf)
    shifted = point - jnp.where(jnp.any(active), jnp.max(point), 0)
    descending = -jnp.sort(-shifted)
    counts = jnp.arange(1, point.shape[0] + 1)
    thresholds = (jnp.cumsum(descending) - total) / counts
    support = jnp.maximum(jnp.sum(descending > thresholds), 1)
    return jnp.where(active, jnp.maximum(shifted - thresholds[support - 1], 0), 0).astype(point.dtype)


@jax.jit
def nonnegative(
    cosines: Float[Array, "task task"],
    linear: Float[Array, " task"],
    active: Bool[Array, " task"],
    start: Bool[Array, " task"] | None = None,
) -> Solved:
    r""":math:`\arg\min_{y \ge 0} \tfrac12 y^\top R y - c^\top y`, by principal pivoting.

    Every iteration solves on the supposed support and exchanges all tasks that violate the conditions; where that has
    stopped to reduce their number, only the worst of them. At most 3 T + 10 iterations. A ridge of some units of
    rounding picks one solution among those of dependent rows, and a long one where the minimum is minus infinity.

    Args:
      cosines: R, positive semi-definite with a diagonal of 1.
      linear: c.
      active: Tasks that may be positive.
      start: Supposed support, from the solution of a similar problem; all tasks if None.
    """
    num_tasks, dtype = linear.shape[0], linear.dtype
    eps = jnp.finfo(dtype).eps
    ridge = (8 + num_tasks) * eps
    numbers = jnp.arange(num_tasks)
    linear = jnp.where(active, linear, 0)
    size = jnp.max(jnp.abs(linear))
    matrix = jnp.where(active[:, None] & active, cosines, 0) + ridge * jnp.eye(num_tasks, dtype=dtype)

    def violations(support, value, slope):
        """Negative entries on the support and descents off it, beyond rounding."""
        largest = jnp.max(jnp.abs(value))
        excess = jnp.where(support, -value - 4 * eps * largest, -slope - 4 * eps * (size + largest))
        return jnp.where(active, jnp.maximum(excess, 0), 0)

    def solve(support):
        system = jnp.where(support[:, None] & support, matrix, jnp.eye(num_tasks, dtype=dtype))
        factor = jax.lax.linalg.cholesky(system, symmetrize_input=False)
        value = jax.scipy.linalg.cho_solve((factor, True), jnp.where(support, linear, 0))
        return value, violations(support, value, _product(matrix, value) - linear)

    def step(carry):
        support, patience, fewest, best, least, iterations, _ = carry
        value, violation = solve(support)
        wrong = violation > 0
        number = jnp.sum(wrong)
        value = jnp.maximum(value, 0)
        residual = jnp.max(jnp.maximum(linear - _product(matrix, value), 0)) + jnp.abs(
            jnp.dot(value, _product(matrix, value) - linear, precision=jax.lax.Precision.HIGHEST)
        ) / jnp.maximum(jnp.max(value), jnp.finfo(dtype).tiny)
        best = jnp.where(residual < least, value, best)
        progress = number < fewest
        patience = jnp.where(progress, 2, patience - 1)
        worst = wrong & (numbers == jnp.argmax(violation))
        support = support ^ jnp.where(progress | (patience >= 0), wrong, worst)
        fewest = jnp.minimum(number, fewest)
        return support, patience, fewest, best, jnp.minimum(residual, least), iterations + 1, number == 0

    def unfinished(carry):
        return ~carry[-1] & (carry[-2] < 3 * num_tasks + 10)

    start = active if start is None else start & active
    zeros = jnp.zeros(num_tasks, dtype)
    infinite = jnp.array(jnp.inf, dtype)
    carry = (start, jnp.array(3), jnp.array(num_tasks + 1), zeros, infinite, jnp.array(0, jnp.int32), jnp.array(False))
    _, _, _, value, residual, iterations, done = jax.lax.while_loop(unfinished, step, carry)
    residual = residual / jnp.maximum(size, jnp.finfo(dtype).tiny)
    return Solved(value, residual, iterations, (~done).astype(jnp.int32))


@jax.jit
def min_norm(gramian: Float[Array, "task task"], active: Bool[Array, " task"] | None = None) -> Solved:
    r"""The shortest convex combination of the rows, :math:`\arg\min_{\alpha \in \Delta} \alpha^\top G \alpha`.

    With :math:`\alpha \propto D^{-1} y` it is the non-negative problem of R and :math:`c = D^{-1} 1`; where 0 is in the
    hull of the rows, y grows along the combination that gives 0. The residual is
    :math:`\max_j (\alpha^\top G \alpha - (G \alpha)_j) / \max_j G_{jj}`.
    """
    cosines, norms, inverse_norms, _ = scaled(gramian, active)
    active = norms > 0
    if gramian.shape[0] == 2:
        value, iterations = _shortest_of_two(cosines, norms, active), jnp.array(0, jnp.int32)
    else:
        shortest = jnp.max(inverse_norms)
        solved = nonnegative(cosines, inverse_norms / jnp.where(shortest > 0, shortest, 1), active)
        value, iterations = solved.value * inverse_norms, solved.iterations
        value = value / jnp.where(jnp.sum(value) > 0, jnp.sum(value), 1)
    products = norms * _product(cosines, norms * value)
    gap = jnp.dot(value, products, precision=jax.lax.Precision.HIGHEST) - products
    residual = jnp.max(jnp.where(active, gap, 0))
    return Solved(value, residual, iterations, _missed(residual, 1e-5, 1e-10))


def _shortest_of_two(cosines, norms, active):
    """Closed form: how far to go from the second gradient to the first."""
    first, second = norms
    dot = cosines[0, 1] * first * second
    squared = first**2 + second**2 - 2 * dot
    share = jnp.where(squared > 0, (second**2 - dot) / jnp.where(squared > 0, squared, 1), 0.5)
    share = jnp.clip(share, 0, 1)
    share = jnp.where(active[0] & active[1], share, active[0])
    return jnp.where(active, jnp.stack([share, 1 - share]), 0)


@jax.jit
def dual_cone(
    gramian: Float[Array, "task task"],
    lower: Float[Array, "column task"],
    reg_eps: float | Float[Array, ""] = 0.0,
    active: Bool[Array, " task"] | None = None,
) -> Solved:
    r"""For each row u of ``lower``: :math:`\arg\min_{v \ge u} v^\top (G / \mathrm{tr}\, G + \epsilon I) v`.

    :math:`D (v - u) \ge 0` solves the non-negative problem of R and :math:`c = -R D u`. With dependent rows v is not
    unique; :math:`J^\top v` is. Residual and misses are the largest over the columns, iterations their sum.
    """
    gramian = only_active(gramian, active)
    gramian = gramian + jnp.diag(jnp.where(jnp.diagonal(gramian) > 0, reg_eps * jnp.trace(gramian), 0))
    cosines, norms, inverse_norms, _ = scaled(gramian, active)
    active = norms > 0

    def solve(bound):
        linear = -_product(cosines, norms * bound)
        solved = nonnegative(cosines, linear, active)
        size = jnp.max(jnp.abs(linear)) / jnp.maximum(jnp.max(norms * bound), jnp.finfo(linear.dtype).tiny)
        residual = solved.residual * size
        value = bound + inverse_norms * solved.value
        return Solved(value, residual, solved.iterations, _missed(residual, 1e-4, 1e-10))

    solved = jax.vmap(solve)(jnp.where(active, lower.astype(gramian.dtype), 0))
    return Solved(
        solved.value, jnp.max(solved.residual), jnp.sum(solved.iterations, dtype=jnp.int32), jnp.max(solved.missed)
    )


@jax.jit
def power_fixed_point(
    gramian: Float[Array, "task task"],
    alpha: float | Float[Array, ""] = 1.0,
    reg_eps: float | Float[Array, ""] | None = None,
    active: Bool[Array, " task"] | None = None,
) -> Solved:
    r"""The only w > 0 with :math:`G w = w^{-1/\alpha}`, for :math:`\alpha > 0`.

    :math:`x = D w` minimises the convex :math:`\tfrac12 x^\top (R + \epsilon I) x - \sum_i c_i \varphi(x_i)` with
    :math:`\varphi' = x^{-1/\alpha}`, :math:`c_i = (n_i / \bar n)^{1/\alpha - 1}` and :math:`\bar n` the geometric
    mean of the lengths: Newton in relative steps :math:`\Delta x_i / x_i`, 0.95 of the way to the boundary at most,
    halved until the objective falls. The residual is :math:`\max_i |(Rx)_i x_i^{1/\alpha} / c_i - 1|`. ``reg_eps``
    None is 1e-6 in float32 and 0 in float64.
    """
    cosines, norms, inverse_norms, longest = scaled(gramian, active)
    active, dtype, num_tasks = norms > 0, gramian.dtype, gramian.shape[0]
    alpha = jnp.asarray(alpha, dtype)
    double = dtype == jnp.float64
    reg_eps = (0.0 if double else 1e-6) if reg_eps is None else reg_eps
    matrix = cosines + jnp.asarray(reg_eps, dtype) * jnp.diag(active.astype(dtype))
    log_norms = jnp.where(active, jnp.log(jnp.where(active, norms, 1)), 0)
    log_mean = jnp.sum(log_norms) / num_active(active, num_tasks)
    log_scale = jnp.where(active, (1 - alpha) * (log_norms - log_mean), 0)
    exponent = 1 - 1 / alpha
    halvings = 0.5 ** jnp.arange(16, dtype=dtype)
    enough = 1e-13 if double else 1e-6

    def pull(point):
        """c x phi'(x), in logarithms, as c alone leaves the range of float32."""
        return jnp.where(active, jnp.exp((log_scale - jnp.log(point)) / alpha + jnp.log(point)), 1)

    def residual_of(point):
        return jnp.max(jnp.where(active, jnp.abs(point * _product(matrix, point) / pull(point) - 1), 0))

    def step(carry):
        point, residual, _, iterations, _ = carry
        weight = pull(point)
        own = jnp.where(active, point, 0)
        curvature = own[:, None] * matrix * own
        downhill = jnp.where(active, weight - jnp.sum(curvature, axis=1), 0)
        factor = jax.lax.linalg.cholesky(curvature + jnp.diag(weight / alpha), symmetrize_input=False)
        newton = jax.scipy.linalg.cho_solve((factor, True), downhill)
        lengths = jnp.minimum(1, 0.95 / jnp.maximum(jnp.max(-newton), 1e-30)) * halvings
        slope = -jnp.dot(downhill, newton)
        logs = jnp.log1p(lengths[:, None] * newton)
        scaled_logs = exponent * logs
        tiny = jnp.abs(scaled_logs) < 1e-4
        gains = jnp.where(tiny, logs * (1 + scaled_logs / 2), jnp.expm1(scaled_logs) / jnp.where(tiny, 1, exponent))
        quadratic = jnp.dot(newton, _product(curvature, newton))
        linear = jnp.dot(newton, jnp.sum(curvature, axis=1))
        change = lengths * linear + lengths**2 * quadratic / 2 - jnp.sum(weight * gains, axis=1)
        # Armijo, up to the rounding of the terms of the change.
        slack = 4 * jnp.finfo(dtype).eps * lengths * jnp.sum(jnp.abs(weight * newton))
        accepted = change <= 1e-4 * lengths * slope + slack
        length = lengths[jnp.argmax(accepted)]
        moved = point * (1 + length * newton)
        reached = residual_of(moved)
        # Without a solution (0 in the hull and no regulariser) the point grows until rounding takes over.
        failed = ~jnp.all(jnp.isfinite(moved) & (moved > 0)) | ~jnp.isfinite(reached)
        point, reached = jnp.where(failed, point, moved), jnp.where(failed, residual, reached)
        return point, reached, residual, iterations + 1, failed

    def unfinished(carry):
        _, residual, previous, iterations, failed = carry
        # Below 1e-3 a step that gains nothing is at the limit of rounding.
        stuck = (residual <= 1e-3) & (residual >= 0.5 * previous)
        return (residual > enough) & ~stuck & (iterations < 50) & ~failed

    start = jnp.exp(log_scale / (1 + alpha))
    carry = (start, residual_of(start), jnp.array(jnp.inf, dtype), jnp.array(0, jnp.int32), jnp.array(False))
    point, residual, _, iterations, _ = jax.lax.while_loop(unfinished, step, carry)
    unit = jnp.exp((log_mean + jnp.log(jnp.where(longest > 0, longest, 1))) * (1 - alpha) / (1 + alpha))
    value = unit * jnp.where(active, point, 0) * inverse_norms / jnp.where(longest > 0, longest, 1)
    return Solved(value, residual, iterations, _missed(residual, 1e-3, 1e-10))


@jax.jit
def cagrad_weights(
    gramian: Float[Array, "task task"], c: float | Float[Array, ""], active: Bool[Array, " task"] | None = None
) -> Solved:
    r""":math:`\arg\min_{w \in \Delta} w^\top G 1 / K + s \lVert J^\top w \rVert` with
    :math:`s = c \lVert g_0 \rVert`.

    The minimum is the largest :math:`\mu` for which some d with :math:`\lVert d - g_0 \rVert \le s` has
    :math:`g_i^\top d \ge \mu` for all i. The nearest such d is a non-negative problem whose solution is in proportion
    to w, and its distance is convex in :math:`\mu`: Newton on it starts at w = 1/K and falls to the minimum, each time
    with the objective at the latest w as next :math:`\mu`. The residual is the gap between the two problems relative
    to :math:`(1 + c) \max_j G_{jj}`.
    """
    cosines, norms, inverse_norms, _ = scaled(gramian, active)
    active, dtype = norms > 0, gramian.dtype
    mean = norms / num_active(active, gramian.shape[0])
    products = _product(cosines, mean)
    radius = c * combined_length(cosines, mean)[0]

    def objective(point):
        return jnp.dot(point, norms * products) + radius * combined_length(cosines, norms * point)[0]

    def step(carry):
        level, point, _, iterations, rounds = carry
        linear = level * inverse_norms - products
        size = jnp.max(jnp.where(active, jnp.abs(linear), 0))
        solved = nonnegative(cosines, linear / jnp.where(size > 0, size, 1), active, point > 0)
        ray = inverse_norms * solved.value
        total = jnp.sum(ray)
        ray = jnp.where(total > 0, ray / jnp.where(total > 0, total, 1), point)
        reached = objective(ray)
        better = reached < level
        # The objective is flat at its minimum: the level is known to rounding long before the point is.
        point = jnp.where(reached <= level + slack, ray, point)
        return jnp.where(better, reached, level), point, ~better, iterations + solved.iterations, rounds + 1

    start = active / num_active(active, gramian.shape[0]).astype(dtype)
    slack = 8 * jnp.finfo(dtype).eps * (radius + jnp.max(jnp.abs(norms * products)))
    carry = (objective(start), start, jnp.array(False), jnp.array(0, jnp.int32), jnp.array(0))
    level, point, _, iterations, _ = jax.lax.while_loop(lambda carry: ~carry[2] & (carry[-1] < 20), step, carry)
    length, vanishes = combined_length(cosines, norms * point)
    direction = products + radius / jnp.where(vanishes, 1, length) * _product(cosines, norms * point)
    reached = norms * jnp.where(vanishes, 0, direction)
    residual = jnp.maximum(level - jnp.min(jnp.where(active, reached, jnp.inf)), 0) / (1 + c)
    return Solved(point, residual, iterations, _missed(residual, 1e-5, 1e-10))


def combined_length(
    cosines: Float[Array, "task task"], lengths: Float[Array, " task"]
) -> tuple[Float[Array, ""], Bool[Array, ""]]:
    """Length of a sum of vectors, given theirs and their cosines, and whether they cancel up to rounding."""
    squared = jnp.maximum(jnp.dot(lengths, _product(cosines, lengths)), 0)
    rounding = jnp.maximum(1e-12, 4 * lengths.shape[0] * jnp.finfo(lengths.dtype).eps)
    return jnp.sqrt(squared), squared <= rounding * jnp.sum(jnp.abs(lengths)) ** 2


class Eigenpairs(NamedTuple):
    """Eigenvalues, descending, and eigenvectors as columns; ``kept`` marks those that are not rounding."""

    values: Float[Array, " pair"]
    vectors: Float[Array, "task pair"]
    kept: Bool[Array, " pair"]


@jax.jit
def cosine_eigenpairs(cosines: Float[Array, "task task"]) -> Eigenpairs:
    """Eigenpairs of R; kept are those above the largest times 4 T eps."""
    values, vectors = jnp.linalg.eigh(cosines)
    threshold = 4 * cosines.shape[0] * jnp.finfo(cosines.dtype).eps * values[-1]
    return Eigenpairs(values[::-1], vectors[:, ::-1], (values > threshold)[::-1])


@jax.jit
def gramian_eigenpairs(gramian: Float[Array, "task task"], active: Bool[Array, " task"] | None = None) -> Eigenpairs:
    r"""Eigenpairs of :math:`G / \max_j G_{jj}`, small ones to the same relative accuracy as large ones.

    A task whose gradient is 1000 times shorter has an eigenvalue of 1e-6, in float32 close to the rounding error of an
    ordinary decomposition. Therefore the rank is that of the cosines, :math:`R = U U^\top`, and one-sided Jacobi
    rotations orthogonalise the columns of :math:`U^\top D`, which keeps their scales apart.
    """
    cosines, norms, _, _ = scaled(gramian, active)
    num_tasks, dtype = gramian.shape[0], gramian.dtype
    values, vectors, kept = cosine_eigenpairs(cosines)
    factor = jnp.where(kept, jnp.sqrt(jnp.maximum(values, 0)), 0)[:, None] * vectors.T * norms
    padding = num_tasks % 2
    size = num_tasks + padding
    columns = jnp.pad(jnp.concatenate([factor, jnp.eye(num_tasks, dtype=dtype)]), ((0, 0), (0, padding)))
    pairs = _round_robin(size)
    eps = jnp.finfo(dtype).eps

    def turn(number, carry):
        columns, worst = carry
        first, second = pairs[number]
        left, right = columns[:, first], columns[:, second]
        upper_left, upper_right = left[:num_tasks], right[:num_tasks]
        a, b = jnp.sum(upper_left**2, axis=0), jnp.sum(upper_right**2, axis=0)
        dot = jnp.sum(upper_left * upper_right, axis=0)
        size = jnp.sqrt(a) * jnp.sqrt(b)
        rotate = jnp.abs(dot) > 0
        ratio = (b - a) / jnp.where(rotate, 2 * dot, 1)
        tangent = jnp.where(ratio >= 0, 1, -1) / (jnp.abs(ratio) + jnp.hypot(1, ratio))
        tangent = jnp.where(rotate, tangent, 0)
        cosine = 1 / jnp.hypot(1, tangent)
        sine = cosine * tangent
        columns = columns.at[:, first].set(cosine * left - sine * right)
        columns = columns.at[:, second].set(sine * left + cosine * right)
        return columns, jnp.maximum(worst, jnp.max(jnp.abs(dot) / jnp.where(size > 0, size, 1)))

    def sweep(carry):
        columns, _, sweeps = carry
        columns, worst = jax.lax.fori_loop(0, len(pairs), turn, (columns, jnp.zeros((), dtype)))
        return columns, worst, sweeps + 1

    def unfinished(carry):
        return (carry[1] > 4 * num_tasks * eps) & (carry[2] < 10)

    if num_tasks > 1:
        columns, _, _ = jax.lax.while_loop(unfinished, sweep, (columns, jnp.ones((), dtype), jnp.array(0)))
    values = jnp.sum(columns[:num_tasks] ** 2, axis=0)
    order = jnp.argsort(-values)[:num_tasks]
    # Turned columns of zeros cannot be among the kept: the rank is known.
    return Eigenpairs(values[order], columns[num_tasks:, order], jnp.sort(kept)[::-1])


def _round_robin(size):
    """Rounds of disjoint pairs in which everybody meets everybody once: int[size - 1, 2, size / 2]."""
    circle = list(range(size))
    rounds = []
    for _ in range(size - 1):
        rounds.append([circle[: size // 2], circle[size // 2 :][::-1]])
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return jnp.array(rounds, jnp.int32).reshape(max(size - 1, 0), 2, size // 2)


def _product(matrix, vector):
    return jnp.matmul(matrix, vector, precision=jax.lax.Precision.HIGHEST)


def _missed(residual, single, double):
    tolerance = double if residual.dtype == jnp.float64 else single
    return (~(residual <= tolerance)).astype(jnp.int32)
