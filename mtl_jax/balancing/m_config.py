"""M-ConFIG: conflict-free directions from averaged gradients, a few tasks a step."""

import dataclasses
import functools
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from mtl_jax.balancing.base import Balancer, only_active_rows, register
from mtl_jax.balancing.config import conflict_free_weights
from mtl_jax.balancing.options import checked, checked_count
from mtl_jax.balancing.rows import combine_rows, follow, gramian, zeros_per_task
from mtl_jax.errors import ConfigError

EPSILON = 1e-8


def m_config(*, beta_1: float = 0.9, beta_2: float = 0.999, tasks_per_call: int = 1) -> Balancer:
    r"""Conflict-free inverse gradients with momentum. In turn, ``tasks_per_call`` tasks bring their averages m up to
    date, each corrected by its own steps :math:`t_i`; once every task has one, their direction by ``config`` goes through
    Adam:

    .. math::
        m_i \leftarrow \beta_1 m_i + (1 - \beta_1)\, g_i
        \qquad \hat d = \mathrm{config}\Big( \frac{m_i}{1 - \beta_1^{t_i}} \Big)
        \qquad f_t = (1 - \beta_1^t)\, \hat d
        \qquad \hat f = \frac{f_t - \beta_1 f_{t-1}}{1 - \beta_1}

    .. math::
        s \leftarrow \beta_2 s + (1 - \beta_2)\, \hat f \odot \hat f
        \qquad d = \frac{\hat d}{\sqrt{\hat s} + \epsilon}
        \qquad \hat s = \frac{s}{1 - \beta_2^t}

    with t the number of directions so far. The steps are those of Adam already: plain SGD goes on top.

    Args:
      beta_1: :math:`\beta_1` in [0, 1), how much of the averages stays.
      beta_2: :math:`\beta_2` in [0, 1), the same for the squares.
      tasks_per_call: Tasks in turn at each step, >= 1; the gradients of the others are not read.

    Returns:
      A balancer that needs the Jacobian; its state is m, one entry for each task and parameter, f and s, one for each
      parameter, and the counts. Its direction is 0 until every task was in turn: the optimizer's step is for nothing.

    Raises:
      ConfigError: An option is out of its range, or there are fewer tasks than ``tasks_per_call``.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtl_jax.balancing import aggregate, m_config
      >>> balancer = m_config()
      >>> jacobian = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> state = balancer.init(2, jnp.zeros(3))
      >>> for rows in (jacobian, jacobian, jacobian.at[0].set(jnp.array([-2.0, 3.0, 3.0]))):
      ...     direction, state = aggregate(balancer, rows, state)
      ...     print(direction.round(1))
      [0. 0. 0.]
      [1. 1. 1.]
      [0.8 1.  1. ]

    Edge cases:
      ================================ ====================================================================
      one task                         Adam
      an inactive task                 has no turn; its m stays and has no part in the direction
      an entry that has been 0 so far  0
      ================================ ====================================================================

    References:
      Liu, Chu, Thuerey, *ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks*, ICLR 2025,
      `arXiv:2408.11104 <https://arxiv.org/abs/2408.11104>`_. :math:`\epsilon` is :math:`10^{-8}` times the largest
      entry of :math:`\sqrt{\hat s}`, so that the direction does not change with the scale of the gradients; the paper's
      is :math:`10^{-8}` itself.
    """
    for option, value in (("beta_1", beta_1), ("beta_2", beta_2)):
        checked(value, f"m_config({option})", at_least=0.0, at_most=1 - 1e-7)
    return MConfig(beta_1, beta_2, checked_count(tasks_per_call, "m_config(tasks_per_call)", at_least=1))


class MConfigState(NamedTuple):
    """m with its steps; f and s with the number of directions; and the task that is next."""

    momentum: PyTree[Float[Array, "task ..."]]
    steps: Int[Array, " task"]
    first: PyTree[Float[Array, "..."]]
    second: PyTree[Float[Array, "..."]]
    directions: Int[Array, ""]
    turn: Int[Array, ""]


@register
@dataclasses.dataclass(frozen=True)
class MConfig(Balancer):
    beta_1: Any
    beta_2: Any
    tasks_per_call: int = dataclasses.field(metadata={"static": True})

    needs: ClassVar = "jacobian"
    homogeneity: ClassVar = 0
    has_parameter_state: ClassVar = True

    def init(self, num_tasks: int, params: PyTree | None = None) -> MConfigState:
        self._check(num_tasks)
        momentum = zeros_per_task(params, num_tasks)
        zeros = functools.partial(jax.tree.map, lambda leaf: jnp.zeros_like(leaf[0]), momentum)
        steps = jnp.zeros(num_tasks, jnp.int32)
        return MConfigState(momentum, steps, zeros(), zeros(), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))

    def for_tasks(self, tasks):
        self._check(len(tasks))
        return super().for_tasks(tasks)

    def combine(
        self,
        jacobian: PyTree[Float[Array, "task ..."]],
        losses: Float[Array, " task"],
        state: MConfigState,
        key: PRNGKeyArray | None,
        *,
        active: Bool[Array, " task"] | None = None,
    ) -> tuple[PyTree[Float[Array, "..."]], MConfigState]:
        active = jnp.ones(losses.shape, bool) if active is None else active
        chosen, turn = next_in_turn(state.turn, active, self.tasks_per_call)
        taken = jnp.full(losses.shape, 1 - self.beta_1)
        momentum = follow(state.momentum, jacobian, taken, self.beta_1, chosen)
        steps = jnp.where(chosen, state.steps + 1, state.steps)
        seen = jnp.all(steps > 0, where=active)

        corrections = jnp.where(steps > 0, 1 - self.beta_1**steps, 1)
        present = only_active_rows(momentum, active & seen)
        scales = 1 / corrections
        products = scales[:, None] * gramian(present) * scales
        weights = conflict_free_weights(products, jnp.ones_like(scales, products.dtype), active)
        smooth = combine_rows((scales * weights).astype(products.dtype), present)

        time = jnp.where(seen, state.directions + 1, jnp.maximum(state.directions, 1))
        first = jax.tree.map(lambda d: (1 - self.beta_1**time) * d, smooth)
        unsmoothed = jax.tree.map(lambda f, old: (f - self.beta_1 * old) / (1 - self.beta_1), first, state.first)
        second = jax.tree.map(lambda s, f: self.beta_2 * s + (1 - self.beta_2) * f * f, state.second, unsmoothed)
        roots = jax.tree.map(lambda s: jnp.sqrt(s / (1 - self.beta_2**time)), second)
        floor = EPSILON * jnp.max(jnp.stack([jnp.max(leaf) for leaf in jax.tree.leaves(roots)]))
        direction = jax.tree.map(
            lambda d, root, rows: jnp.where(root + floor > 0, d / (root + floor), 0).astype(rows.dtype),
            smooth,
            roots,
            jacobian,
        )
        new = MConfigState(momentum, steps, first, second, jnp.where(seen, time, state.directions), turn)
        waiting = state._replace(momentum=momentum, steps=steps, turn=turn)
        new = jax.tree.map(lambda a, b: jnp.where(seen, a, b).astype(b.dtype), new, waiting)
        return direction, new

    def _check(self, num_tasks):
        if self.tasks_per_call > num_tasks:
            expectation = f"expected at most {num_tasks}, the number of tasks"
            raise ConfigError(f"m_config(tasks_per_call) is {self.tasks_per_call}; {expectation}. Lower it")


def next_in_turn(
    turn: Int[Array, ""], active: Bool[Array, " task"], tasks_per_call: int
) -> tuple[Bool[Array, " task"], Int[Array, ""]]:
    """The next active tasks from ``turn`` on, round and round, and the task after the last of them."""
    num_tasks = active.shape[0]
    distance = jnp.where(active, (jnp.arange(num_tasks) - turn) % num_tasks, num_tasks)
    chosen = active & (jnp.argsort(jnp.argsort(distance)) < tasks_per_call)
    last = jnp.max(jnp.where(chosen, distance, -1))
    return chosen, ((turn + last + 1) % num_tasks).astype(turn.dtype)
