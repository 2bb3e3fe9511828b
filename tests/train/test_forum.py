"""FORUM: its program against a general solver, and its step against gradients that are taken one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from mtl_jax.balancing.solvers import min_norm
from mtl_jax.errors import ConfigError
from mtl_jax.tasks import Task
from mtl_jax.train import BalancingOptions, forum
from mtl_jax.train.forum import constrained_mixture

FIRST_MOMENT = 0.1  # what Adam takes of the first gradient


def by_a_general_solver(rows, fall, phi):
    """The text of the program, over the mixture and the pressure together; the best of some starts."""
    squared, count = fall @ fall, len(rows)
    pressures = phi - rows @ fall / squared

    def value(point):
        direction = point[:-1] @ rows + point[-1] * fall
        return direction @ direction - point[-1] * phi * squared

    constraints = [
        {"type": "eq", "fun": lambda point: point[:-1].sum() - 1},
        {"type": "ineq", "fun": lambda point: point[-1] - point[:-1] @ pressures},
    ]
    starts = [np.append(mixture, max(mixture @ pressures, 0) + 0.1) for mixture in np.eye(count)]
    bounds = [(0, 1)] * count + [(0, None)]
    options = {"ftol": 1e-14, "maxiter": 500}
    found = [
        scipy.optimize.minimize(value, start, bounds=bounds, constraints=constraints, options=options)
        for start in starts
    ]
    best = min(found, key=lambda result: result.fun if result.success else np.inf)
    return best.x[:-1], best.fun, value


@pytest.mark.parametrize("phi", [0.1, 1.0])
@pytest.mark.parametrize("length", [0.3, 1.0, 4.0])
def test_the_mixture_is_the_best(phi, length):
    """With gradients for and against the fall of q, so that the constraint acts, does not, and just does."""
    rng = np.random.default_rng(0)
    acting = []
    with jax.enable_x64(True):
        solve = jax.jit(constrained_mixture)
        for _ in range(12):
            rows = rng.normal(0.3, 1.0, size=(3, 5))
            rows /= np.linalg.norm(rows, axis=1, keepdims=True)
            fall = length * rng.normal(size=5)
            _, least, value = by_a_general_solver(rows, fall, phi)
            mixture = np.asarray(solve(rows @ rows.T, rows @ fall, fall @ fall, phi, np.ones(3, bool)))
            pressure = phi - mixture @ rows @ fall / (fall @ fall)
            np.testing.assert_allclose(mixture.sum(), 1, rtol=1e-9)
            assert np.all(mixture >= 0) and value(np.append(mixture, max(pressure, 0))) <= least + 1e-6
            acting.append(pressure > 1e-9)
    assert any(acting)


def test_without_a_fall_it_is_the_shortest_mixture():
    rng = np.random.default_rng(1)
    solve = jax.jit(constrained_mixture)
    for count in (2, 4):
        rows = rng.normal(0.5, 1.0, size=(count, 6))
        products = jnp.asarray(rows @ rows.T)
        products /= jnp.sqrt(jnp.outer(jnp.diagonal(products), jnp.diagonal(products)))
        mixture = solve(products, jnp.zeros(count), jnp.zeros(()), 0.1, jnp.ones(count, bool))
        np.testing.assert_allclose(mixture, min_norm(products).value, atol=2e-4)


def test_absent_objectives_have_no_part():
    products, present = jnp.eye(3), jnp.array([True, False, True])
    solve = jax.jit(constrained_mixture)
    mixture = solve(products, jnp.zeros(3), jnp.zeros(()), 0.1, present)
    np.testing.assert_allclose(mixture, [0.5, 0, 0.5], atol=1e-6)
    assert not np.any(solve(products, jnp.zeros(3), jnp.zeros(()), 0.1, jnp.zeros(3, bool)))


def test_the_step(plane, halves):
    """Every quantity of the text from its definition."""
    problem, rate, phi = plane(), 0.05, 0.1
    parts = halves(problem)
    train, held_out = (jax.tree.map(lambda leaf, n=n: leaf[n], parts) for n in range(2))
    start = problem.params
    w = jnp.full(3, 1 / 3)

    def f(params):
        return w @ problem.losses(params, train)

    ahead = start
    for _ in range(5):
        ahead = jax.tree.map(lambda value, g: value - rate * g, ahead, jax.grad(f)(ahead))

    def q(logits, params):
        return jax.nn.softmax(logits) @ (problem.losses(params, train) - problem.losses(ahead, train))

    of_logits, of_params = jax.grad(q, argnums=(0, 1))(jnp.zeros(3), start)
    rows = jax.jacrev(lambda params: problem.losses(params, held_out))(start)
    flat = np.concatenate([np.asarray(rows[path]).reshape(3, -1) for path in start], axis=1)
    flat = np.concatenate([flat / np.linalg.norm(flat, axis=1, keepdims=True), np.zeros((3, 3))], axis=1)
    fall = np.concatenate([*(np.ravel(of_params[path]) for path in start), of_logits])
    mixture, _, _ = by_a_general_solver(flat, fall, phi)
    pressure = max(mixture @ (phi - flat @ fall / (fall @ fall)), 0)
    direction = mixture @ flat + pressure * fall

    found = problem.balanced(forum(inner_lr=rate, phi=phi), parts=parts)
    np.testing.assert_allclose(found.state.mixture, mixture, atol=1e-5)
    actual = np.concatenate([np.ravel(found.gradients[path]) for path in start])
    np.testing.assert_allclose(actual, direction[:-3], atol=1e-5)
    np.testing.assert_allclose(found.state.logits.adam.mu / FIRST_MOMENT, direction[-3:], atol=1e-5)
    np.testing.assert_allclose(found.weights, w)


def test_the_average_follows_more_slowly_with_every_epoch(plane, halves):
    problem, balancer = plane(), forum()
    parts, state = halves(problem), balancer.init(3)
    first = problem.balanced(balancer, parts=parts, state=state)
    later = balancer.end_epoch(balancer.end_epoch(state))
    found = problem.balanced(balancer, parts=parts, state=later)
    np.testing.assert_allclose(found.state.mixture, first.state.mixture * 3**-0.75, rtol=1e-6)


def test_a_task_without_labels(plane, halves):
    problem = plane(absent=(1,))
    found = problem.balanced(forum(), parts=halves(problem))
    assert found.weights[1] == 0 and found.state.logits.value[1] == 0 and found.state.mixture[1] == 0
    np.testing.assert_allclose(found.state.mixture.sum(), 1, rtol=1e-6)
    assert np.all(np.asarray(found.gradients["task/t1/h"]) == 0)


def test_refusals(plane, halves):
    problem = plane()
    with pytest.raises(ConfigError, match="got 11 tasks; expected at most 10"):
        forum().for_tasks([Task(f"t{number}", "binary") for number in range(11)])
    with pytest.raises(ConfigError, match="expected 'auto' or 'weighted'"):
        problem.balanced(forum(), parts=halves(problem), options=BalancingOptions(head_gradient="plain"))
