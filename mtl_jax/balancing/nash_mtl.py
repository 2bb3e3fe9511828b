"""Nash-MTL: the bargaining solution, in which every task gains the same in proportion."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from mtl_jax.balancing.base import Balancer, register
from mtl_jax.balancing.options import checked
from mtl_jax.balancing.solvers import SolverState, power_fixed_point, scaled, solver_diagnostics, solver_state
from mtl_jax.errors import ConfigError


def nash_mtl(*, max_norm: float | None = 1.0, update_every: int = 1, reg_eps: float | None = None) -> Balancer:
    r"""The direction in a ball for which the product of the tasks' gains :math:`g_i^\top d` is largest:

    .. math:: G w = 1 / w \qquad d = \min\Bigl(1, \frac{m}{\lVert J^\top w \rVert}\Bigr) \sum_i w_i g_i

    At the solution :math:`\lVert J^\top w \rVert^2` is the number of tasks, whatever the gradients: with the default m
    every step has length 1, and learning rates do not carry over from other methods.

    Args:
      max_norm: m > 0; None leaves the length at the square root of the number of tasks.
      update_every: Steps from one solve to the next; in between the weights stay, and a task absent at a solve keeps
        the weight of an earlier one, 0 at first.
      reg_eps: Added to the diagonal of the cosines, >= 0; bounds the weights where the gradients cancel. None is 1e-6
        in float32 and 0 in float64.

    Returns:
      A balancer that needs the Gramian; its state is the weights, the steps since the last solve, and that solve.

    Raises:
      ConfigError: An option is out of its range.

    Example:
      >>> import jax.numpy as jnp
      >>> import numpy as np
      >>> from mtl_jax.balancing import aggregate, nash_mtl
      >>> balancer = nash_mtl()
      >>> direction, _ = aggregate(balancer, jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]), balancer.init(2))
      >>> print(np.asarray(direction).round(3))
      [0.054 0.706 0.706]

    Edge cases:
      ============================== ============================================================================
      one task                       its unit gradient (times m below 1)
      two tasks                      the bisector: :math:`w_i = 1 / (\lVert g_i \rVert \sqrt{1 + \cos(g_1, g_2)})`
      0 in the hull of the gradients weights up to ``reg_eps`` to the power -1/2, counted as a miss of the solver
      ============================== ============================================================================

    References:
      Navon, Shamsian, Achituve, Maron, Kawaguchi, Chechik, Fetaya, *Multi-Task Learning as a Bargaining Game*,
      ICML 2022, `arXiv:2202.01017 <https://arxiv.org/abs/2202.01017>`_. Solved exactly, by Newton. The published code
      runs 20 rounds of a linearised problem in a convex solver on the host, on the Gramian divided by its norm, and
      keeps the last weights where that fails.
    """
    if isinstance(update_every, bool) or not isinstance(update_every, int) or update_every < 1:
        raise ConfigError(
            f"nash_mtl(update_every) is {update_every}; expected an integer >= 1. Use 1 to solve each step"
        )
    if max_norm is not None:
        max_norm = checked(max_norm, "nash_mtl(max_norm)", at_least=1e-12)
    reg_eps = reg_eps if reg_eps is None else checked(reg_eps, "nash_mtl(reg_eps)", at_least=0.0)
    return NashMTL(max_norm, update_every, reg_eps)


class NashState(NamedTuple):
    """``weights`` of the last solve, before ``max_norm``; ``steps`` since then; the Gramian; what the solver said."""

    weights: Float[Array, " task"]
    steps: Int[Array, ""]
    products: Float[Array, "task task"]
    solver: SolverState


@register
@dataclasses.dataclass(frozen=True)
class NashMTL(Balancer):
    max_norm: Any
    update_every: int = dataclasses.field(metadata={"static": True})
    reg_eps: Any

    needs: ClassVar = "gramian"

    @property
    def homogeneity(self) -> float | None:
        return 0 if self.update_every == 1 else None

    def init(self, num_tasks: int, params: PyTree | None = None) -> NashState:
        products = jnp.zeros((num_tasks, num_tasks))
        return NashState(jnp.zeros(num_tasks), jnp.zeros((), jnp.int32), products, solver_state())

    def kept(self, state: NashState) -> tuple[Bool[Array, ""], Float[Array, "task task"]] | None:
        return None if self.update_every == 1 else (state.steps == 0, state.products)

    def weigh(
        self,
        gramian: Float[Array, "task task"],
        losses: Float[Array, " task"],
        state: NashState,
        key: PRNGKeyArray | None,
        *,
        active: Bool[Array, " task"] | None = None,
    ) -> tuple[Float[Array, " task"], NashState]:
        due = None if self.update_every == 1 else state.steps == 0
        weights, solver = solved_or_kept(gramian, self.reg_eps, active, due, state)
        known = jnp.ones(gramian.shape, bool) if active is None else active[:, None] & active
        known = known if due is None else known & due
        products = jnp.where(known, gramian, state.products).astype(state.products.dtype)
        state = NashState(weights, (state.steps + 1) % self.update_every, products, solver)
        weights = weights if active is None else jnp.where(active, weights, 0)
        return self._clipped(weights.astype(gramian.dtype), gramian, active), state

    def _clipped(self, weights, gramian, active):
        if self.max_norm is None:
            return weights
        cosines, norms, _, longest = scaled(gramian, active)
        terms = longest * norms * weights
        squared = jnp.dot(terms, jnp.matmul(cosines, terms, precision=jax.lax.Precision.HIGHEST))
        length = jnp.sqrt(jnp.maximum(squared, 0))
        return weights * jnp.where(length > self.max_norm, self.max_norm / jnp.where(length > 0, length, 1), 1)

    def diagnostics(self, state: NashState) -> dict[str, Float[Array, ""]]:
        return solver_diagnostics(state.solver)


@jax.jit
def solved_or_kept(
    gramian: Float[Array, "task task"],
    reg_eps: Any,
    active: Bool[Array, " task"] | None,
    due: Bool[Array, ""] | None,
    state: NashState,
) -> tuple[Float[Array, " task"], SolverState]:
    """New weights of the active tasks where a solve is due (None: always), else the kept ones."""

    def solve():
        solved = power_fixed_point(gramian, 1.0, reg_eps, active)
        weights = solved.value.astype(state.weights.dtype)
        return weights if active is None else jnp.where(active, weights, state.weights), solver_state(solved)

    return solve() if due is None else jax.lax.cond(due, solve, lambda: (state.weights, state.solver))
