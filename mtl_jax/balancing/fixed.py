"""Fixed weights: the weighted sum of the losses, by hand."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from mtl_jax.balancing.base import Balancer, NoState, TaskLike, register
from mtl_jax.balancing.options import PerTask, by_position, checked, vector


def fixed(*, weights: PerTask) -> Balancer:
    r"""Linear scalarisation with constant weights:

    .. math:: O = \sum_i w_i L_i

    Args:
      weights: :math:`w \ge 0`, one value per task in their order or by task name, or one number for all. Names are
        resolved by ``for_tasks``. An array is a leaf of the balancer, so that a run axis can map a grid of weights.

    Returns:
      A balancer that needs one backward pass and has no state.

    Raises:
      ConfigError: A weight is negative or not finite; by ``for_tasks``, ``init`` or the first step, their number or
        names are not those of the tasks.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtl_jax.balancing import aggregate, fixed
      >>> balancer = fixed(weights=[1.0, 2.0])
      >>> direction, _ = aggregate(balancer, jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]), balancer.init(2))
      >>> print(direction)
      [8. 3. 3.]

    Edge cases:
      ================ ===========================================================
      a weight of zero the task trains its own head only if heads are given ``plain``
      an inactive task its weight is not handed to the others
      ================ ===========================================================

    References:
      Xin, Ghorbani, Gilmer, Garg, Firat, *Do Current Multi-Task Optimization Methods in Deep Learning Even Help?*,
      NeurIPS 2022, `arXiv:2209.11379 <https://arxiv.org/abs/2209.11379>`_: tuned constant weights are the baseline to
      beat. Weights are taken as given, not normalised.
    """
    return Fixed(checked(weights, "fixed(weights)", at_least=0.0))


@register
@dataclasses.dataclass(frozen=True)
class Fixed(Balancer):
    weights: Any

    needs: ClassVar = "losses"
    weighted_heads: ClassVar = True

    def init(self, num_tasks: int, params: PyTree | None = None) -> NoState:
        vector(self.weights, num_tasks, "fixed(weights)")
        return NoState()

    def for_tasks(self, tasks: Sequence[TaskLike]) -> Balancer:
        weights = by_position(self.weights, [task.name for task in tasks], "fixed(weights)")
        return dataclasses.replace(super().for_tasks(tasks), weights=weights)

    def weigh(
        self,
        gramian: Float[Array, "task task"] | None,
        losses: Float[Array, " task"],
        state: NoState,
        key: PRNGKeyArray | None,
        *,
        active: Bool[Array, " task"] | None = None,
    ) -> tuple[Float[Array, " task"], NoState]:
        weights = vector(self.weights, losses.shape[0], "fixed(weights)").astype(losses.dtype)
        return weights if active is None else jnp.where(active, weights, 0), state
