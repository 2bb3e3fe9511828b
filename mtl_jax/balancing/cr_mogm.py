"""CR-MOGM: another method, with weights that are averaged over the steps."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from mtl_jax.balancing.base import Balancer, register
from mtl_jax.balancing.options import checked
from mtl_jax.balancing.wrapper import Wrapper
from mtl_jax.errors import ConfigError


def cr_mogm(base: Balancer, *, alpha: float = 0.9) -> Balancer:
    r"""Correlation-reduced multi-objective gradient manipulation. Weights that depend on the gradients of the same batch
    bias the direction; an average over the steps hardly depends on it:

    .. math::
        \hat\lambda \leftarrow \alpha\, \hat\lambda + (1 - \alpha)\, w_{base}
        \qquad w = \hat\lambda

    from the first weights of the other method.

    Args:
      base: The other method, one with weights.
      alpha: :math:`\alpha` in [0, 1], how much of the average stays; 0 is the other method, 1 keeps its first weights.

    Returns:
      A balancer that needs, draws and observes what ``base`` does; its state is the state of ``base`` and
      :math:`\hat\lambda`.

    Raises:
      ConfigError: ``alpha`` is out of its range, or ``base`` is no balancer or has no weights.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtl_jax.balancing import aggregate, cr_mogm, ntkmtl
      >>> balancer = cr_mogm(ntkmtl(exponent=1.0), alpha=0.75)
      >>> state = balancer.init(2)
      >>> for length in (1.0, 3.0):
      ...     direction, state = aggregate(balancer, jnp.diag(jnp.array([length, 1.0])), state)
      ...     print(state.average.round(2))  # of (2, 2) and (1.111, 10)
      [2. 2.]
      [1.78 4.  ]

    Edge cases:
      ======================= ===============================================
      an inactive task        keeps its :math:`\hat\lambda`, weight 0
      the first step of a task the weight that ``base`` gives
      ======================= ===============================================

    References:
      Zhou, Zhang, Jiang, Zhong, Gu, Zhu, *On the Convergence of Stochastic Multi-Objective Gradient Manipulation and
      Beyond*, NeurIPS 2022, `OpenReview <https://openreview.net/forum?id=ScwfQ7hdwyP>`_.
    """
    if not isinstance(base, Balancer) or base.needs == "jacobian" or base.owns_step:
        expectation = "expected a balancer that has weights, such as mgda()"
        name = type(base).__name__ if isinstance(base, Balancer) else repr(base)
        raise ConfigError(f"cr_mogm(base) is {name}; {expectation}. Choose another base")
    return CrMogm(base, checked(alpha, "cr_mogm(alpha)", at_least=0.0, at_most=1.0))


class CrMogmState(NamedTuple):
    """The state of the other method, the averaged weights, and which tasks have had one."""

    base: Any
    average: Float[Array, " task"]
    started: Bool[Array, " task"]


@register
@dataclasses.dataclass(frozen=True)
class CrMogm(Wrapper):
    base: Balancer
    alpha: Any

    def init(self, num_tasks: int, params: PyTree | None = None) -> CrMogmState:
        return CrMogmState(self.base.init(num_tasks, params), jnp.zeros(num_tasks), jnp.zeros(num_tasks, bool))

    def weigh(
        self,
        gramian: Float[Array, "..."] | None,
        losses: Float[Array, " task"],
        state: CrMogmState,
        key: PRNGKeyArray | None,
        *,
        active: Bool[Array, " task"] | None = None,
    ) -> tuple[Float[Array, " task"], CrMogmState]:
        active = jnp.ones(losses.shape, bool) if active is None else active
        weights, base = self.base.weigh(gramian, losses, state.base, key, active=active)
        averaged = self.alpha * state.average + (1 - self.alpha) * weights
        average = jnp.where(active, jnp.where(state.started, averaged, weights), state.average)
        state = CrMogmState(base, average.astype(state.average.dtype), state.started | active)
        return jnp.where(active, average, 0).astype(weights.dtype), state
