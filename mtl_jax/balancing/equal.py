"""Equal weights: the sum of the losses, or their mean."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from mtl_jax.balancing.base import Balancer, NoState, num_active, register
from mtl_jax.errors import ConfigError

REDUCTIONS = ("sum", "mean")


def equal(*, reduction: str = "sum") -> Balancer:
    r"""Equal weights, the baseline of every other method:

    .. math::
        O = \sum_i L_i \quad (w_i = 1) \qquad\text{or}\qquad O = \frac{1}{T_a} \sum_i L_i \quad (w_i = 1/T_a)

    with :math:`T_a` the number of tasks that have labels in the batch.

    Args:
      reduction: ``sum`` or ``mean``. Under SGD, gradient clipping, weight decay or a large epsilon of Adam the two
        train differently; under plain Adam hardly.

    Returns:
      A balancer that needs one backward pass and has no state.

    Raises:
      ConfigError: ``reduction`` is neither.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtl_jax.balancing import aggregate, equal
      >>> direction, _ = aggregate(equal(), jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]), equal().init(2))
      >>> print(direction)
      [2. 2. 2.]

    Edge cases:
      =============== ==========================================
      one task        its own gradient
      a zero gradient counts in :math:`T_a`: losses are all it sees
      =============== ==========================================

    References:
      The convention of single-objective training; LibMTL calls it EW and documents 1/T where its code sums.
    """
    if reduction not in REDUCTIONS:
        raise ConfigError(f"equal(reduction) is '{reduction}'; expected one of {list(REDUCTIONS)}. Set one of them")
    return Equal(reduction)


@register
@dataclasses.dataclass(frozen=True)
class Equal(Balancer):
    reduction: str = dataclasses.field(metadata={"static": True})

    needs: ClassVar = "losses"
    weighted_heads: ClassVar = True

    @property
    def scaling(self) -> str:
        return self.reduction

    def weigh(
        self,
        gramian: Float[Array, "task task"] | None,
        losses: Float[Array, " task"],
        state: NoState,
        key: PRNGKeyArray | None,
        *,
        active: Bool[Array, " task"] | None = None,
    ) -> tuple[Float[Array, " task"], NoState]:
        weights = jnp.ones_like(losses)
        if self.reduction == "mean":
            weights = weights / num_active(active, losses.shape[0])
        return weights if active is None else jnp.where(active, weights, 0), state
