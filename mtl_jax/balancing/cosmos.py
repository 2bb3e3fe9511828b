"""COSMOS: a weighted sum that also rewards losses in the proportions of a preference."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from mtl_jax.balancing.base import Balancer, TaskLike, num_active, register
from mtl_jax.balancing.options import PerTask, by_position, checked, vector


def cosmos(*, lambda_: float = 1.0, preference: PerTask | None = None) -> Balancer:
    r"""Linear scalarisation with a penalty on the angle between the losses and the preference r:

    .. math::
        O = r^\top L - \lambda \frac{r^\top L}{\lVert r \rVert \lVert L \rVert}
        \qquad w = r - \frac{\lambda}{\lVert L \rVert} \bigl(\hat r - (\hat r^\top \hat L)\, \hat L\bigr)

    with unit vectors :math:`\hat r` and :math:`\hat L`. Weights may be negative, and are used as they are.

    Args:
      lambda_: :math:`\lambda \ge 0`.
      preference: :math:`r \ge 0`, one number, one per task, or by task name; None is :math:`1/T_a`, over the tasks with
        labels in the batch.

    Returns:
      A balancer that needs one backward pass and the losses; its state is a diagnostic, ``negative_weights``.

    Raises:
      ConfigError: An option is out of its range, or does not fit the tasks.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtl_jax.balancing import aggregate, cosmos
      >>> jacobian, balancer = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]), cosmos(lambda_=4.0)
      >>> direction, state = aggregate(balancer, jacobian, balancer.init(2), losses=[0.5, 2.0])
      >>> print(direction.round(4), state.negative_weights)
      [6.3265 0.2737 0.2737] 1

    Edge cases:
      ========================= ==================================
      :math:`\lambda = 0`       the weighted sum, w = r
      losses along r            w = r
      all losses zero           w = r
      all losses close to zero  the angle turns fast: large weights
      one task                  w = r
      ========================= ==================================

    References:
      Ruchte, Grabocka, *Scalable Pareto Front Approximation for Deep Multi-Objective Learning*, ICDM 2021,
      `arXiv:2103.13392 <https://arxiv.org/abs/2103.13392>`_. The paper draws r from a Dirichlet distribution each step
      and feeds it to the network; here it is one fixed preference.
    """
    preference = preference if preference is None else checked(preference, "cosmos(preference)", at_least=0.0)
    return Cosmos(checked(lambda_, "cosmos(lambda_)", at_least=0.0), preference)


class NegativeWeights(NamedTuple):
    """State of a method without memory whose weights may be negative: how many of the latest call were."""

    negative_weights: Int[Array, ""]


@register
@dataclasses.dataclass(frozen=True)
class Cosmos(Balancer):
    lambda_: Any
    preference: Any

    needs: ClassVar = "losses"
    reads_losses: ClassVar = True

    def init(self, num_tasks: int, params: PyTree | None = None) -> NegativeWeights:
        preferences(self.preference, num_tasks, None, "cosmos(preference)")
        return NegativeWeights(jnp.zeros((), jnp.int32))

    def for_tasks(self, tasks: Sequence[TaskLike]) -> Balancer:
        preference = preferences_by_position(self.preference, tasks, "cosmos(preference)")
        return dataclasses.replace(super().for_tasks(tasks), preference=preference)

    def weigh(
        self,
        gramian: Float[Array, "task task"] | None,
        losses: Float[Array, " task"],
        state: NegativeWeights,
        key: PRNGKeyArray | None,
        *,
        active: Bool[Array, " task"] | None = None,
    ) -> tuple[Float[Array, " task"], NegativeWeights]:
        preference = preferences(self.preference, losses.shape[0], active, "cosmos(preference)").astype(losses.dtype)
        unit_preference, _ = unit_and_length(preference)
        unit_losses, length = unit_and_length(losses if active is None else jnp.where(active, losses, 0))
        turn = unit_preference - jnp.sum(unit_preference * unit_losses) * unit_losses
        turn = jnp.where(length > 0, turn / jnp.where(length > 0, length, 1), 0)
        weights = (preference - self.lambda_ * turn).astype(losses.dtype)
        weights = weights if active is None else jnp.where(active, weights, 0)
        return weights, NegativeWeights(count_negative(weights))

    def diagnostics(self, state: NegativeWeights) -> dict[str, Array]:
        return state._asdict()


def count_negative(weights: Float[Array, " task"]) -> Int[Array, ""]:
    """How many weights ascend on their task."""
    return jnp.sum(weights < 0, dtype=jnp.int32)


def preferences(
    preference: PerTask | None, num_tasks: int, active: Bool[Array, " task"] | None, option: str
) -> Float[Array, " task"]:
    """One value per task, 0 for inactive ones; None is the mean over the active ones.

    Raises:
      ConfigError: The number of values is not that of the tasks.
    """
    if preference is None:
        values = jnp.ones(num_tasks) / num_active(active, num_tasks)
    else:
        values = vector(preference, num_tasks, option)
    return values if active is None else jnp.where(active, values, 0)


def preferences_by_position(preference: PerTask | None, tasks: Sequence[TaskLike], option: str) -> PerTask | None:
    """The preference in the order of the tasks.

    Raises:
      ConfigError: The names or the number of values are not those of the tasks.
    """
    return None if preference is None else by_position(preference, [task.name for task in tasks], option)


def unit_and_length(vector: Float[Array, " task"]) -> tuple[Float[Array, " task"], Float[Array, ""]]:
    """The vector at length 1, and its length; 0 where it is 0. Its squares need not be in the range of the type."""
    largest = jnp.max(jnp.abs(vector))
    scaled = vector / jnp.where(largest > 0, largest, 1)
    length = jnp.sqrt(jnp.sum(scaled * scaled))
    return scaled / jnp.where(length > 0, length, 1), largest * length
