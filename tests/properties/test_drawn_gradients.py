"""What every balancer keeps to where gradients are odd: drawn by hypothesis, for one up to eight tasks.

Rows are zero, alike, parallel or opposite, of any rank and of lengths from 1e-3 to 1e3, and the whole problem is also
scaled by up to 1e8 either way. Every example is evaluated in four ways in one call, for which a method compiles once.
"""

import dataclasses
import functools
from typing import NamedTuple

import formulas
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st
from methods import METHODS, NUM_PARAMS, NUM_STEPS, NUM_TASKS, train

COUNTS = {"few": 40, "many": 500}


@dataclasses.dataclass(frozen=True)
class Problem:
    """Gradients and losses of a training.

    Attributes:
      jacobians: f64[step, task, column], 0 where there is no task.
      losses: f64[step, task].
      active: Which rows are tasks.
      exponent: The whole problem is also scaled by 2 to this power, which rounds nothing.
      order: Of the tasks, another one.
      seed: Of the method's own draws.
    """

    jacobians: np.ndarray
    losses: np.ndarray
    active: np.ndarray
    exponent: int
    order: np.ndarray
    seed: int

    @property
    def null(self) -> np.ndarray:
        """Tasks without a gradient."""
        return self.active & ~np.any(self.jacobians, axis=(0, 2))


KINDS = ("own", "own", "own", "zero", "alike", "parallel", "opposite")


@st.composite
def problems(draw):
    num_tasks = draw(st.integers(1, NUM_TASKS))
    num_params = draw(st.integers(1, NUM_PARAMS))
    rank = draw(st.integers(1, min(num_tasks, num_params)))
    kinds = draw(st.lists(st.sampled_from(KINDS), min_size=num_tasks, max_size=num_tasks))
    sources = draw(st.lists(st.integers(0, NUM_TASKS - 1), min_size=num_tasks, max_size=num_tasks))
    exponents = draw(st.lists(st.floats(-3, 3), min_size=num_tasks, max_size=num_tasks))
    seed = draw(st.integers(0, 2**16))
    generator = np.random.default_rng(seed)
    rows = generator.normal(size=(num_tasks, rank)) @ generator.normal(size=(rank, num_params))
    rows *= 10.0 ** np.array(exponents)[:, None]
    for index, (kind, source) in enumerate(zip(kinds, sources, strict=True)):
        other = rows[source % index] if index else rows[0]
        match kind:
            case "zero":
                rows[index] = 0
            case "alike":
                rows[index] = other
            case "parallel":
                rows[index] = generator.uniform(0.1, 10) * other
            case "opposite":
                rows[index] = -generator.uniform(0.1, 10) * other
    jacobians, active = np.zeros((NUM_STEPS, NUM_TASKS, NUM_PARAMS)), np.zeros(NUM_TASKS, bool)
    places = np.sort(generator.permutation(NUM_TASKS)[:num_tasks])
    for jacobian in jacobians:  # other columns in each step, under which rows stay alike or opposite
        factors = generator.choice([-1, 1], num_params) * generator.uniform(0.5, 2.0, num_params)
        jacobian[places, :num_params] = factors * rows
    active[places] = True
    return Problem(
        jacobians=jacobians,
        losses=10 ** generator.uniform(-2, 1, size=(NUM_STEPS, NUM_TASKS)),
        active=active,
        exponent=draw(st.integers(-27, 27)),
        order=generator.permutation(NUM_TASKS),
        seed=seed,
    )


@functools.cache
def compiled(kind):
    """One program for each type of balancer."""
    return jax.jit(jax.vmap(lambda *arguments: train(*arguments)[:2]))


def evaluate(method, problem):
    """(weights, direction) four times over: as it is, scaled, in another order, and without tasks that have no gradient."""
    balancer, order = method.run_axis[0], problem.order
    jacobians, losses, active = problem.jacobians, problem.losses, problem.active

    def leaf(value):
        value = np.asarray(value, np.float32)
        return np.stack([value, value, value[order] if value.shape == (NUM_TASKS,) else value, value])

    variants = (
        (jacobians, losses, active),
        (2.0**problem.exponent * jacobians, losses, active),
        (jacobians[:, order], losses[:, order], active[order]),
        (jacobians, losses, active & ~problem.null),
    )
    jacobians, losses, active = (np.stack(column) for column in zip(*variants, strict=True))
    keys = jnp.stack([jax.random.key(problem.seed)] * len(variants))
    results = compiled(type(balancer))(
        jax.tree.map(leaf, balancer), jacobians.astype(np.float32), losses.astype(np.float32), active, keys
    )
    return [np.asarray(result, float) for result in results]


def reference(method, problem):
    """The direction of the NumPy loop, and the largest entry of its terms; methods of gradients do not see null rows."""
    step, key = method.reference(), jax.random.key(problem.seed)
    draw = np.asarray(_drawn(method.draw)(key)) if method.draw else None
    absent = problem.null if method.run_axis[0].needs != "losses" else np.zeros(NUM_TASKS, bool)
    tasks = np.flatnonzero(problem.active & ~absent)
    if not len(tasks):
        return np.zeros(NUM_PARAMS), 0.0
    for number in range(NUM_STEPS):
        rows = problem.jacobians[number, tasks]
        if method.run_axis[0].num_batches > 1:
            rows = np.roll(problem.jacobians, -number, axis=0)[:, tasks]
        terms = step(rows, problem.losses[number, tasks], tasks, draw)
        if hasattr(step, "observe"):
            step.observe(problem.losses[(number + 1) % NUM_STEPS, problem.active])
    return terms.sum(axis=0), np.abs(terms).max()


@functools.cache
def _drawn(draw):
    return jax.jit(draw)


class Margins(NamedTuple):
    """How far a problem is from those where rounding decides: the least of its steps.

    Attributes:
      stationarity: From gradients whose mixture vanishes.
      smallest: Singular value of the unit gradients, of those that are not 0.
      relative: The same of the gradients, relative to the largest.
      apart: The same of their differences.
      independent: Whether the gradients are.
      tasks: How many have one.
    """

    stationarity: float = 1.0
    smallest: float = 1.0
    relative: float = 1.0
    apart: float = 1.0
    independent: bool = True
    tasks: int = 0

    @classmethod
    def of(cls, problem):
        tasks = problem.active & ~problem.null
        if not np.any(tasks):
            return cls()
        steps = [rows[tasks] for rows in problem.jacobians]
        smallest, independent = zip(*map(formulas.independence, steps), strict=True)

        def relative(rows, of):
            values, largest = np.linalg.svd(rows, compute_uv=False), np.linalg.norm(of, 2)
            return np.min(values[values > 1e-9 * largest], initial=largest) / largest

        return cls(
            stationarity=min(map(formulas.stationarity, steps)),
            smallest=min(smallest),
            relative=min(relative(rows, rows) for rows in steps),
            apart=min(relative(rows - rows[0], rows) for rows in steps),
            independent=all(independent),
            tasks=np.sum(tasks),
        )


def settled(method, margins):
    """Whether rounding does not decide the direction."""
    return {
        "": True,
        "near stationary": margins.stationarity > 3e-2,
        "nearly dependent": min(margins.smallest, margins.relative) > 3e-2,
        "dependent": margins.independent and margins.smallest > 3e-2,
        "tied": margins.independent,
        "ill-conditioned": min(margins.relative, margins.apart) > 3e-2,
    }[method.unsettled]


def agrees(method, margins):
    """Whether the method promises a direction that conflicts with no task."""
    return {
        "": False,
        "all": True,
        "two": margins.tasks == 2 and margins.independent and margins.stationarity > 1e-2,
        "independent": margins.independent and margins.smallest > 3e-2,
        "away": margins.stationarity > 3e-2,
    }[method.agrees]


def check(name, problem):
    method, (weights, directions) = METHODS[name], evaluate(METHODS[name], problem)
    balancer = method.run_axis[0]
    assert np.all(np.isfinite(weights)) and np.all(np.isfinite(directions))
    assert not np.any(weights[0, ~problem.active])
    if balancer.needs != "losses":
        assert not np.any(weights[0, problem.null])
        np.testing.assert_array_equal(directions[3], directions[0])

    expected, largest = reference(method, problem)
    largest = max(largest, 1e-30 * np.max(np.abs(problem.jacobians)))  # below that, a weight is 0
    if balancer.homogeneity is not None:
        scale = 2.0 ** (-problem.exponent * balancer.homogeneity)
        np.testing.assert_allclose(scale * directions[1], directions[0], rtol=0, atol=1e-4 * largest)
    margins = Margins.of(problem)
    if not settled(method, margins):
        event("rounding decides")
        return
    event("compared with the loop")
    np.testing.assert_allclose(directions[0], expected, rtol=0, atol=max(1e-3, method.tolerance) * largest)
    if not (method.ordered or balancer.stochastic):
        np.testing.assert_allclose(directions[2], directions[0], rtol=0, atol=1e-3 * largest)
    if agrees(method, margins):
        rows = problem.jacobians[-1]
        gains = rows @ directions[0] / np.maximum(np.linalg.norm(rows, axis=1), 1e-30)
        assert np.min(gains) >= -1e-3 * largest


@pytest.mark.parametrize("count", ["few", pytest.param("many", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", METHODS)
def test_odd_gradients(name, count):
    """Finite, deaf to absent and null rows, homogeneous, the loop's direction, in any order, and without conflict."""
    drawn = given(problems())(lambda problem: check(name, problem))
    settings(
        max_examples=COUNTS[count],
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )(drawn)()
