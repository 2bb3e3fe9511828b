"""Dual projection (GEM): the mean gradient, projected so that it harms no task."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from mtl_jax.balancing.base import Balancer, TaskLike, num_active, register
from mtl_jax.balancing.options import PerTask, by_position, checked, vector
from mtl_jax.balancing.solvers import SolverState, dual_cone, solver_diagnostics, solver_state


def dual_proj(*, preference: PerTask | None = None, reg_eps: float = 0.0) -> Balancer:
    r"""The preferred gradient :math:`J^\top u`, projected onto the cone of directions that conflict with no gradient:

    .. math::
        w = \arg\min_{v \ge u} v^\top \Bigl(\frac{G}{\mathrm{tr}\, G} + \epsilon I\Bigr) v
        \qquad d = \sum_i w_i g_i

    so that :math:`g_i^\top d \ge 0` for every task; w = u where the preferred gradient does so already.

    Args:
      preference: u >= 0; one number, one per task, or by task name. None is 1 / number of tasks, the mean.
      reg_eps: :math:`\epsilon \ge 0`, relative to the trace of the Gramian; above 0 a conflict of that order stays.

    Returns:
      A balancer that needs the Gramian; its state is the latest solve.

    Raises:
      ConfigError: An option is out of its range, or does not fit the tasks.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtl_jax.balancing import aggregate, dual_proj
      >>> balancer = dual_proj()
      >>> direction, _ = aggregate(balancer, jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]), balancer.init(2))
      >>> print(direction.round(4))
      [0.5556 1.1111 1.1111]

    Edge cases:
      ======================= ============================================================
      one task                its gradient times u
      no conflict             w = u
      two opposite gradients  0
      dependent gradients     w is not unique, the direction is
      ======================= ============================================================

    References:
      Lopez-Paz, Ranzato, *Gradient Episodic Memory for Continual Learning*, NeurIPS 2017,
      `arXiv:1706.08840 <https://arxiv.org/abs/1706.08840>`_: its quadratic program with all tasks as constraints. Public
      code adds 1e-4 to the diagonal, and takes the Gramian for 0 where its trace is below 1e-4; here nothing is added
      by default and there is no absolute threshold.
    """
    if preference is not None:
        preference = checked(preference, "dual_proj(preference)", at_least=0.0)
    return DualProj(preference, checked(reg_eps, "dual_proj(reg_eps)", at_least=0.0))


@register
@dataclasses.dataclass(frozen=True)
class DualProj(Balancer):
    preference: Any
    reg_eps: Any

    needs: ClassVar = "gramian"
    scaling: ClassVar = "mean"

    def init(self, num_tasks: int, params: PyTree | None = None) -> SolverState:
        if self.preference is not None:
            vector(self.preference, num_tasks, "dual_proj(preference)")
        return solver_state()

    def for_tasks(self, tasks: Sequence[TaskLike]) -> Balancer:
        bound = super().for_tasks(tasks)
        if self.preference is None:
            return bound
        names = [task.name for task in tasks]
        return dataclasses.replace(bound, preference=by_position(self.preference, names, "dual_proj(preference)"))

    def weigh(
        self,
        gramian: Float[Array, "task task"],
        losses: Float[Array, " task"],
        state: SolverState,
        key: PRNGKeyArray | None,
        *,
        active: Bool[Array, " task"] | None = None,
    ) -> tuple[Float[Array, " task"], SolverState]:
        num_tasks = losses.shape[0]
        given = 1 / num_active(active, num_tasks) if self.preference is None else self.preference
        preference = vector(given, num_tasks, "dual_proj(preference)").astype(gramian.dtype)
        solved = dual_cone(gramian, preference[None], self.reg_eps, active)
        return solved.value[0], solver_state(solved)

    def diagnostics(self, state: SolverState) -> dict[str, Float[Array, ""]]:
        return solver_diagnostics(state)
