"""GO4Align: tasks in groups by how risky they are, one weight a group."""

import dataclasses
import functools
import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from mtl_jax.balancing.base import Balancer, register
from mtl_jax.balancing.options import checked
from mtl_jax.errors import ConfigError


def go4align(*, num_groups: int = 1, eta: float = 1e-4) -> Balancer:
    r"""Adaptive group risk minimization. Shares p of the tasks follow their losses, and their risk is that share at one
    common size of the losses:

    .. math::
        p_i \leftarrow \frac{p_i e^{-\eta L_i}}{\sum_j p_j e^{-\eta L_j}}
        \qquad q_i = p_i \frac{\sum_j L_j}{L_i}
        \qquad w_i = \text{mean of } q \text{ in the group of } i
        \qquad O = \sum_i w_i L_i

    from equal shares. The groups are the partition of the numbers q into at most ``num_groups`` parts that has the least
    sum of squares around the means of its parts.

    Args:
      num_groups: Number of groups, from 1, the mean of q for all, to the number of tasks, q itself.
      eta: :math:`\eta \ge 0`, how fast the shares follow the losses.

    Returns:
      A balancer that needs one backward pass and the losses; its state is log p.

    Raises:
      ConfigError: An option is out of its range, or there are more groups than tasks.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtl_jax.balancing import aggregate, go4align
      >>> balancer = go4align(num_groups=2)
      >>> direction, _ = aggregate(balancer, jnp.eye(3), balancer.init(3), losses=[0.7, 0.2, 1.5])
      >>> print(direction.round(2))
      [0.84 4.   0.84]

    Edge cases:
      =============== =======================================================================
      one task        its own gradient
      a loss <= 0     stands for 1e-12 of the sum of the others: it takes the larger weight
      all losses <= 0 weights as with equal losses
      inactive tasks  keep their p; the others share what remains, and q counts with their part
      =============== =======================================================================

    References:
      Shen, Wang, Xiao, Worring, Zhen, *GO4Align: Group Optimization for Multi-Task Alignment*, NeurIPS 2024,
      `arXiv:2404.06486 <https://arxiv.org/abs/2404.06486>`_. The partition is the exact optimum, by dynamic programming
      over the sorted q; public code runs k-means from random starts, so that its weights depend on the seed.
    """
    if not isinstance(num_groups, int) or isinstance(num_groups, bool) or num_groups < 1:
        expectation = "expected a whole number, at least 1"
        raise ConfigError(
            f"go4align(num_groups) is {num_groups!r}; {expectation}. One group gives all tasks one weight"
        )
    return Go4Align(checked(eta, "go4align(eta)", at_least=0.0), num_groups)


class Go4AlignState(NamedTuple):
    """log p."""

    log_shares: Float[Array, " task"]


@register
@dataclasses.dataclass(frozen=True)
class Go4Align(Balancer):
    eta: Any
    num_groups: int = dataclasses.field(metadata={"static": True})

    needs: ClassVar = "losses"
    reads_losses: ClassVar = True
    weighted_heads: ClassVar = True

    def init(self, num_tasks: int, params: PyTree | None = None) -> Go4AlignState:
        self._check(num_tasks)
        return Go4AlignState(jnp.full(num_tasks, -math.log(num_tasks), float))

    def for_tasks(self, tasks):
        self._check(len(tasks))
        return super().for_tasks(tasks)

    def weigh(
        self,
        gramian: Float[Array, "task task"] | None,
        losses: Float[Array, " task"],
        state: Go4AlignState,
        key: PRNGKeyArray | None,
        *,
        active: Bool[Array, " task"] | None = None,
    ) -> tuple[Float[Array, " task"], Go4AlignState]:
        active = jnp.ones(losses.shape, bool) if active is None else active
        losses = jnp.where(active, losses, 0)
        old = state.log_shares
        moved = old - self.eta * losses
        # What the active tasks had together they have together still.
        kept = jax.nn.logsumexp(old, where=active) - jax.nn.logsumexp(moved, where=active)
        log_shares = jnp.where(active, moved + kept, old).astype(old.dtype)
        least = jnp.maximum(1e-12 * jnp.sum(jnp.maximum(losses, 0)), jnp.finfo(losses.dtype).tiny)
        sizes = jnp.where(jnp.isnan(losses), losses, jnp.maximum(losses, least))
        shares = jax.nn.softmax(log_shares, where=active).astype(losses.dtype)
        risks = jnp.where(active, shares * (jnp.sum(sizes, where=active) / sizes), 0)
        return group_means(risks, active, self.num_groups), Go4AlignState(log_shares)

    def _check(self, num_tasks):
        if self.num_groups > num_tasks:
            expectation = f"expected at most {num_tasks}, the number of tasks"
            raise ConfigError(f"go4align(num_groups) is {self.num_groups}; {expectation}. Lower it")


# Jitted, because a loop outside of jit is compiled anew at every call.
@functools.partial(jax.jit, static_argnums=2)
def group_means(values: Float[Array, " task"], active: Bool[Array, " task"], num_groups: int) -> Float[Array, " task"]:
    """The mean of each value's group in the best partition into ``num_groups``; 0 for inactive tasks.

    In one dimension the groups of the best partition are intervals of the sorted values, so that the best partition of
    the first j values into n groups is the best of the first i into n - 1 with one more group of those from i to j.
    """
    num_tasks = values.shape[0]
    # Inactive tasks come last and weigh nothing in any group.
    order = jnp.argsort(jnp.where(active, values, jnp.inf))
    ordered, present = values[order], active[order]
    bounds, places = jnp.arange(num_tasks + 1), jnp.arange(num_tasks)
    inside = (bounds[:, None, None] <= places) & (places < bounds[:, None]) & present  # of [i, j)
    means = jnp.sum(jnp.where(inside, ordered, 0), axis=2) / jnp.maximum(jnp.sum(inside, axis=2), 1)
    costs = jnp.sum((ordered - means[:, :, None]) ** 2, where=inside, axis=2)
    costs = jnp.where(bounds[:, None] < bounds, costs, jnp.inf)

    def one_more_group(_, best):
        cost, fitted = best
        starts = jnp.argmin(cost[:, None] + costs, axis=0)
        last_means = means[starts, bounds]
        fitted = jnp.where(places < starts[:, None], fitted[starts], last_means[:, None])
        return cost[starts] + costs[starts, bounds], fitted

    nothing = (
        jnp.where(bounds == 0, 0, jnp.inf).astype(values.dtype),
        jnp.zeros((num_tasks + 1, num_tasks), values.dtype),
    )
    _, fitted = jax.lax.fori_loop(0, num_groups, one_more_group, nothing)
    return jnp.zeros_like(values).at[order].set(jnp.where(present, fitted[-1], 0))
