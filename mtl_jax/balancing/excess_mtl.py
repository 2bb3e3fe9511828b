"""ExcessMTL: tasks far from their optimum gain weight, noisy ones do not."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from mtl_jax.balancing.base import Balancer, register
from mtl_jax.balancing.options import checked, checked_count
from mtl_jax.balancing.rows import combine_rows, zeros_per_task


def excess_mtl(*, eta: float = 0.01, num_warmup: int = 1) -> Balancer:
    r"""Excess risks. How far the loss of a task can still fall is estimated to second order, with the squared gradients
    so far for a Hessian, and the weights follow that, relative to where it started, by multiplicative updates:

    .. math::
        s_i \leftarrow s_i + g_i \odot g_i
        \qquad e_i = \sum_p \frac{g_{ip}^2}{\sqrt{s_{ip}}}
        \qquad \log p_i \leftarrow \log p_i + \eta\, \frac{e_i}{e_i^0}
        \qquad w = \operatorname{softmax}(\log p)

    In its first ``num_warmup`` steps a task keeps its weight, and the mean of its e becomes :math:`e^0`.

    Args:
      eta: :math:`\eta \ge 0`, the step of the weights.
      num_warmup: Steps that measure :math:`e^0`, at least 1; the paper takes three epochs.

    Returns:
      A balancer that needs the Jacobian; its state is s, one entry for each task and parameter, log p and
      :math:`e^0`, and ``weights``, what each task weighed when it last was in a step, which are those of the parameters
      outside of the scope, too.

    Raises:
      ConfigError: An option is out of its range.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtl_jax.balancing import aggregate, excess_mtl
      >>> balancer = excess_mtl(eta=1.0)
      >>> state = balancer.init(2, jnp.zeros(2))
      >>> for length in (1.0, 3.0):  # the first task moves away from its optimum
      ...     direction, state = aggregate(balancer, jnp.array([[length, 0.0], [0.0, 1.0]]), state)
      ...     print(state.weights.round(2))
      [0.5 0.5]
      [0.89 0.11]

    Edge cases:
      ======================= =====================================================================
      an entry that was 0 so far adds nothing to e
      an inactive task        keeps s, p and :math:`e^0`; the others share what they had together
      very long gradients     finite: e counts relative to :math:`e^0`, p is kept by its logarithm
      ======================= =====================================================================

    References:
      He, Zhou, Zhang, Hadjis, Zhao, *Robust Multi-Task Learning with Excess Risks*, ICML 2024,
      `arXiv:2402.02009 <https://arxiv.org/abs/2402.02009>`_. In public code :math:`e^0` is missing in the first steps,
      so that :math:`e^{\eta e}` overflows, or the weights sum to T.
    """
    eta = checked(eta, "excess_mtl(eta)", at_least=0.0)
    return ExcessMtl(eta, checked_count(num_warmup, "excess_mtl(num_warmup)", at_least=1))


class ExcessMtlState(NamedTuple):
    """s, log p, :math:`e^0`, the steps of each task, and what it weighed in the last of them."""

    squares: PyTree[Float[Array, "task ..."]]
    log_shares: Float[Array, " task"]
    baseline: Float[Array, " task"]
    steps: Int[Array, " task"]
    weights: Float[Array, " task"]


@register
@dataclasses.dataclass(frozen=True)
class ExcessMtl(Balancer):
    eta: Any
    num_warmup: int = dataclasses.field(metadata={"static": True})

    needs: ClassVar = "jacobian"
    has_parameter_state: ClassVar = True
    scaling: ClassVar = "mean"

    def init(self, num_tasks: int, params: PyTree | None = None) -> ExcessMtlState:
        equal = jnp.full(num_tasks, 1 / num_tasks, float)  # typed, as later states are
        steps = jnp.zeros(num_tasks, jnp.int32)
        return ExcessMtlState(zeros_per_task(params, num_tasks), jnp.log(equal), jnp.zeros(num_tasks), steps, equal)

    def weights_outside(self, losses: Float[Array, " task"], state: ExcessMtlState) -> Float[Array, " task"]:
        return state.weights

    def combine(
        self,
        jacobian: PyTree[Float[Array, "task ..."]],
        losses: Float[Array, " task"],
        state: ExcessMtlState,
        key: PRNGKeyArray | None,
        *,
        active: Bool[Array, " task"] | None = None,
    ) -> tuple[PyTree[Float[Array, "..."]], ExcessMtlState]:
        active = jnp.ones(losses.shape, bool) if active is None else active
        squares = jax.tree.map(_add_squares, state.squares, jacobian)
        excess = sum(map(_excess, jax.tree.leaves(jacobian), jax.tree.leaves(squares)))
        warm = state.steps < self.num_warmup
        baseline = state.baseline + (excess - state.baseline) / (state.steps + 1)
        baseline = jnp.where(warm, baseline, state.baseline)
        risks = jnp.where(warm | (baseline <= 0), 0, excess / jnp.where(baseline > 0, baseline, 1))

        moved = state.log_shares + self.eta * risks
        # What the active tasks had together they have together still.
        lost = jax.nn.logsumexp(moved, where=active) - jax.nn.logsumexp(state.log_shares, where=active)
        weights = jax.nn.softmax(moved, where=active)
        new = ExcessMtlState(squares, moved - lost, baseline, state.steps + 1, weights)
        new = jax.tree.map(lambda a, b: jnp.where(_per_task(active, a), a, b).astype(b.dtype), new, state)
        return combine_rows(jnp.where(active, weights, 0), jacobian), new


def _per_task(values, leaf):
    return values.reshape(-1, *[1] * (leaf.ndim - 1))


def _add_squares(squares, rows):
    rows = rows.astype(squares.dtype)
    return squares + rows * rows


def _excess(rows, squares):
    """Sum of g^2 / sqrt(s), as |g| times a ratio of at most 1: the square alone may underflow."""
    rows = jnp.abs(rows.astype(squares.dtype))
    ratios = jnp.where(squares > 0, rows / jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0)
    return jnp.sum((rows * ratios).reshape(len(rows), -1), axis=1)
