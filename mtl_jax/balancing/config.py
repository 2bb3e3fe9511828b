"""ConFIG: a direction with the same cosine to every task's gradient, as long as their projections add up to."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from mtl_jax.balancing.base import Balancer, NoState, TaskLike, register
from mtl_jax.balancing.options import PerTask, by_position, checked, vector
from mtl_jax.balancing.solvers import cosine_eigenpairs, scaled


def config(*, preference: PerTask = 1.0) -> Balancer:
    r"""Conflict-free inverse gradients: with the unit gradients as rows of :math:`U = D^{-1} J`,

    .. math::
        b = U^+ p \qquad \hat u = \frac{b}{\lVert b \rVert} \qquad d = \Bigl(\sum_i g_i^\top \hat u\Bigr) \hat u

    so that for independent gradients :math:`\hat u^\top g_i / \lVert g_i \rVert` is in proportion to p. As
    :math:`b = J^\top D^{-1} R^+ p` with the cosines R, the Gramian suffices.

    Args:
      preference: p >= 0, the cosines' proportions; one number, one per task, or by task name.

    Returns:
      A balancer that needs the Gramian and has no state.

    Raises:
      ConfigError: A preference is negative, or they do not fit the tasks.

    Example:
      >>> import jax.numpy as jnp
      >>> import numpy as np
      >>> from mtl_jax.balancing import aggregate, config
      >>> balancer = config()
      >>> direction, _ = aggregate(balancer, jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]), balancer.init(2))
      >>> print(np.asarray(direction).round(4))
      [0.1588 2.0706 2.0706]

    Edge cases:
      ======================= =============================================================
      one task                its own gradient
      dependent gradients     the pseudo-inverse: cosines as close to p as they can be
      two opposite gradients  0
      ======================= =============================================================

    References:
      Liu, Chu, Thuerey, *ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks*, ICLR 2025,
      `arXiv:2408.11104 <https://arxiv.org/abs/2408.11104>`_. The authors invert U itself; the result is the same.
    """
    return Config(checked(preference, "config(preference)", at_least=0.0))


@jax.jit
def conflict_free_weights(
    gramian: Float[Array, "task task"], preference: Float[Array, " task"], active: Bool[Array, " task"] | None = None
) -> Float[Array, " task"]:
    """The weights for one preference a task."""
    cosines, norms, inverse_norms, _ = scaled(gramian, active)
    preference = jnp.where(norms > 0, preference, 0)
    values, vectors, kept = cosine_eigenpairs(cosines)
    highest = jax.lax.Precision.HIGHEST
    coefficients = jnp.matmul(preference, vectors, precision=highest)
    # What of p lies outside of the range of R is rounding, and dividing by its length would make a direction of it. An
    # eigenvector turns towards those of 0 by rounding over its eigenvalue: if all of p is no more than that, it is 0.
    rounding = 4 * norms.shape[0] * jnp.finfo(norms.dtype).eps * jnp.linalg.norm(preference)
    kept &= jnp.abs(coefficients) > rounding
    kept &= jnp.any(kept & (jnp.abs(coefficients) * values > rounding * values[0]))
    shares = jnp.where(kept, coefficients / jnp.where(kept, values, 1), 0)
    solution = jnp.matmul(vectors, shares, precision=highest)
    projections = jnp.matmul(vectors, jnp.where(kept, coefficients, 0), precision=highest)
    squared = jnp.sum(coefficients * shares)
    length = jnp.dot(norms, projections, precision=highest) / jnp.where(squared > 0, squared, 1)
    return length * inverse_norms * solution


@register
@dataclasses.dataclass(frozen=True)
class Config(Balancer):
    preference: Any

    needs: ClassVar = "gramian"
    scaling: ClassVar = "sum"

    def init(self, num_tasks: int, params: PyTree | None = None) -> NoState:
        vector(self.preference, num_tasks, "config(preference)")
        return NoState()

    def for_tasks(self, tasks: Sequence[TaskLike]) -> Balancer:
        preference = by_position(self.preference, [task.name for task in tasks], "config(preference)")
        return dataclasses.replace(super().for_tasks(tasks), preference=preference)

    def weigh(
        self,
        gramian: Float[Array, "task task"],
        losses: Float[Array, " task"],
        state: NoState,
        key: PRNGKeyArray | None,
        *,
        active: Bool[Array, " task"] | None = None,
    ) -> tuple[Float[Array, " task"], NoState]:
        preference = vector(self.preference, losses.shape[0], "config(preference)").astype(gramian.dtype)
        return conflict_free_weights(gramian, preference, active), state
