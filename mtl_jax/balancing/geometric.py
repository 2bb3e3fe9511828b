"""Geometric loss strategy: the geometric mean of the losses."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from mtl_jax.balancing.base import Balancer, NoState, num_active, register


def geometric() -> Balancer:
    r"""The geometric mean of the losses, the same whatever unit each of them is measured in:

    .. math::
        O = \Bigl(\prod_i L_i\Bigr)^{1/T_a} = \exp\Bigl(\frac{1}{T_a} \sum_i \log L_i\Bigr)
        \qquad w_i = \frac{O}{T_a L_i}

    with :math:`T_a` the number of tasks that have labels in the batch. Every task contributes the same
    :math:`w_i L_i = O / T_a`.

    Returns:
      A balancer that needs one backward pass and the losses, and has no state.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtl_jax.balancing import aggregate, geometric
      >>> jacobian = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> direction, _ = aggregate(geometric(), jacobian, geometric().init(2), losses=jnp.array([0.5, 2.0]))
      >>> print(direction.round(4))
      [-2.5   1.25  1.25]

    Edge cases:
      =============== ============================================================
      one task        its own gradient
      a loss of zero  stands for 1e-12 of the largest one: finite, and it dominates
      all losses zero weights :math:`1/T_a`
      a negative loss a non-finite step: the weights are NaN
      =============== ============================================================

    References:
      Chennupati, Sistu, Yogamani, Rawashdeh, *MultiNet++: Multi-Stream Feature Aggregation and Geometric Loss Strategy
      for Multi-Task Learning*, CVPR Workshops 2019, `arXiv:1904.08492 <https://arxiv.org/abs/1904.08492>`_. Computed
      from logarithms; the product of the losses, as some public code has it, leaves the range of float32.
    """
    return Geometric()


@register
@dataclasses.dataclass(frozen=True)
class Geometric(Balancer):
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
        logs = jnp.log(positive_losses(losses, active))
        count = num_active(active, losses.shape[0])
        # One exponential of a difference: O and 1 / L_i alone may leave the range of float32.
        weights = jnp.exp(jnp.sum(logs) / count - logs) / count
        return weights if active is None else jnp.where(active, weights, 0), state


def positive_losses(losses: Float[Array, " task"], active: Bool[Array, " task"] | None) -> Float[Array, " task"]:
    """Losses to divide by and to take logarithms of: raised by 1e-12 of the largest; NaN if negative, 1 if inactive."""
    largest = jnp.max(losses if active is None else jnp.where(active, losses, 0))
    raised = losses + jnp.maximum(1e-12 * largest, jnp.finfo(losses.dtype).tiny)
    raised = jnp.where(losses < 0, jnp.nan, raised)
    return raised if active is None else jnp.where(active, raised, 1)
