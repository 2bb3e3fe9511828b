"""FairGrad: alpha-fair shares of the improvement."""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from mtl_jax.balancing.base import Balancer, num_active, register
from mtl_jax.balancing.options import checked
from mtl_jax.balancing.solvers import SolverState, power_fixed_point, solver_diagnostics, solver_state


def fairgrad(*, alpha: float = 1.0, reg_eps: float | None = None) -> Balancer:
    r"""The direction of an alpha-fair allocation of the rates :math:`g_i^\top d` at which the tasks improve:

    .. math:: G w = w^{-1/\alpha} \qquad d = \sum_i w_i g_i \qquad g_i^\top d = w_i^{-1/\alpha} > 0

    Args:
      alpha: :math:`\alpha \ge 0`: 0 is the mean of the gradients, 1 proportional fairness (Nash bargaining), towards
        infinity the worst task decides and the direction is that of MGDA.
      reg_eps: Added to the diagonal of the cosines, >= 0; bounds the weights where the gradients cancel. None is 1e-6
        in float32 and 0 in float64.

    Returns:
      A balancer that needs the Gramian; its state is the latest solve.

    Raises:
      ConfigError: An option is out of its range.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtl_jax.balancing import aggregate, fairgrad
      >>> balancer = fairgrad(alpha=2.0)
      >>> direction, _ = aggregate(balancer, jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]), balancer.init(2))
      >>> print(direction.round(3))
      [0.031 0.791 0.791]

    Edge cases:
      ============================== =========================================================================
      one task                       :math:`w = \lVert g \rVert^{-2\alpha/(1+\alpha)}`
      0 in the hull of the gradients weights up to ``reg_eps`` to the power -1/2, counted as a miss of the solver
      alpha below 0.2 or above 20    slow where lengths differ by 1000: the solver may miss its tolerance
      ============================== =========================================================================

    References:
      Ban, Ji, *Fair Resource Allocation in Multi-Task Learning*, ICML 2024,
      `arXiv:2402.15638 <https://arxiv.org/abs/2402.15638>`_. Solved by Newton on a convex objective. The official code
      minimises squared residuals from a given start, multiplies by the number of tasks and clips the length at 1. The
      direction is homogeneous of degree (1 - alpha) / (1 + alpha): with alpha = 1 the length of the gradients is lost.
    """
    alpha = checked(alpha, "fairgrad(alpha)", at_least=0.0)
    return FairGrad(alpha, reg_eps if reg_eps is None else checked(reg_eps, "fairgrad(reg_eps)", at_least=0.0))


@register
@dataclasses.dataclass(frozen=True)
class FairGrad(Balancer):
    alpha: Any
    reg_eps: Any

    needs: ClassVar = "gramian"

    @property
    def homogeneity(self) -> float:
        return (1 - self.alpha) / (1 + self.alpha)

    def init(self, num_tasks: int, params: PyTree | None = None) -> SolverState:
        return solver_state()

    def weigh(
        self,
        gramian: Float[Array, "task task"],
        losses: Float[Array, " task"],
        state: SolverState,
        key: PRNGKeyArray | None,
        *,
        active: Bool[Array, " task"] | None = None,
    ) -> tuple[Float[Array, " task"], SolverState]:
        alpha = jnp.asarray(self.alpha, gramian.dtype)
        present = jnp.ones(losses.shape, bool) if active is None else active
        mean = present / num_active(active, losses.shape[0])
        solved = power_fixed_point(gramian, jnp.where(alpha > 0, alpha, 1), self.reg_eps, active)
        return jnp.where(alpha > 0, solved.value, mean).astype(losses.dtype), solver_state(solved)

    def diagnostics(self, state: SolverState) -> dict[str, Float[Array, ""]]:
        return solver_diagnostics(state)
