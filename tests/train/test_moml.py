"""MOML against finite differences of what it looks ahead to, and the shortest mixture of their unit rows."""

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize

from mtl_jax.train import moml
from mtl_jax.train.moml import slopes_of_logits

FIRST_MOMENT = 0.1  # what Adam takes of the first gradient


def shortest_mixture(rows):
    """Of unit rows, by a general solver."""
    units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    count = len(rows)
    found = scipy.optimize.minimize(
        lambda mixture: np.sum((mixture @ units) ** 2),
        np.full(count, 1 / count),
        bounds=[(0, 1)] * count,
        constraints={"type": "eq", "fun": lambda mixture: mixture.sum() - 1},
        options={"ftol": 1e-15},
    )
    return found.x @ units


def test_the_slope_of_the_logits(plane, halves):
    problem = plane()
    parts, rate = halves(problem), 0.2
    rows = np.zeros((3, 3))
    for objective in range(3):
        for number in range(3):
            step = 1e-5 * np.eye(3)[number]
            ahead, behind = (
                problem.looked_ahead(parts, jax.nn.softmax(jnp.asarray(s * step)), rate, [objective]) for s in (1, -1)
            )
            rows[objective, number] = (ahead - behind) / 2e-5
    found = problem.balanced(moml(inner_lr=rate), parts=parts)
    np.testing.assert_allclose(found.state.logits.adam.mu / FIRST_MOMENT, shortest_mixture(rows), atol=1e-5)


def test_the_step_is_that_of_the_new_weights_on_the_first_half(plane, halves):
    problem = plane()
    parts = halves(problem)
    found = problem.balanced(moml(meta_lr=0.5), parts=parts)
    np.testing.assert_allclose(found.weights, jax.nn.softmax(found.state.logits.value))
    assert np.ptp(np.asarray(found.weights)) > 0.01
    train = jax.tree.map(lambda leaf: leaf[0], parts)
    expected = jax.grad(lambda params: found.weights @ problem.losses(params, train))(problem.params)
    for path, gradient in expected.items():
        np.testing.assert_allclose(found.gradients[path], gradient, rtol=1e-9)


def test_the_same_task_twice_learns_nothing(plane, halves):
    problem = plane(copies=True)
    found = problem.balanced(moml(), parts=halves(problem))
    np.testing.assert_allclose(found.state.logits.value, 0, atol=1e-9)
    np.testing.assert_allclose(found.weights, 1 / 3)


def test_a_task_without_labels_is_neither_trained_nor_asked(plane, halves):
    problem = plane(absent=(1,))
    found = problem.balanced(moml(meta_lr=0.5), parts=halves(problem))
    assert found.weights[1] == 0 and found.state.logits.value[1] == 0
    np.testing.assert_allclose(found.weights.sum(), 1)


def test_objectives_of_rounding_are_none():
    """Rows that cancel up to rounding have no direction; one real row is left."""
    products = jnp.array([[1.0, 1.0 + 1e-7], [1.0, 3.0]])
    slopes = slopes_of_logits(products, jnp.array([0.5, 0.5]), 0.1, jnp.array([True, True]))
    np.testing.assert_allclose(slopes, np.array([1, -1]) / np.sqrt(2), rtol=1e-5)
