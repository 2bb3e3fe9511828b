"""MetaBalance: auxiliary gradients get the length of the main task's, parameter by parameter."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from mtl_jax.balancing.base import Balancer, TaskLike, register
from mtl_jax.balancing.options import checked
from mtl_jax.balancing.rows import combine_rows
from mtl_jax.errors import ConfigError

STRATEGIES = ("both", "shrink", "enlarge")


def metabalance(*, relax: float = 0.7, beta: float = 0.9, strategy: str = "both", main: int | str = 0) -> Balancer:
    r"""One task is the main one; the others help it. In each parameter tensor, the gradients of the others are brought
    near the length that the main gradient usually has there:

    .. math::
        m_i \leftarrow \beta\, m_i + (1 - \beta) \lVert g_i \rVert
        \qquad \tilde g_i = \Big( r\, \frac{\hat m_{main}}{\hat m_i} + 1 - r \Big) g_i
        \qquad d = \sum_i \tilde g_i

    with :math:`\hat m_i = m_i / (1 - \beta^{t_i})` after :math:`t_i` steps of task i.

    Args:
      relax: r in [0, 1], how near; 0 is the sum of the gradients.
      beta: :math:`\beta` in [0, 1], how much of the usual length stays.
      strategy: ``both``, or ``shrink`` for gradients that are usually longer than the main one and ``enlarge`` for
        those that are shorter.
      main: The main task, by its position or name; names are resolved by ``for_tasks``.

    Returns:
      A balancer that needs the Jacobian; its state is m, one number for each task and tensor.

    Raises:
      ConfigError: An option is out of its range, or there is no such main task.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtl_jax.balancing import aggregate, metabalance
      >>> jacobian = {"kernel": jnp.array([[1.0, 0.0], [0.0, 10.0]]), "bias": jnp.array([1.0, 0.1])}
      >>> balancer = metabalance(relax=1.0)
      >>> state = balancer.init(2, {"kernel": jnp.zeros(2), "bias": jnp.zeros(())})
      >>> direction, _ = aggregate(balancer, jacobian, state)
      >>> print(direction["kernel"].round(4), direction["bias"])
      [1. 1.] 2.0

    Edge cases:
      =============================================== ==========================================
      a tensor that a task does not reach             nothing to scale
      a tensor that the main task does not reach      the others keep 1 - r of their gradients
      no step of the main task so far                 the sum of the gradients
      an inactive task                                keeps its m, which counts if it is the main
      =============================================== ==========================================

    References:
      He, Feng, Cheng, Ji, Guo, Caverlee, *MetaBalance: Improving Multi-Task Recommendations via Adapting Gradient
      Magnitudes of Auxiliary Tasks*, WWW 2022, `arXiv:2203.06801 <https://arxiv.org/abs/2203.06801>`_. The correction
      by own steps lets tasks compare whose labels are missing from some batches; where all tasks are in every batch, the
      ratio is the published one.
    """
    if strategy not in STRATEGIES:
        expectation = f"expected one of {list(STRATEGIES)}"
        raise ConfigError(f"metabalance(strategy) is {strategy!r}; {expectation}. Set one of them")
    if isinstance(main, bool) or not isinstance(main, int | str) or (isinstance(main, int) and main < 0):
        raise ConfigError(f"metabalance(main) is {main!r}; expected a position or the name of a task. Set one of them")
    relax = checked(relax, "metabalance(relax)", at_least=0.0, at_most=1.0)
    return MetaBalance(relax, checked(beta, "metabalance(beta)", at_least=0.0, at_most=1.0), strategy, main)


class MetaBalanceState(NamedTuple):
    """m as a pytree of the parameters, and the steps of each task."""

    lengths: PyTree[Float[Array, " task"]]
    steps: Int[Array, " task"]


@register
@dataclasses.dataclass(frozen=True)
class MetaBalance(Balancer):
    relax: Any
    beta: Any
    strategy: str = dataclasses.field(metadata={"static": True})
    main: int | str = dataclasses.field(metadata={"static": True})

    needs: ClassVar = "jacobian"
    has_parameter_state: ClassVar = True
    scaling: ClassVar = "sum"

    def init(self, num_tasks: int, params: PyTree | None = None) -> MetaBalanceState:
        self._check_main(range(num_tasks))
        lengths = jax.tree.map(lambda leaf: jnp.zeros(num_tasks, jnp.promote_types(leaf.dtype, jnp.float32)), params)
        return MetaBalanceState(lengths, jnp.zeros(num_tasks, jnp.int32))

    def for_tasks(self, tasks: Sequence[TaskLike]) -> Balancer:
        names = [task.name for task in tasks]
        self._check_main(names if isinstance(self.main, str) else range(len(names)))
        main = names.index(self.main) if isinstance(self.main, str) else self.main
        return dataclasses.replace(super().for_tasks(tasks), main=main)

    def combine(
        self,
        jacobian: PyTree[Float[Array, "task ..."]],
        losses: Float[Array, " task"],
        state: MetaBalanceState,
        key: PRNGKeyArray | None,
        *,
        active: Bool[Array, " task"] | None = None,
    ) -> tuple[PyTree[Float[Array, "..."]], MetaBalanceState]:
        active = jnp.ones(losses.shape, bool) if active is None else active
        steps = jnp.where(active, state.steps + 1, state.steps)
        lengths = jax.tree.map(functools.partial(self._follow, active=active), state.lengths, jacobian)

        def balance(rows, length):
            weights = jnp.where(active, self._factors(length, steps), 0)
            return combine_rows(weights, rows)

        return jax.tree.map(balance, jacobian, lengths), MetaBalanceState(lengths, steps)

    def _follow(self, lengths, rows, active):
        squares = jnp.square(rows.astype(lengths.dtype)).reshape(len(rows), -1)
        followed = self.beta * lengths + (1 - self.beta) * jnp.sqrt(jnp.sum(squares, axis=1))
        return jnp.where(active, followed, lengths).astype(lengths.dtype)

    def _factors(self, lengths, steps):
        corrections = 1 - self.beta ** steps.astype(lengths.dtype)
        usual = lengths / jnp.where(corrections > 0, corrections, 1)
        acts = (usual > 0) & (steps[self.main] > 0)
        if self.strategy == "shrink":
            acts &= usual > usual[self.main]
        elif self.strategy == "enlarge":
            acts &= usual < usual[self.main]
        ratios = usual[self.main] / jnp.where(acts, usual, 1)
        # Not (1 - r) + r: the main task's factor is exactly 1.
        return jnp.where(acts, 1 + self.relax * (ratios - 1), 1)

    def _check_main(self, known):
        if self.main not in known:
            expectation = f"the tasks are {list(known)}"
            by_name = isinstance(self.main, str) and isinstance(known, range)
            fix = "Call balancer.for_tasks(tasks) first, or give a position" if by_name else "Set one of them"
            raise ConfigError(f"metabalance(main) is {self.main!r}; {expectation}. {fix}")
