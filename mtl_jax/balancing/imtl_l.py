"""IMTL-L: learned scales that bring all losses to the same size."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from mtl_jax.balancing.base import Balancer, TaskLike, register
from mtl_jax.balancing.learnable import Learnable, adam_step, learnable
from mtl_jax.balancing.options import PerTask, by_position, checked, vector

# exp(10) = 22026: a task whose loss reaches 0 would otherwise send its scale to infinity.
MAX_SCALE = 10.0


def imtl_l(*, initial: PerTask = 0.0, weight_lr: float = 1e-3) -> Balancer:
    r"""The loss half of impartial multi-task learning, with :math:`s_i` the log of a task's scale:

    .. math::
        O = \sum_i e^{s_i} L_i - s_i
        \qquad w_i = e^{s_i}
        \qquad \frac{\partial O}{\partial s_i} = e^{s_i} L_i - 1

    At the optimum every :math:`w_i L_i` is 1. The weights of a step are read before its update of s, an Adam step
    without weight decay; s stays in [-10, 10].

    Args:
      initial: :math:`s` before the first step, in [-10, 10]; one number, one per task, or by task name.
      weight_lr: Learning rate of s, >= 0.

    Returns:
      A balancer that needs one backward pass and the losses; its state is s and its Adam.

    Raises:
      ConfigError: An option is out of its range, or does not fit the tasks.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtl_jax.balancing import aggregate, imtl_l
      >>> jacobian, balancer = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]), imtl_l()
      >>> direction, state = aggregate(balancer, jacobian, balancer.init(2), losses=jnp.array([0.5, 2.0]))
      >>> print(direction, state.scale.value.round(4))
      [2. 2. 2.] [ 0.001 -0.001]

    Edge cases:
      ==================== ==============================================
      a loss of zero       s rises by ``weight_lr`` a step up to 10
      a negative loss      the same
      an inactive task     its s, moments and step count stay
      the stationary point :math:`e^{s_i} = 1 / L_i`, so :math:`w_i L_i = 1`
      ==================== ==============================================

    References:
      Liu, Li, Kuang, Xue, Chen, Yang, Liao, Zhang, *Towards Impartial Multi-Task Learning*, ICLR 2021,
      `openreview IMPnRXEWpvr <https://openreview.net/forum?id=IMPnRXEWpvr>`_. It is uncertainty weighting with
      :math:`s = -\log \sigma^2` and twice the objective of a Gaussian likelihood.
    """
    initial = checked(initial, "imtl_l(initial)", at_least=-MAX_SCALE, at_most=MAX_SCALE)
    return ImtlL(initial, checked(weight_lr, "imtl_l(weight_lr)", at_least=0.0))


class ImtlLState(NamedTuple):
    """``scale.value`` is s."""

    scale: Learnable


@register
@dataclasses.dataclass(frozen=True)
class ImtlL(Balancer):
    initial: Any
    weight_lr: Any

    needs: ClassVar = "losses"
    reads_losses: ClassVar = True
    weighted_heads: ClassVar = True

    def init(self, num_tasks: int, params: PyTree | None = None) -> ImtlLState:
        return ImtlLState(learnable(vector(self.initial, num_tasks, "imtl_l(initial)")))

    def for_tasks(self, tasks: Sequence[TaskLike]) -> Balancer:
        initial = by_position(self.initial, [task.name for task in tasks], "imtl_l(initial)")
        return dataclasses.replace(super().for_tasks(tasks), initial=initial)

    def weigh(
        self,
        gramian: Float[Array, "task task"] | None,
        losses: Float[Array, " task"],
        state: ImtlLState,
        key: PRNGKeyArray | None,
        *,
        active: Bool[Array, " task"] | None = None,
    ) -> tuple[Float[Array, " task"], ImtlLState]:
        weights = jnp.exp(state.scale.value)
        moved = adam_step(state.scale, weights * losses - 1, self.weight_lr, active=active)
        moved = moved._replace(value=jnp.clip(moved.value, -MAX_SCALE, MAX_SCALE))
        weights = weights if active is None else jnp.where(active, weights, 0)
        return weights.astype(losses.dtype), ImtlLState(moved)
