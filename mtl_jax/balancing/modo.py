"""MoDo: dynamic weights from two batches, applied to the gradients of a third."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from mtl_jax.balancing.base import Balancer, num_active, only_active, register
from mtl_jax.balancing.options import checked
from mtl_jax.balancing.rows import num_rows
from mtl_jax.balancing.solvers import simplex_projection


def modo(*, gamma: float = 0.1, rho: float = 0.1) -> Balancer:
    r"""Multi-objective gradient with double sampling. The gradient of :math:`\tfrac12 \lVert J^\top \lambda \rVert^2` is
    estimated without bias from the Jacobians a and b of two independent batches, and the weights that it leads to act on
    a third one, c:

    .. math::
        \lambda \leftarrow \Pi_\Delta \big( \lambda - \gamma\, (J_a J_b^\top + \rho I)\, \lambda \big)
        \qquad d = J_c^\top \lambda

    from equal weights, with :math:`\Pi_\Delta` the projection on the simplex.

    Args:
      gamma: :math:`\gamma \ge 0`, the step of the weights, in units of an inverse squared gradient; 0 keeps the mean.
      rho: :math:`\rho \ge 0`, what pulls the weights together.

    Returns:
      A balancer that needs the Jacobians of three batches, [3, T, ...]; its state is the weights.

    Raises:
      ConfigError: An option is out of its range.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtl_jax.balancing import aggregate, modo
      >>> jacobian = jnp.array([[1.0, 0.0], [0.0, 3.0]])
      >>> balancer = modo()
      >>> direction, _ = aggregate(balancer, jnp.stack([jacobian] * 3), balancer.init(2))
      >>> print(direction.round(2))  # the long gradient loses weight
      [0.7 0.9]

    Edge cases:
      ================================ ==================================================
      one task                         its own gradient
      no gradient in a and b           as inactive
      an inactive task                 keeps its weight; the others share what is left
      ================================ ==================================================

    References:
      Chen, Fernando, Ying, Chen, *Three-Way Trade-Off in Multi-Objective Learning: Optimization, Generalization and
      Conflict-Avoidance*, NeurIPS 2023, `arXiv:2305.20057 <https://arxiv.org/abs/2305.20057>`_. Not scale-free:
      :math:`\gamma` has to fit the lengths of the gradients.
    """
    return MoDo(checked(gamma, "modo(gamma)", at_least=0.0), checked(rho, "modo(rho)", at_least=0.0))


class MixtureState(NamedTuple):
    """Weights of all tasks, on the simplex."""

    mixture: Float[Array, " task"]


@register
@dataclasses.dataclass(frozen=True)
class MoDo(Balancer):
    gamma: Any
    rho: Any

    needs: ClassVar = "gramian"
    num_batches: ClassVar = 3
    homogeneity: ClassVar = None
    scaling: ClassVar = "mean"

    def init(self, num_tasks: int, params: PyTree | None = None) -> MixtureState:
        return MixtureState(jnp.full(num_tasks, 1 / num_tasks))

    def products(self, jacobian: PyTree[Float[Array, "3 task ..."]]) -> Float[Array, "task task"]:
        return cross_gramian(jacobian)

    def squared_norms(self, products: Float[Array, "task task"]) -> Float[Array, " task"]:
        return largest_products(products)

    def weigh(
        self,
        gramian: Float[Array, "task task"],
        losses: Float[Array, " task"],
        state: MixtureState,
        key: PRNGKeyArray | None,
        *,
        active: Bool[Array, " task"] | None = None,
    ) -> tuple[Float[Array, " task"], MixtureState]:
        active = jnp.ones(losses.shape, bool) if active is None else active
        shares = shares_of(state.mixture, active)
        slope = jnp.matmul(only_active(gramian, active), shares, precision=jax.lax.Precision.HIGHEST)
        moved = simplex_projection(shares - self.gamma * (slope + self.rho * shares), 1.0, active)
        return moved.astype(losses.dtype), MixtureState(mixed(state.mixture, moved, active))


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
