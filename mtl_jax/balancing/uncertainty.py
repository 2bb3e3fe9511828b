"""Uncertainty weighting: each task's noise is learned, and noisy tasks count less."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from mtl_jax.balancing.base import Balancer, TaskLike, register
from mtl_jax.balancing.learnable import Learnable, adam_step, learnable
from mtl_jax.balancing.options import PerTask, by_position, checked, vector
from mtl_jax.errors import ConfigError

FACTORS = {"classification": 1.0, "regression": 0.5}
# exp(10) = 22026: a task whose loss reaches 0 would otherwise send its log variance to minus infinity.
MAX_LOG_VAR = 10.0


def uncertainty(
    *, likelihood: str | Sequence[str] | None = None, initial: PerTask = 0.0, weight_lr: float = 1e-3
) -> Balancer:
    r"""Homoscedastic uncertainty of each task, with :math:`s_i` the log of its variance:

    .. math::
        O = \sum_i c_i e^{-s_i} L_i + \tfrac12 s_i
        \qquad w_i = c_i e^{-s_i}
        \qquad \frac{\partial O}{\partial s_i} = -c_i e^{-s_i} L_i + \tfrac12

    and :math:`c_i` = 1 for a softmax or Bernoulli likelihood, 1/2 for a Gaussian one. The weights of a step are read
    before its update of s, an Adam step without weight decay; s stays in [-10, 10].

    Args:
      likelihood: ``classification`` or ``regression``, one per task or one for all. None takes it from the kinds of the
        tasks in ``for_tasks``, and is classification where only a number of tasks is known.
      initial: :math:`s` before the first step, in [-10, 10]; one number, one per task, or by task name.
      weight_lr: Learning rate of s, >= 0.

    Returns:
      A balancer that needs one backward pass and the losses; its state is s and its Adam.

    Raises:
      ConfigError: An option is out of its range, or does not fit the tasks.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtl_jax.balancing import aggregate, uncertainty
      >>> balancer = uncertainty(likelihood=["classification", "regression"])
      >>> jacobian = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> direction, state = aggregate(balancer, jacobian, balancer.init(2), losses=jnp.array([0.25, 2.0]))
      >>> print(direction, state.log_var.value.round(4))
      [-1.   1.5  1.5] [-0.001  0.001]

    Edge cases:
      ==================== ==============================================
      a loss of zero       s falls by ``weight_lr`` a step down to -10
      a negative loss      the same
      an inactive task     its s, moments and step count stay
      the stationary point :math:`e^{s_i} = 2 c_i L_i`, so :math:`w_i L_i = 1/2`
      ==================== ==============================================

    References:
      Kendall, Gal, Cipolla, *Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry and Semantics*,
      CVPR 2018, `arXiv:1705.07115 <https://arxiv.org/abs/1705.07115>`_. The paper's two factors by likelihood, from
      s = 0. Some public code uses 1/2 for all tasks, starts at -0.5, keeps s >= 0, or lets weight decay pull on s.
    """
    initial = checked(initial, "uncertainty(initial)", at_least=-MAX_LOG_VAR, at_most=MAX_LOG_VAR)
    weight_lr = checked(weight_lr, "uncertainty(weight_lr)", at_least=0.0)
    return Uncertainty(_checked_likelihood(likelihood), initial, weight_lr)


class UncertaintyState(NamedTuple):
    """``log_var.value`` is s."""

    log_var: Learnable


@register
@dataclasses.dataclass(frozen=True)
class Uncertainty(Balancer):
    likelihood: str | tuple[str, ...] | None = dataclasses.field(metadata={"static": True})
    initial: Any
    weight_lr: Any

    needs: ClassVar = "losses"
    reads_losses: ClassVar = True
    weighted_heads: ClassVar = True

    def init(self, num_tasks: int, params: PyTree | None = None) -> UncertaintyState:
        self._factors(num_tasks)
        return UncertaintyState(learnable(vector(self.initial, num_tasks, "uncertainty(initial)")))

    def for_tasks(self, tasks: Sequence[TaskLike]) -> Balancer:
        initial = by_position(self.initial, [task.name for task in tasks], "uncertainty(initial)")
        likelihood = self.likelihood
        if likelihood is None:
            likelihood = tuple("regression" if task.kind == "regression" else "classification" for task in tasks)
        bound = dataclasses.replace(super().for_tasks(tasks), likelihood=likelihood, initial=initial)
        bound._factors(len(tasks))
        return bound

    def weigh(
        self,
        gramian: Float[Array, "task task"] | None,
        losses: Float[Array, " task"],
        state: UncertaintyState,
        key: PRNGKeyArray | None,
        *,
        active: Bool[Array, " task"] | None = None,
    ) -> tuple[Float[Array, " task"], UncertaintyState]:
        log_var = state.log_var.value
        weights = self._factors(losses.shape[0]).astype(log_var.dtype) * jnp.exp(-log_var)
        moved = adam_step(state.log_var, 0.5 - weights * losses, self.weight_lr, active=active)
        moved = moved._replace(value=jnp.clip(moved.value, -MAX_LOG_VAR, MAX_LOG_VAR))
        weights = weights if active is None else jnp.where(active, weights, 0)
        return weights.astype(losses.dtype), UncertaintyState(moved)

    def _factors(self, num_tasks: int) -> Float[Array, " task"]:
        names = self.likelihood or "classification"
        return vector(jax.tree.map(FACTORS.get, names), num_tasks, "uncertainty(likelihood)")


def _checked_likelihood(likelihood):
    names = (likelihood,) if isinstance(likelihood, str) else tuple(likelihood or ())
    for name in names:
        if name not in FACTORS:
            expectation = f"expected {list(FACTORS)}"
            raise ConfigError(
                f"uncertainty(likelihood) has '{name}'; {expectation}. Leave it out to use the tasks' kinds"
            )
    return likelihood if likelihood is None or isinstance(likelihood, str) else names
