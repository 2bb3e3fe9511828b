"""DB-MTL: logarithms balance the losses, and a common length the gradients."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from mtl_jax.balancing.base import Balancer, only_active_rows, register
from mtl_jax.balancing.options import checked
from mtl_jax.balancing.rows import combine_rows, follow, squared_row_norms, zeros_per_task

EPSILON = 1e-8  # the paper's, next to a loss


def db_mtl(*, beta: float = 0.9, sigma: float = 0.0) -> Balancer:
    r"""Dual balancing. The gradients of log losses are averaged over the steps, and given the length of the longest:

    .. math::
        \hat g_i = \frac{g_i}{L_i + 10^{-8}}
        \qquad y_i \leftarrow \beta_t y_i + (1 - \beta_t)\, \hat g_i
        \qquad d = \sum_i \frac{\max_j \lVert y_j \rVert}{\lVert y_i \rVert}\, y_i

    with :math:`\beta_t = \beta / t^\sigma` in step t = 1, 2, ... and y = 0 at first.

    Args:
      beta: :math:`\beta` in [0, 1], how much of the average stays; 0 has no average.
      sigma: :math:`\sigma \ge 0`, how fast that falls.

    Returns:
      A balancer that needs the Jacobian and the losses; its state is y, one entry for each task and parameter, and t.

    Raises:
      ConfigError: An option is out of its range.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtl_jax.balancing import aggregate, db_mtl
      >>> balancer = db_mtl(beta=0.0)
      >>> state = balancer.init(2, jnp.zeros(3))
      >>> jacobian = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> direction, _ = aggregate(balancer, jacobian, state, losses=[0.5, 2.0])
      >>> print(direction.round(4))  # both gradients as long as 2 g_1
      [0.259  3.3765 3.3765]

    Edge cases:
      ======================= ==========================================================
      a loss of zero          its gradient times 1e8
      a loss below zero       a non-finite step: it has no logarithm
      the first step          1 - beta times as long as without an average: no correction
      an inactive task        keeps its y, which has no part in the step
      ======================= ==========================================================

    References:
      Lin, Jiang, Ye, Zhang, Chen, Chen, Liu, Kwok, *Dual-Balancing for Multi-Task Learning*, 2023,
      `arXiv:2308.12029 <https://arxiv.org/abs/2308.12029>`_. As in the paper the average starts at 0 and is not
      corrected for it.
    """
    return DbMtl(
        checked(beta, "db_mtl(beta)", at_least=0.0, at_most=1.0), checked(sigma, "db_mtl(sigma)", at_least=0.0)
    )


class DbMtlState(NamedTuple):
    """y, and the number of steps."""

    average: PyTree[Float[Array, "task ..."]]
    steps: Int[Array, ""]


@register
@dataclasses.dataclass(frozen=True)
class DbMtl(Balancer):
    beta: Any
    sigma: Any

    needs: ClassVar = "jacobian"
    reads_losses: ClassVar = True
    has_parameter_state: ClassVar = True
    scaling: ClassVar = "sum"

    def init(self, num_tasks: int, params: PyTree | None = None) -> DbMtlState:
        return DbMtlState(zeros_per_task(params, num_tasks), jnp.zeros((), jnp.int32))

    def head_weights(
        self, weights: Float[Array, " task"], losses: Float[Array, " task"], state: DbMtlState
    ) -> Float[Array, " task"]:
        return 1 / (losses + EPSILON)

    def combine(
        self,
        jacobian: PyTree[Float[Array, "task ..."]],
        losses: Float[Array, " task"],
        state: DbMtlState,
        key: PRNGKeyArray | None,
        *,
        active: Bool[Array, " task"] | None = None,
    ) -> tuple[PyTree[Float[Array, "..."]], DbMtlState]:
        active = jnp.ones(losses.shape, bool) if active is None else active
        steps = state.steps + 1
        kept = self.beta / steps.astype(losses.dtype) ** self.sigma
        factors = jnp.where(losses < 0, jnp.nan, self.head_weights(losses, losses, state))
        average = follow(state.average, jacobian, (1 - kept) * factors, kept, active)

        present = only_active_rows(average, active)
        lengths = jnp.sqrt(squared_row_norms(present))
        weights = jnp.where(lengths > 0, jnp.max(lengths) / jnp.where(lengths > 0, lengths, 1), 0)
        # Weights that are not finite have to leave a trace, and where() above hides it.
        weights = jnp.where(jnp.all(jnp.isfinite(factors), where=active), weights, jnp.nan)
        direction = combine_rows(weights, present)
        direction = jax.tree.map(lambda leaf, rows: leaf.astype(rows.dtype), direction, jacobian)
        return direction, DbMtlState(average, steps)
