"""The loss schedule of PLE: weights that grow or decay geometrically over the periods of training."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from mtl_jax.balancing.base import Balancer, TaskLike, register
from mtl_jax.balancing.options import PerTask, by_position, checked, vector
from mtl_jax.balancing.period import Period, checked_period, count_call


def ple_schedule(*, initial: PerTask = 1.0, decay: PerTask = 1.0, period: Period = "epoch") -> Balancer:
    r"""Weights that change by a constant factor a period:

    .. math::
        O = \sum_i w_i L_i \qquad w_i = w_{i,0}\, \gamma_i^t

    with t the number of periods that have ended.

    Args:
      initial: :math:`w_{i,0} \ge 0`; one number, one per task, or by task name.
      decay: :math:`\gamma_i \ge 0`, above 1 for a task whose weight grows; given like ``initial``.
      period: ``epoch``, or a number of steps.

    Returns:
      A balancer that needs one backward pass; its state counts periods, and the steps within one.

    Raises:
      ConfigError: An option is out of its range, or does not fit the tasks.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtl_jax.balancing import aggregate, ple_schedule
      >>> jacobian = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> balancer = ple_schedule(decay=[0.5, 1.0])
      >>> _, state = aggregate(balancer, jacobian, balancer.init(2))
      >>> direction, _ = aggregate(balancer, jacobian, balancer.end_epoch(state))
      >>> print(direction)
      [4.  1.5 1.5]

    Edge cases:
      ================ ==========================================================
      ``decay`` of 1   constant weights
      ``decay`` of 0   the initial weight for one period, then 0
      an inactive task its weight moves on: time is that of the training
      overflow         a non-finite step, once :math:`\gamma_i^t` leaves the range
      ================ ==========================================================

    References:
      Tang, Liu, Zhao, Gong, *Progressive Layered Extraction (PLE): A Novel Multi-Task Learning (MTL) Model for
      Personalized Recommendations*, RecSys 2020, `doi:10.1145/3383313.3412236
      <https://doi.org/10.1145/3383313.3412236>`_, the joint loss. Its sample space of a task is the task's mask.
    """
    return PleSchedule(
        checked(initial, "ple_schedule(initial)", at_least=0.0),
        checked(decay, "ple_schedule(decay)", at_least=0.0),
        checked_period(period, "ple_schedule(period)"),
    )


class PleScheduleState(NamedTuple):
    """Periods that have ended, and calls since then where periods are counted in calls."""

    periods: Int[Array, ""]
    calls: Int[Array, ""]


@register
@dataclasses.dataclass(frozen=True)
class PleSchedule(Balancer):
    initial: Any
    decay: Any
    period: Period = dataclasses.field(metadata={"static": True})

    needs: ClassVar = "losses"
    weighted_heads: ClassVar = True

    @property
    def by_epoch(self) -> bool:
        return self.period == "epoch"

    def init(self, num_tasks: int, params: PyTree | None = None) -> PleScheduleState:
        self._options(num_tasks)
        return PleScheduleState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))

    def for_tasks(self, tasks: Sequence[TaskLike]) -> Balancer:
        names = [task.name for task in tasks]
        initial = by_position(self.initial, names, "ple_schedule(initial)")
        decay = by_position(self.decay, names, "ple_schedule(decay)")
        return dataclasses.replace(super().for_tasks(tasks), initial=initial, decay=decay)

    def weigh(
        self,
        gramian: Float[Array, "task task"] | None,
        losses: Float[Array, " task"],
        state: PleScheduleState,
        key: PRNGKeyArray | None,
        *,
        active: Bool[Array, " task"] | None = None,
    ) -> tuple[Float[Array, " task"], PleScheduleState]:
        initial, decay = self._options(losses.shape[0])
        weights = (initial * decay**state.periods).astype(losses.dtype)
        weights = weights if active is None else jnp.where(active, weights, 0)
        return weights, count_call(state, self.period, _next_period)

    def end_epoch(self, state: PleScheduleState) -> PleScheduleState:
        return _next_period(state) if self.by_epoch else state

    def _options(self, num_tasks):
        initial = vector(self.initial, num_tasks, "ple_schedule(initial)")
        return initial, vector(self.decay, num_tasks, "ple_schedule(decay)")


def _next_period(state):
    return state._replace(periods=state.periods + 1)
