"""Aligned-MTL: the nearest system of task gradients that are orthogonal and equally long."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from mtl_jax.balancing.base import Balancer, NoState, TaskLike, register
from mtl_jax.balancing.options import PerTask, by_position, checked, vector
from mtl_jax.balancing.solvers import gramian_eigenpairs
from mtl_jax.errors import ConfigError

SCALE_MODES = ("min", "median", "rmse")


def aligned_mtl(*, scale_mode: str = "min", preference: PerTask = 1.0) -> Balancer:
    r"""Independent component alignment: with the eigenpairs :math:`G = V \Lambda V^\top`,

    .. math:: w = B p \qquad B = \sqrt{s}\, V \Lambda^{-1/2} V^\top \qquad d = \sum_i w_i g_i

    The rows of BJ span what the gradients do, with condition number 1: no component dominates or conflicts.

    Args:
      scale_mode: s: the ``min`` or the lower ``median`` of the eigenvalues, or their mean (``rmse``).
      preference: p >= 0; one number, one per task, or by task name. 1 is the sum of the aligned gradients.

    Returns:
      A balancer that needs the Gramian and has no state.

    Raises:
      ConfigError: ``scale_mode`` is none of the three, a preference is negative, or they do not fit the tasks.

    Example:
      >>> import jax.numpy as jnp
      >>> import numpy as np
      >>> from mtl_jax.balancing import aggregate, aligned_mtl
      >>> balancer = aligned_mtl()
      >>> direction, _ = aggregate(balancer, jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]), balancer.init(2))
      >>> print(np.asarray(direction).round(3))
      [0.427 1.935 1.935]

    Edge cases:
      ================================ ===============================================================
      one task                         its own gradient times p
      orthogonal gradients, one length w = p
      dependent gradients              the null components are left out, of the minimum too
      ================================ ===============================================================

    References:
      Senushkin, Patakin, Kuznetsov, Konushin, *Independent Component Alignment for Multi-Task Learning*, CVPR 2023,
      `arXiv:2305.19000 <https://arxiv.org/abs/2305.19000>`_. Sums, as the official code; others take the mean. The rank
      is that of the cosines, so that a task with a short gradient is not taken for a dependent one.
    """
    if scale_mode not in SCALE_MODES:
        raise ConfigError(f"aligned_mtl(scale_mode) is '{scale_mode}'; expected one of {list(SCALE_MODES)}. Set one")
    return AlignedMTL(scale_mode, checked(preference, "aligned_mtl(preference)", at_least=0.0))


@register
@dataclasses.dataclass(frozen=True)
class AlignedMTL(Balancer):
    scale_mode: str = dataclasses.field(metadata={"static": True})
    preference: Any

    needs: ClassVar = "gramian"
    scaling: ClassVar = "sum"

    def init(self, num_tasks: int, params: PyTree | None = None) -> NoState:
        vector(self.preference, num_tasks, "aligned_mtl(preference)")
        return NoState()

    def for_tasks(self, tasks: Sequence[TaskLike]) -> Balancer:
        preference = by_position(self.preference, [task.name for task in tasks], "aligned_mtl(preference)")
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
        preference = vector(self.preference, losses.shape[0], "aligned_mtl(preference)").astype(gramian.dtype)
        preference = preference if active is None else jnp.where(active, preference, 0)
        values, vectors, kept = gramian_eigenpairs(gramian, active)
        rank = jnp.maximum(jnp.sum(kept), 1)
        # Descending: the smallest kept is number rank - 1, the lower median number rank // 2.
        scale = {
            "min": lambda: values[rank - 1],
            "median": lambda: values[rank // 2],
            "rmse": lambda: jnp.sum(jnp.where(kept, values, 0)) / rank,
        }[self.scale_mode]()
        stretch = jnp.where(kept, jnp.sqrt(scale / jnp.where(kept, values, 1)), 0)
        highest = jax.lax.Precision.HIGHEST
        coefficients = stretch * jnp.matmul(preference, vectors, precision=highest)
        return jnp.matmul(vectors, coefficients, precision=highest), state
