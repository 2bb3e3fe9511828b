"""Krum: trust the tasks whose gradients have the nearest neighbours."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from mtl_jax.balancing.base import Balancer, NoState, check_num_tasks, num_active, only_active, register
from mtl_jax.balancing.options import checked_count


def krum(*, num_byzantine: int = 1, num_selected: int = 1) -> Balancer:
    r"""Multi-Krum, a rule of robust statistics: each gradient is scored by its squared distances to the
    :math:`T - f - 2` nearest of the others, and the m lowest scores are averaged:

    .. math::
        s_i = \sum_{j \in N_i} \lVert g_i - g_j \rVert^2
        \qquad w_i = \tfrac1m \, [\, i \text{ among the } m \text{ lowest } s \,]

    It is meant for many noisy copies of one gradient. For different tasks it is a baseline: it ignores outliers, which
    may be the tasks that matter.

    Args:
      num_byzantine: f, how many gradients may be arbitrary, >= 0.
      num_selected: m, how many are averaged, >= 1.

    Returns:
      A balancer that needs the Gramian of at least f + 3 and m tasks, and has no state.

    Raises:
      ConfigError: An option is not such a whole number, or the tasks are too few.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtl_jax.balancing import aggregate, krum
      >>> balancer = krum(num_selected=2)
      >>> jacobian = jnp.array([[1.0, 1.0], [1.0, 2.0], [75.0, -666.0], [1.5, 2.0]])
      >>> direction, _ = aggregate(balancer, jacobian, balancer.init(4))
      >>> print(direction)
      [1.25 2.  ]

    Edge cases:
      ================================== =======================================================
      equal scores                       the task that comes first
      inactive or zero gradients         no candidates and no neighbours, f stays
      fewer than f + 3 candidates        their mean: no outlier can be told among so few
      fewer than m candidates            their mean
      one gradient 1e8 times the others  an outlier like any: zero is 1e-8 of the *median* length
      ================================== =======================================================

    References:
      Blanchard, El Mhamdi, Guerraoui, Stainer, *Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent*,
      NeurIPS 2017, `arXiv:1703.02757 <https://arxiv.org/abs/1703.02757>`_. Squared distances as in the paper; some
      public code adds up distances.
    """
    num_byzantine = checked_count(num_byzantine, "krum(num_byzantine)", at_least=0)
    return Krum(num_byzantine, checked_count(num_selected, "krum(num_selected)", at_least=1))


@register
@dataclasses.dataclass(frozen=True)
class Krum(Balancer):
    num_byzantine: int = dataclasses.field(metadata={"static": True})
    num_selected: int = dataclasses.field(metadata={"static": True})

    needs: ClassVar = "gramian"
    scaling: ClassVar = "mean"
    robust: ClassVar = True

    @property
    def min_tasks(self) -> int:
        return max(self.num_byzantine + 3, self.num_selected)

    def init(self, num_tasks: int, params: PyTree | None = None) -> NoState:
        check_num_tasks(self, num_tasks)
        return NoState()

    def weigh(
        self,
        gramian: Float[Array, "task task"],
        losses: Float[Array, " task"],
        state: NoState,
        key: PRNGKeyArray | None,
        *,
        active: Bool[Array, " task"] | None = None,
    ) -> tuple[Float[Array, " task"], NoState]:
        num_tasks = losses.shape[0]
        active = jnp.ones(num_tasks, bool) if active is None else active
        gramian, count = only_active(gramian, active), num_active(active, num_tasks)
        squares = jnp.diagonal(gramian)
        distances = jnp.maximum(squares[:, None] + squares - 2 * gramian, 0)
        others = active[:, None] & active & ~jnp.eye(num_tasks, dtype=bool)
        nearest = jnp.sort(jnp.where(others, distances, jnp.inf), axis=1)
        num_neighbours = count - self.num_byzantine - 2
        scores = jnp.sum(nearest, axis=1, where=jnp.arange(num_tasks) < num_neighbours)

        selected = jnp.minimum(jnp.where(num_neighbours > 0, self.num_selected, count), count)
        ranks = jnp.argsort(jnp.argsort(jnp.where(active, scores, jnp.inf)))
        weights = jnp.where(active & (ranks < selected), 1 / selected, 0)
        return weights.astype(gramian.dtype), state
