"""Inner products and weighted sums of task gradients that live in a pytree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.balancing.base import combine_rows, gramian
from mtl_jax.errors import ConfigError


@pytest.fixture
def tree():
    rng = np.random.default_rng(0)
    shapes = {"kernel": (3, 4, 5), "bias": (3, 5), "scale": (3,)}
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


def flat(tree):
    return np.concatenate([np.asarray(leaf, np.float64).reshape(3, -1) for leaf in jax.tree.leaves(tree)], axis=1)


def test_gramian_of_a_pytree_is_that_of_the_concatenated_rows(tree):
    np.testing.assert_allclose(gramian(tree), flat(tree) @ flat(tree).T, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_tasks", range(1, 8))
def test_gramian_of_any_number_of_tasks(num_tasks):
    """Few rows are multiplied pair by pair, many as a matrix."""
    generator = np.random.default_rng(num_tasks)
    tree = {"kernel": (num_tasks, 5, 3, 4), "bias": (num_tasks, 6), "scalar": (num_tasks,)}
    tree = {name: generator.standard_normal(shape).astype(np.float32) for name, shape in tree.items()}
    rows = np.concatenate([leaf.reshape(num_tasks, -1) for leaf in tree.values()], axis=1).astype(float)
    found = gramian({name: jnp.asarray(leaf) for name, leaf in tree.items()})
    np.testing.assert_allclose(found, rows @ rows.T, rtol=1e-5, atol=1e-5)


def test_gramian_of_half_precision_rows_is_accumulated_in_float32():
    """Summed in bfloat16, 4096 ones stop at 256."""
    products = gramian(jnp.ones((2, 4096), jnp.bfloat16))
    assert products.dtype == jnp.float32
    np.testing.assert_array_equal(products, np.full((2, 2), 4096.0))


def test_weighted_sum_of_a_pytree_is_that_of_the_concatenated_rows(tree):
    weights = jnp.array([0.5, -2.0, 3.0])
    combined = combine_rows(weights, tree)
    assert jax.tree.map(jnp.shape, combined) == {"kernel": (4, 5), "bias": (5,), "scale": ()}
    actual = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(combined)])
    np.testing.assert_allclose(actual, np.asarray(weights) @ flat(tree), rtol=1e-5, atol=1e-6)


def test_weighted_sum_keeps_the_type_of_a_leaf_and_adds_in_float32():
    """256 + 16 ones is 256 in bfloat16, where every 1 alone is rounded away."""
    rows = jnp.concatenate([jnp.full((1, 2), 256.0), jnp.ones((16, 2))]).astype(jnp.bfloat16)
    combined = combine_rows(jnp.ones(17), {"kernel": rows})["kernel"]
    assert combined.dtype == jnp.bfloat16
    np.testing.assert_array_equal(combined.astype(jnp.float32), [272.0, 272.0])


def test_a_row_of_weight_zero_is_absent_whatever_it_holds():
    rows = jnp.array([[1.0, 2.0], [jnp.nan, jnp.inf]])
    np.testing.assert_array_equal(combine_rows(jnp.array([2.0, 0.0]), rows), [2.0, 4.0])


@pytest.mark.parametrize("jacobian", [{}, {"a": np.ones((2, 3)), "b": np.ones((3, 3))}, {"a": np.float32(1.0)}])
def test_a_jacobian_without_one_task_axis_is_refused(jacobian):
    with pytest.raises(ConfigError, match="task axis"):
        gramian(jacobian)
