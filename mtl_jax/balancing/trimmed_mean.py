"""Trimmed mean: the mean of each coordinate without its extremes."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from mtl_jax.balancing.base import Balancer, NoState, check_num_tasks, num_active, register
from mtl_jax.balancing.options import checked_count


def trimmed_mean(*, trim: int = 1) -> Balancer:
    r"""Coordinate-wise trimmed mean, a rule of robust statistics: in every coordinate the b largest and the b smallest
    of the T values are left out, and the rest is averaged:

    .. math::
        d_p = \frac{1}{T - 2b} \sum_{r = b + 1}^{T - b} g_{(r) p}
        \qquad g_{(1) p} \le \dots \le g_{(T) p}

    It is meant for many noisy copies of one gradient. For different tasks it is a baseline: what one task alone needs
    is left out.

    Args:
      trim: b >= 0, values left out at either end; 0 is the mean.

    Returns:
      A balancer that needs the Jacobian of at least 2 b + 1 tasks, and has no state.

    Raises:
      ConfigError: ``trim`` is not such a whole number, or the tasks are too few.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtl_jax.balancing import aggregate, trimmed_mean
      >>> jacobian = jnp.array([[1e6, 3.0], [1.0, -1e6], [-1e5, 1e5], [2.0, 2.0]])
      >>> direction, _ = aggregate(trimmed_mean(), jacobian, trimmed_mean().init(4))
      >>> print(direction)
      [1.5 2.5]

    Edge cases:
      ================================= ==========================================================
      inactive or zero gradients        no values, b stays
      fewer than 2 b + 1 values         as many left out as leave one or two: their median
      one gradient 1e8 times the others an outlier like any: zero is 1e-8 of the *median* length
      ================================= ==========================================================

    References:
      Yin, Chen, Ramchandran, Bartlett, *Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates*,
      ICML 2018, `arXiv:1803.01498 <https://arxiv.org/abs/1803.01498>`_. Values are sorted, not subtracted from their
      sum, which loses all digits of the small ones.
    """
    return TrimmedMean(checked_count(trim, "trimmed_mean(trim)", at_least=0))


@register
@dataclasses.dataclass(frozen=True)
class TrimmedMean(Balancer):
    trim: int = dataclasses.field(metadata={"static": True})

    needs: ClassVar = "jacobian"
    scaling: ClassVar = "mean"
    robust: ClassVar = True

    @property
    def min_tasks(self) -> int:
        return 2 * self.trim + 1

    def init(self, num_tasks: int, params: PyTree | None = None) -> NoState:
        check_num_tasks(self, num_tasks)
        return NoState()

    def combine(
        self,
        jacobian: PyTree[Float[Array, "task ..."]],
        losses: Float[Array, " task"],
        state: NoState,
        key: PRNGKeyArray | None,
        *,
        active: Bool[Array, " task"] | None = None,
    ) -> tuple[PyTree[Float[Array, "..."]], NoState]:
        num_tasks = losses.shape[0]
        active = jnp.ones(num_tasks, bool) if active is None else active
        count = num_active(active, num_tasks)
        trim = jnp.minimum(self.trim, (count - 1) // 2)
        places = jnp.arange(num_tasks)
        inside = (places >= trim) & (places < count - trim)

        def mean(leaf):
            per_task = (-1, *[1] * (leaf.ndim - 1))
            values = jnp.where(active.reshape(per_task), leaf, jnp.inf)  # absent values come last
            ordered = jnp.sort(values, axis=0).astype(jnp.promote_types(leaf.dtype, jnp.float32))
            total = jnp.sum(jnp.where(inside.reshape(per_task), ordered, 0), axis=0)
            return (total / (count - 2 * trim)).astype(leaf.dtype)

        return jax.tree.map(mean, jacobian), state
