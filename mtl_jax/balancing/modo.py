"""MoDo: dynamic weights from two batches, applied to the gradients of a third."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from mtl_jax.balancing.base import Balancer, only_active, register
from mtl_jax.balancing.mixture import MixtureState, cross_gramian, equal_mixture, largest_products, mixed, shares_of
from mtl_jax.balancing.options import checked
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
        return MixtureState(equal_mixture(num_tasks))

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
