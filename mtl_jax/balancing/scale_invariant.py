"""Scale-invariant weights: the sum of the logarithms of the losses."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from mtl_jax.balancing.base import Balancer, NoState, register
from mtl_jax.balancing.geometric import positive_losses


def scale_invariant() -> Balancer:
    r"""The sum of the logarithms of the losses, so that no task's unit matters:

    .. math::
        O = \sum_i \log L_i \qquad w_i = \frac{1}{L_i}

    Its direction is that of the geometric mean; only its length is another.

    Returns:
      A balancer that needs one backward pass and the losses, and has no state.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtl_jax.balancing import aggregate, scale_invariant
      >>> jacobian, balancer = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]), scale_invariant()
      >>> direction, _ = aggregate(balancer, jacobian, balancer.init(2), losses=jnp.array([0.5, 2.0]))
      >>> print(direction)
      [-5.   2.5  2.5]

    Edge cases:
      =============== ============================================================
      a loss of zero  stands for 1e-12 of the largest one: a large, finite weight
      all losses zero the largest weight there is
      a negative loss a non-finite step: the weights are NaN
      =============== ============================================================

    References:
      A baseline of Navon, Shamsian, Achituve, Maron, Kawaguchi, Chechik, Fetaya, *Multi-Task Learning as a Bargaining
      Game*, ICML 2022, `arXiv:2202.01017 <https://arxiv.org/abs/2202.01017>`_.
    """
    return ScaleInvariant()


@register
@dataclasses.dataclass(frozen=True)
class ScaleInvariant(Balancer):
    needs: ClassVar = "losses"
    reads_losses: ClassVar = True
    weighted_heads: ClassVar = True

    def weigh(
        self,
        gramian: Float[Array, "task task"] | None,
        losses: Float[Array, " task"],
        state: NoState,
        key: PRNGKeyArray | None,
        *,
        active: Bool[Array, " task"] | None = None,
    ) -> tuple[Float[Array, " task"], NoState]:
        weights = 1 / positive_losses(losses, active)
        return weights if active is None else jnp.where(active, weights, 0), state
