"""UPGrad: each gradient, projected so that it harms no task, then their sum."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from mtl_jax.balancing.base import Balancer, TaskLike, num_active, register
from mtl_jax.balancing.options import PerTask, by_position, checked, vector
from mtl_jax.balancing.solvers import SolverState, dual_cone, solver_diagnostics, solver_state


def upgrad(*, preference: PerTask | None = None, reg_eps: float = 0.0) -> Balancer:
    r"""Unconflicting projection of gradients: every :math:`u_i g_i` is projected onto the cone of directions that
    conflict with no gradient, and the projections are summed:

    .. math::
        w = \sum_i \arg\min_{v \ge u_i e_i} v^\top \Bigl(\frac{G}{\mathrm{tr}\, G} + \epsilon I\Bigr) v
        \qquad d = \sum_i w_i g_i

    so that :math:`g_i^\top d \ge 0` for every task. It is linear in positive factors of the gradients.

    Args:
      preference: u >= 0; one number, one per task, or by task name. None is 1 / number of tasks, the mean.
      reg_eps: :math:`\epsilon \ge 0`, relative to the trace of the Gramian; above 0 a conflict of that order stays.

    Returns:
      A balancer that needs the Gramian; its state is the latest solve.

    Raises:
      ConfigError: An option is out of its range, or does not fit the tasks.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtl_jax.balancing import aggregate, upgrad
      >>> balancer = upgrad()
      >>> direction, _ = aggregate(balancer, jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]), balancer.init(2))
      >>> print(direction.round(4))
      [0.2924 1.9006 1.9006]

    Edge cases:
      ======================= ============================================================
      one task                its gradient times u
      no conflict             w = u
      two opposite gradients  0
      dependent gradients     w is not unique, the direction is
      ======================= ============================================================

    References:
      Quinton, Rey, *Jacobian Descent for Multi-Objective Optimization*, 2024,
      `arXiv:2406.16232 <https://arxiv.org/abs/2406.16232>`_. The authors' library adds 1e-4 to the diagonal, and takes
      the Gramian for 0, which gives the mean, where its trace is below 1e-4; here nothing is added by default and
      there is no absolute threshold.
    """
    if preference is not None:
        preference = checked(preference, "upgrad(preference)", at_least=0.0)
    return UPGrad(preference, checked(reg_eps, "upgrad(reg_eps)", at_least=0.0))


@register
@dataclasses.dataclass(frozen=True)
class UPGrad(Balancer):
    preference: Any
    reg_eps: Any

    needs: ClassVar = "gramian"
    scaling: ClassVar = "mean"

    def init(self, num_tasks: int, params: PyTree | None = None) -> SolverState:
        if self.preference is not None:
            vector(self.preference, num_tasks, "upgrad(preference)")
        return solver_state()

    def for_tasks(self, tasks: Sequence[TaskLike]) -> Balancer:
        bound = super().for_tasks(tasks)
        if self.preference is None:
            return bound
        names = [task.name for task in tasks]
        return dataclasses.replace(bound, preference=by_position(self.preference, names, "upgrad(preference)"))

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
        preference = vector(given, num_tasks, "upgrad(preference)").astype(gramian.dtype)
        solved = dual_cone(gramian, jnp.diag(preference), self.reg_eps, active)
        return jnp.sum(solved.value, axis=0), solver_state(solved)

    def diagnostics(self, state: SolverState) -> dict[str, Float[Array, ""]]:
        return solver_diagnostics(state)
