"""PCGrad against the paper's loop, published values, and its limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.balancing import NoState, aggregate, equal, pcgrad
from mtl_jax.balancing.pcgrad import draw_orders, projection_weights


def paper_loop(jacobian: np.ndarray, orders: np.ndarray) -> np.ndarray:
    """Algorithm 1 of the paper on explicit gradients."""
    total = np.zeros(jacobian.shape[1])
    for task, order in enumerate(orders):
        gradient = jacobian[task].copy()
        for other in order:
            dot = gradient @ jacobian[other]
            if other != task and dot < 0:
                gradient -= dot / (jacobian[other] @ jacobian[other]) * jacobian[other]
        total += gradient
    return total


def test_goldens(pcgrad_case, dtype, assert_golden):
    """Given orders where the case has them, the mean over orders where it says so, else any key."""
    jacobian = jnp.asarray(pcgrad_case["jacobian"], dtype)
    gramian, num_tasks = jacobian @ jacobian.T, len(jacobian)
    active = jnp.asarray(pcgrad_case.get("active", [True] * num_tasks))
    if "order" in pcgrad_case:
        weights = projection_weights(gramian, jnp.asarray(pcgrad_case["order"]))
    else:
        num_calls = 20_000 if "expectation" in pcgrad_case else 1
        keys = jax.random.split(jax.random.key(0), num_calls)
        weigh = jax.vmap(lambda k: pcgrad().weigh(gramian, jnp.ones(num_tasks, dtype), NoState(), k, active=active)[0])
        weights = jnp.mean(weigh(keys), axis=0)
    case = {**pcgrad_case, "tol": 0.05} if "expectation" in pcgrad_case else pcgrad_case
    assert weights.dtype == dtype
    assert_golden(weights, case["weights"], case, dtype)
    assert_golden(weights @ jacobian, case["direction"], case, dtype)


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 5, 8])
def test_equals_the_papers_loop(num_tasks):
    rng = np.random.default_rng(num_tasks)
    jacobian = rng.normal(size=(num_tasks, 12))
    orders = np.stack([rng.permutation(num_tasks) for _ in range(num_tasks)])
    weights = projection_weights(jnp.asarray(jacobian @ jacobian.T), jnp.asarray(orders))
    np.testing.assert_allclose(weights @ jacobian, paper_loop(jacobian, orders), rtol=1e-4, atol=1e-5)


def test_published_value():
    """Two conflicting tasks, as in TorchJD's unit tests."""
    direction, _ = aggregate(pcgrad(), jnp.array([[-4.0, 1, 1], [6, 1, 1]]), pcgrad().init(2), key=jax.random.key(0))
    np.testing.assert_allclose(direction, [0.5848, 3.8012, 3.8012], atol=1e-4)


def test_orders_decide_with_three_tasks():
    """With K = 3 the visiting order matters; both answers are worked out by hand."""
    jacobian = np.array([[1.0, 2, 0, 1], [-1, 1, 1, 0], [6, -3, 3, -9]])
    gramian = jnp.asarray(jacobian @ jacobian.T)
    ascending = projection_weights(gramian, jnp.tile(jnp.array([0, 1, 2]), (3, 1)))
    descending = projection_weights(gramian, jnp.tile(jnp.array([2, 1, 0]), (3, 1)))
    np.testing.assert_allclose(ascending, [2.5, 2.5, 1.111111], rtol=1e-5)
    np.testing.assert_allclose(descending, [2.166667, 3.0, 1.111111], rtol=1e-5)


def test_two_tasks_in_closed_form():
    """w = (1 - G12/G11, 1 - G12/G22) where they conflict, whatever the draw."""
    g1, g2 = np.array([1.0, 2.0, -1.0]), np.array([-3.0, 0.5, 0.5])
    direction, _ = aggregate(pcgrad(), jnp.array([g1, g2]), pcgrad().init(2), key=jax.random.key(7))
    expected = (1 - g1 @ g2 / (g1 @ g1)) * g1 + (1 - g1 @ g2 / (g2 @ g2)) * g2
    np.testing.assert_allclose(direction, expected, rtol=1e-5)
    assert min(direction @ g1, direction @ g2) >= 0


def test_is_the_sum_where_nobody_conflicts():
    jacobian = jnp.asarray(np.random.default_rng(0).uniform(0, 1, size=(5, 7)), jnp.float32)
    direction, _ = aggregate(pcgrad(), jacobian, pcgrad().init(5), key=jax.random.key(3))
    np.testing.assert_array_equal(direction, aggregate(equal(), jacobian, equal().init(5))[0])


def test_each_task_draws_an_order_of_its_own():
    """All 36 pairs of orders of two among three tasks occur about equally often."""
    orders = jax.vmap(lambda k: draw_orders(k, 3))(jax.random.split(jax.random.key(0), 7200))
    pairs = np.asarray(orders[:, :2].reshape(7200, 6))
    _, counts = np.unique(pairs, axis=0, return_counts=True)
    assert len(counts) == 36
    assert np.sum((counts - 200) ** 2 / 200) < 67  # chi-squared with 35 degrees of freedom, 0.1 %


@pytest.mark.parametrize(
    ("jacobian", "expected"),
    [
        pytest.param([[1.0, 0], [0, 2]], [1, 2], id="orthogonal tasks are summed"),
        pytest.param([[1.0, 1], [-2, -2]], [0, 0], id="opposite tasks cancel"),
        pytest.param([[0.0, 0], [3, 4]], [3, 4], id="a zero gradient changes nothing"),
    ],
)
def test_limits(jacobian, expected):
    direction, _ = aggregate(pcgrad(), jnp.array(jacobian), pcgrad().init(2), key=jax.random.key(1))
    np.testing.assert_allclose(direction, expected, atol=1e-6)
