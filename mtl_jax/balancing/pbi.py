"""Penalty-based boundary intersection: go down along a ray of preference, and stay near it."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from mtl_jax.balancing.base import Balancer, TaskLike, register
from mtl_jax.balancing.cosmos import (
    NegativeWeights,
    count_negative,
    preferences,
    preferences_by_position,
    unit_and_length,
)
from mtl_jax.balancing.options import PerTask, by_position, checked, vector

# Of the length of the losses: how near the ray its distance is rounded off, so that it has a gradient there.
SMOOTHING = 1e-6


def pbi(*, theta: float = 5.0, preference: PerTask | None = None, reference: PerTask = 0.0) -> Balancer:
    r"""The distance to the reference point z along the ray of the preference r, and :math:`\theta` times that to the ray:

    .. math::
        O = d_1 + \theta d_2
        \qquad d_1 = (L - z)^\top \hat r
        \qquad d_2 = \lVert p \rVert, \quad p = L - z - d_1 \hat r
        \qquad w = \hat r + \theta \frac{p}{d_2}

    with the unit vector :math:`\hat r`. In the formulas of :math:`O` and w, :math:`d_2` is
    :math:`\sqrt{\lVert p \rVert^2 + (10^{-6} \lVert L \rVert)^2}`, which is smooth on the ray. Weights may be negative,
    and are used as they are.

    Args:
      theta: :math:`\theta \ge 0`.
      preference: :math:`r \ge 0`, one number, one per task, or by task name; None is :math:`1/T_a`, over the tasks with
        labels in the batch. Its length does not matter.
      reference: :math:`z`, the losses at best; given like ``preference``.

    Returns:
      A balancer that needs one backward pass and the losses; its state is a diagnostic, ``negative_weights``.

    Raises:
      ConfigError: An option is out of its range, or does not fit the tasks.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtl_jax.balancing import aggregate, pbi
      >>> jacobian, balancer = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]), pbi()
      >>> direction, state = aggregate(balancer, jacobian, balancer.init(2), losses=[0.5, 2.0])
      >>> print(direction.round(4), state.negative_weights)
      [36.7696  1.4142  1.4142] 1

    Edge cases:
      ========================= =======================================
      :math:`\theta = 0`        a weighted sum, :math:`w = \hat r`
      losses on the ray         :math:`w = \hat r`, to about :math:`0.1\,\theta` in float32
      all losses zero, as z     :math:`w = \hat r`
      one task                  its own gradient, as the ray is all there is
      ========================= =======================================

    References:
      Zhang, Li, *MOEA/D: A Multiobjective Evolutionary Algorithm Based on Decomposition*, IEEE Transactions on
      Evolutionary Computation 11(6), 2007, `doi:10.1109/TEVC.2007.892759 <https://doi.org/10.1109/TEVC.2007.892759>`_.
      There objectives are maximised, and solutions compared without gradients; the smoothing is ours.
    """
    preference = preference if preference is None else checked(preference, "pbi(preference)", at_least=0.0)
    return Pbi(checked(theta, "pbi(theta)", at_least=0.0), preference, checked(reference, "pbi(reference)"))


@register
@dataclasses.dataclass(frozen=True)
class Pbi(Balancer):
    theta: Any
    preference: Any
    reference: Any

    needs: ClassVar = "losses"
    reads_losses: ClassVar = True

    def init(self, num_tasks: int, params: PyTree | None = None) -> NegativeWeights:
        preferences(self.preference, num_tasks, None, "pbi(preference)")
        vector(self.reference, num_tasks, "pbi(reference)")
        return NegativeWeights(jnp.zeros((), jnp.int32))

    def for_tasks(self, tasks: Sequence[TaskLike]) -> Balancer:
        preference = preferences_by_position(self.preference, tasks, "pbi(preference)")
        reference = by_position(self.reference, [task.name for task in tasks], "pbi(reference)")
        return dataclasses.replace(super().for_tasks(tasks), preference=preference, reference=reference)

    def weigh(
        self,
        gramian: Float[Array, "task task"] | None,
        losses: Float[Array, " task"],
        state: NegativeWeights,
        key: PRNGKeyArray | None,
        *,
        active: Bool[Array, " task"] | None = None,
    ) -> tuple[Float[Array, " task"], NegativeWeights]:
        active = jnp.ones(losses.shape, bool) if active is None else active
        losses = jnp.where(active, losses, 0)
        ray, _ = unit_and_length(preferences(self.preference, losses.shape[0], active, "pbi(preference)"))
        reference = vector(self.reference, losses.shape[0], "pbi(reference)")
        ray, reference = ray.astype(losses.dtype), reference.astype(losses.dtype)
        above = jnp.where(active, losses - reference, 0)
        across = above - jnp.sum(above * ray) * ray
        outward, distance = unit_and_length(across)
        _, smooth = unit_and_length(jnp.stack([distance, SMOOTHING * unit_and_length(losses)[1]]))
        away = jnp.where(smooth > 0, distance / jnp.where(smooth > 0, smooth, 1), 0) * outward
        weights = (ray + self.theta * away).astype(losses.dtype)
        return weights, NegativeWeights(count_negative(weights))

    def diagnostics(self, state: NegativeWeights) -> dict[str, Array]:
        return state._asdict()
