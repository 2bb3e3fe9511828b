"""Dynamic weight average: tasks whose loss falls slowly count more."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from mtl_jax.balancing.base import Balancer, num_active, register
from mtl_jax.balancing.options import checked
from mtl_jax.balancing.period import Means, Period, add_losses, checked_period, count_call, no_means

MIN_TEMPERATURE = 1e-6
# A loss that jumps from or to 0 counts as a change by this factor.
MAX_RATIO = 1e3


def dwa(*, temperature: float = 2.0, period: Period = "epoch") -> Balancer:
    r"""Weights by the rate at which each task's mean loss :math:`\bar L_i` changed between the last two periods:

    .. math::
        O = \sum_i w_i L_i
        \qquad r_i = \frac{\bar L_i(t-1)}{\bar L_i(t-2)}
        \qquad w = T_a\, \mathrm{softmax}(r / \tau)

    with :math:`T_a` the number of tasks that have labels in the batch. The weights are 1 until two periods have ended.

    Args:
      temperature: :math:`\tau`, >= 1e-6; the larger, the closer to equal weights.
      period: ``epoch``, or a number of steps.

    Returns:
      A balancer that needs one backward pass and the losses; its state is the mean losses of this period and of the
      last, and the rates.

    Raises:
      ConfigError: An option is out of its range.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtl_jax.balancing import aggregate, dwa
      >>> jacobian, balancer = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]), dwa(period=1)
      >>> state = balancer.init(2)
      >>> for losses in ([1.0, 1.0], [1.0, 4.0], [3.0, 5.0]):
      ...     direction, state = aggregate(balancer, jacobian, state, losses=losses)
      >>> print(direction.round(4))
      [8.3515 2.     2.    ]

    Edge cases:
      ======================================= ==========================================
      a task without labels for a whole period its rate is 1 until it has two in a row
      a batch without a task's labels          does not enter its mean
      a rate outside of [1e-3, 1e3]            clipped: from a loss of 0, or from -1 to 1
      ======================================= ==========================================

    References:
      Liu, Johns, Davison, *End-to-End Multi-Task Learning with Attention*, CVPR 2019,
      `arXiv:1803.10704 <https://arxiv.org/abs/1803.10704>`_. Periods are epochs, as in the paper; some public code
      takes windows of some steps instead, which ``period`` allows.
    """
    temperature = checked(temperature, "dwa(temperature)", at_least=MIN_TEMPERATURE)
    return Dwa(temperature, checked_period(period, "dwa(period)"))


class DwaState(NamedTuple):
    """Mean losses of the period under way and of the one before it, r, and calls where periods are counted in them."""

    means: Means
    last: Means
    ratios: Float[Array, " task"]
    calls: Int[Array, ""]


@register
@dataclasses.dataclass(frozen=True)
class Dwa(Balancer):
    temperature: Any
    period: Period = dataclasses.field(metadata={"static": True})

    needs: ClassVar = "losses"
    scaling: ClassVar = "sum"
    reads_losses: ClassVar = True
    weighted_heads: ClassVar = True

    @property
    def by_epoch(self) -> bool:
        return self.period == "epoch"

    def init(self, num_tasks: int, params: PyTree | None = None) -> DwaState:
        return DwaState(no_means(num_tasks), no_means(num_tasks), jnp.ones(num_tasks), jnp.zeros((), jnp.int32))

    def weigh(
        self,
        gramian: Float[Array, "task task"] | None,
        losses: Float[Array, " task"],
        state: DwaState,
        key: PRNGKeyArray | None,
        *,
        active: Bool[Array, " task"] | None = None,
    ) -> tuple[Float[Array, " task"], DwaState]:
        weights = jax.nn.softmax(state.ratios / self.temperature, where=active) * num_active(active, losses.shape[0])
        state = state._replace(means=add_losses(state.means, losses, active))
        return weights.astype(losses.dtype), count_call(state, self.period, _next_period)

    def end_epoch(self, state: DwaState) -> DwaState:
        return _next_period(state) if self.by_epoch else state


def _next_period(state):
    means, last = state.means, state.last
    # Two means of 0 have no ratio, and did not change.
    measured = (means.count > 0) & (last.count > 0) & (means.value != last.value)
    ratios = jnp.clip(means.value / jnp.where(measured, last.value, 1), 1 / MAX_RATIO, MAX_RATIO)
    ratios = jnp.where(measured, ratios, 1)
    return state._replace(means=jax.tree.map(jnp.zeros_like, means), last=means, ratios=ratios)
