"""PE-LTR: a short combination of the gradients with a lower bound on every task's weight."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from mtl_jax.balancing.base import Balancer, NoState, TaskLike, register
from mtl_jax.balancing.options import PerTask, by_position, checked, vector
from mtl_jax.balancing.solvers import gramian_eigenpairs, simplex_projection
from mtl_jax.errors import ConfigError


def pe_ltr(*, min_weight: PerTask = 0.0) -> Balancer:
    r"""Pareto-efficient weights with lower bounds c: the shortest combination whose weights sum to 1, of any sign,

    .. math::
        \hat w = \arg\min_{1^\top x = 1 - 1^\top c} \lVert J^\top (x + c) \rVert^2
        \qquad w = c + \Pi_{\{x \ge 0,\, 1^\top x = 1 - 1^\top c\}} \hat w

    and the nearest admissible weights to it; where there are several, the x of least length.

    Args:
      min_weight: c >= 0 with a sum below 1; one number, one per task, or by task name.

    Returns:
      A balancer that needs the Gramian and has no state.

    Raises:
      ConfigError: A bound is negative, they sum to 1 or more, or do not fit the tasks.

    Example:
      >>> import jax.numpy as jnp
      >>> import numpy as np
      >>> from mtl_jax.balancing import aggregate, pe_ltr
      >>> balancer = pe_ltr(min_weight=[0.0, 0.7])
      >>> direction, _ = aggregate(balancer, jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]), balancer.init(2))
      >>> print(np.asarray(direction).round(3))
      [3. 1. 1.]

    Edge cases:
      ===================================== ======================================================
      one task                              its own gradient
      c = 0 and no negative weight          MGDA
      an inactive task                      weight 0; its bound is not handed to the others
      0 is a combination with weights sum 1 :math:`\hat w` is the one nearest to c, then projected
      ===================================== ======================================================

    References:
      Lin, Chen, Pei, Sun, Xiao, Sun, He, Ou, Jiang, *A Pareto-Efficient Algorithm for Multiple Objective Optimization
      in E-Commerce Recommendation*, RecSys 2019. As in the paper, the relaxed solution is projected, not solved again.
    """
    min_weight = checked(min_weight, "pe_ltr(min_weight)", at_least=0.0, at_most=1.0)
    _check_total(list(min_weight.values()) if isinstance(min_weight, Mapping) else min_weight)
    return PELTR(min_weight)


@register
@dataclasses.dataclass(frozen=True)
class PELTR(Balancer):
    min_weight: Any

    needs: ClassVar = "gramian"
    scaling: ClassVar = "mean"

    def init(self, num_tasks: int, params: PyTree | None = None) -> NoState:
        self._bounds(num_tasks)
        return NoState()

    def for_tasks(self, tasks: Sequence[TaskLike]) -> Balancer:
        min_weight = by_position(self.min_weight, [task.name for task in tasks], "pe_ltr(min_weight)")
        bound = dataclasses.replace(super().for_tasks(tasks), min_weight=min_weight)
        bound._bounds(len(tasks))
        return bound

    def weigh(
        self,
        gramian: Float[Array, "task task"],
        losses: Float[Array, " task"],
        state: NoState,
        key: PRNGKeyArray | None,
        *,
        active: Bool[Array, " task"] | None = None,
    ) -> tuple[Float[Array, " task"], NoState]:
        bounds = self._bounds(losses.shape[0]).astype(gramian.dtype)
        present = jnp.ones(losses.shape, bool) if active is None else active
        bounds = jnp.where(present, bounds, 0)
        free = 1 - jnp.sum(bounds)
        relaxed = nearest_affine(gramian, bounds, present) - bounds
        return bounds + simplex_projection(relaxed, free, present), state

    def _bounds(self, num_tasks):
        bounds = vector(self.min_weight, num_tasks, "pe_ltr(min_weight)")
        _check_total(bounds)
        return bounds


def _check_total(bounds):
    """Raises a ConfigError where known bounds leave nothing to distribute; traced ones pass."""
    if not isinstance(bounds, jax.core.Tracer) and (total := float(np.sum(bounds))) >= 1:
        raise ConfigError(f"pe_ltr(min_weight) sums to {total:g}; expected less than 1. Lower the bounds")


@jax.jit
def nearest_affine(
    gramian: Float[Array, "task task"], bounds: Float[Array, " task"], active: Bool[Array, " task"]
) -> Float[Array, " task"]:
    r"""Weights of any sign with sum 1 and least :math:`w^\top G w`; of several, those nearest to ``bounds``."""
    highest = jax.lax.Precision.HIGHEST
    values, vectors, kept = gramian_eigenpairs(gramian, active)
    present = active.astype(gramian.dtype)
    null = jnp.where(kept, 0, vectors)
    sums = jnp.matmul(present, vectors, precision=highest)
    inverse = jnp.where(kept, sums / jnp.where(kept, values, 1), 0)
    shortest = jnp.matmul(vectors, inverse, precision=highest)
    shortest = shortest / jnp.where(jnp.sum(shortest) > 0, jnp.sum(shortest), 1)
    # The part of 1 among the null combinations: if there is one, 0 can be reached with a sum of 1.
    offset = jnp.where(active, jnp.matmul(null, jnp.where(kept, 0, sums), precision=highest), 0)
    among_null = jnp.where(active, jnp.matmul(null, jnp.matmul(bounds, null, precision=highest), precision=highest), 0)
    total = jnp.sum(offset)
    reachable = total > jnp.sqrt(jnp.finfo(gramian.dtype).eps) * jnp.sum(present)
    null_weights = among_null + offset * (1 - jnp.sum(among_null)) / jnp.where(reachable, total, 1)
    return jnp.where(reachable, null_weights, shortest + among_null)
