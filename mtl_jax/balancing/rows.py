"""Task gradients as rows of a Jacobian that is never laid out flat: inner products and weighted sums."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from mtl_jax.errors import ConfigError

# Up to here a CPU is quicker with one fused pass a pair than with a matrix product of so few rows.
FEW_TASKS = 4


def gramian(jacobian: PyTree[Float[Array, "task ..."]]) -> Float[Array, "task task"]:
    r"""Inner products of the task gradients, :math:`G = J J^\top`, summed leaf by leaf.

    Args:
      jacobian: f[T, P] or a pytree of leaves with a leading task axis, in any float type.

    Returns:
      G, accumulated in float32, or in float64 where a leaf has it. The full precision of float32 is asked for: the
      default of some accelerators keeps three digits, and a conflict is a small difference of large products.
    """
    num_rows(jacobian)
    return functools.reduce(jnp.add, map(_products, jax.tree.leaves(jacobian)))


def squared_row_norms(jacobian: PyTree[Float[Array, "task ..."]]) -> Float[Array, " task"]:
    """Squared lengths of the task gradients, the diagonal of :func:`gramian` without the rest."""
    num_tasks = num_rows(jacobian)
    rows = (leaf.reshape(num_tasks, -1).astype(_accumulator(leaf)) for leaf in jax.tree.leaves(jacobian))
    return functools.reduce(jnp.add, (jnp.sum(row * row, axis=1) for row in rows))


def zeros_per_task(params: PyTree[Float[Array, "..."]], num_tasks: int) -> PyTree[Float[Array, "task ..."]]:
    """A state with an entry for each task and parameter, all 0, in the type of :func:`row_dtype`."""
    return jax.tree.map(lambda leaf: jnp.zeros((num_tasks, *jnp.shape(leaf)), _accumulator(leaf)), params)


def follow(
    average: PyTree[Float[Array, "task ..."]],
    jacobian: PyTree[Float[Array, "task ..."]],
    taken: Float[Array, " task"],
    kept: float | Float[Array, ""],
    active: Bool[Array, " task"],
) -> PyTree[Float[Array, "task ..."]]:
    """``kept * average + taken * jacobian`` for active tasks; the rows of the others stay."""

    def follow_leaf(old, rows):
        per_task = (-1, *[1] * (rows.ndim - 1))
        new = kept * old + taken.reshape(per_task) * rows
        return jnp.where(active.reshape(per_task), new, old).astype(old.dtype)

    return jax.tree.map(follow_leaf, average, jacobian)


def combine_rows(
    weights: Float[Array, " task"], jacobian: PyTree[Float[Array, "task ..."]]
) -> PyTree[Float[Array, "..."]]:
    r"""The weighted sum of the task gradients, :math:`\sum_i w_i g_i`, leaf by leaf in the type of the leaf.

    A row of weight 0 is absent: whatever it holds, NaN included, it leaves the sum alone.
    """
    num_tasks = num_rows(jacobian)

    def combine(leaf):
        dtype = _accumulator(leaf)
        # Unrolled, this is one fused pass over the rows. A reduction over the task axis is much slower on a CPU, and a
        # matrix product lets the NaN of an absent row through.
        terms = (jnp.where(weights[i] == 0, 0, weights[i].astype(dtype) * leaf[i]) for i in range(num_tasks))
        return functools.reduce(jnp.add, terms).astype(leaf.dtype)

    return jax.tree.map(combine, jacobian)


def num_rows(jacobian: PyTree[Float[Array, "task ..."]]) -> int:
    """T, the size of the task axis that all leaves lead with.

    Raises:
      ConfigError: There is no leaf, or the leaves disagree.
    """
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(jacobian)]
    sizes = {shape[0] if shape else None for shape in shapes}
    if len(sizes) != 1 or None in sizes:
        expectation = "expected at least one leaf, all with one leading task axis"
        raise ConfigError(
            f"the jacobian has leaves of shapes {shapes}; {expectation}. Stack the gradients of the tasks"
        )
    return sizes.pop()


def row_dtype(jacobian: PyTree[Float[Array, "task ..."]]) -> jnp.dtype:
    """The type in which inner products of the rows are accumulated."""
    return jnp.result_type(*(_accumulator(leaf) for leaf in jax.tree.leaves(jacobian)))


def _products(leaf):
    num_tasks, dtype = len(leaf), _accumulator(leaf)
    if num_tasks <= FEW_TASKS:
        pairs = [[_inner(leaf[i].astype(dtype), leaf[j].astype(dtype)) for j in range(i + 1)] for i in range(num_tasks)]
        return jnp.stack([jnp.stack([pairs[max(i, j)][min(i, j)] for j in range(num_tasks)]) for i in range(num_tasks)])
    rows, highest = leaf.reshape(num_tasks, -1), jax.lax.Precision.HIGHEST
    return jnp.matmul(rows, rows.T, precision=highest, preferred_element_type=dtype)


def _inner(one, other):
    products = one * other
    # All axes but the last come first: sums of whole vectors, where a sum along the last axis is one of single numbers.
    return jnp.sum(jnp.sum(products, axis=tuple(range(products.ndim - 1))))


def _accumulator(leaf):
    return jnp.promote_types(leaf.dtype, jnp.float32)
