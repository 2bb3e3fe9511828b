"""Weights on the simplex that a balancer remembers, and products between the gradients of two batches."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from mtl_jax.balancing.base import num_active
from mtl_jax.balancing.rows import num_rows


class MixtureState(NamedTuple):
    """Weights of all tasks, on the simplex."""

    mixture: Float[Array, " task"]


def equal_mixture(num_tasks: int) -> Float[Array, " task"]:
    """Equal weights, before the first step. Typed, or the first step would be traced apart from the others."""
    return jnp.full(num_tasks, 1 / num_tasks, float)


def cross_gramian(jacobian: PyTree[Float[Array, "3 task ..."]]) -> Float[Array, "task task"]:
    """:math:`J_a J_b^T` of the first two of three batches, accumulated as a Gramian is."""
    num_tasks = num_rows(jax.tree.map(lambda leaf: leaf[0], jacobian))

    def products(leaf):
        first, second = leaf[0].reshape(num_tasks, -1), leaf[1].reshape(num_tasks, -1)
        dtype = jnp.promote_types(leaf.dtype, jnp.float32)
        return jnp.matmul(first, second.T, precision=jax.lax.Precision.HIGHEST, preferred_element_type=dtype)

    return sum(map(products, jax.tree.leaves(jacobian)))


def largest_products(products: Float[Array, "task task"]) -> Float[Array, " task"]:
    """For each task the largest product that it has a part in: 0 if it has no gradient in either batch."""
    sizes = jnp.abs(products)
    return jnp.maximum(jnp.max(sizes, axis=0), jnp.max(sizes, axis=1))


def shares_of(mixture: Float[Array, " task"], active: Bool[Array, " task"]) -> Float[Array, " task"]:
    """The weights as shares of what the active tasks have together; equal shares where that is nothing."""
    present = jnp.where(active, mixture, 0)
    total = jnp.sum(present)
    equal = active / num_active(active, mixture.shape[0])
    return jnp.where(total > 0, present / jnp.where(total > 0, total, 1), equal).astype(mixture.dtype)


def mixed(
    mixture: Float[Array, " task"], shares: Float[Array, " task"], active: Bool[Array, " task"]
) -> Float[Array, " task"]:
    """The weights of all tasks, when the active ones share in a new way what inactive ones leave to them."""
    left = 1 - jnp.sum(mixture, where=~active)
    return jnp.where(active, jnp.maximum(left, 0) * shares, mixture).astype(mixture.dtype)
