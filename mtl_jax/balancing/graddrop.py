"""GradDrop: keep one sign of each coordinate, drawn by how pure the tasks' signs are."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from mtl_jax.balancing.base import Balancer, NoState, TaskLike, only_active_rows, register
from mtl_jax.balancing.options import PerTask, by_position, checked, vector
from mtl_jax.balancing.rows import row_dtype


def graddrop(*, leak: PerTask = 0.0) -> Balancer:
    r"""Gradient sign dropout. In every coordinate one sign survives, the positive one with probability P:

    .. math::
        P = \tfrac12 \Big( 1 + \frac{\sum_i g_i}{\sum_i |g_i|} \Big)
        \qquad M_i = [P > U]\,[g_i > 0] + [P < U]\,[g_i < 0]
        \qquad d = \sum_i \big( \ell_i + (1 - \ell_i) M_i \big) g_i

    with one uniform draw U a coordinate, common to all tasks. The expectation of d is :math:`\sum_i g_i` for any leak
    that all tasks have in common.

    Args:
      leak: :math:`\ell` in [0, 1], the part of a task's gradient that always passes; one number, one per task, or by
        task name. 1 is the sum of the gradients.

    Returns:
      A balancer that needs the Jacobian and draws one uniform number a coordinate and step; it has no state. At the scope
      ``representation`` of the train step coordinates are units z: the signs are those of
      :math:`\sum_b \mathrm{sign}(z_b)\, \partial L_i / \partial z_b` over the rows b of the batch, and :math:`M_i` is one
      mask for all rows.

    Raises:
      ConfigError: A leak is out of its range; by ``for_tasks``, ``init`` or the first step, their number or names are
        not those of the tasks.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from mtl_jax.balancing import aggregate, graddrop
      >>> jacobian = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> balancer = graddrop()
      >>> direction, _ = aggregate(balancer, jacobian, balancer.init(2), key=jax.random.key(0))
      >>> print(direction)  # 6 or -4, and where the signs agree the sum
      [-4.  2.  2.]

    Edge cases:
      ============================== ==================================
      a coordinate of zeros          0
      a coordinate of one sign       the sum
      an inactive task               has no sign to count
      ============================== ==================================

    References:
      Chen, Ngiam, Huang, Luong, Kretzschmar, Chai, Anguelov, *Just Pick a Sign: Optimizing Deep Multitask Models with
      Gradient Sign Dropout*, NeurIPS 2020, `arXiv:2010.06808 <https://arxiv.org/abs/2010.06808>`_. The paper's layer
      is at a representation; public code mostly acts on parameters. Some of it has the leak the other way round.
    """
    return GradDrop(checked(leak, "graddrop(leak)", at_least=0.0, at_most=1.0))


@register
@dataclasses.dataclass(frozen=True)
class GradDrop(Balancer):
    leak: Any

    needs: ClassVar = "jacobian"
    stochastic: ClassVar = True
    scaling: ClassVar = "sum"
    by_unit: ClassVar = True

    def init(self, num_tasks: int, params: PyTree | None = None) -> NoState:
        vector(self.leak, num_tasks, "graddrop(leak)")
        return NoState()

    def for_tasks(self, tasks: Sequence[TaskLike]) -> Balancer:
        leak = by_position(self.leak, [task.name for task in tasks], "graddrop(leak)")
        return dataclasses.replace(super().for_tasks(tasks), leak=leak)

    def combine(
        self,
        jacobian: PyTree[Float[Array, "task ..."]],
        losses: Float[Array, " task"],
        state: NoState,
        key: PRNGKeyArray,
        *,
        active: Bool[Array, " task"] | None = None,
    ) -> tuple[PyTree[Float[Array, "..."]], NoState]:
        leak = vector(self.leak, losses.shape[0], "graddrop(leak)")
        uniform = draw_uniform(key, jacobian)
        return pick_signs(only_active_rows(jacobian, active), uniform, leak), state

    def unit_factors(
        self,
        sums: PyTree[Float[Array, "task ..."]],
        key: PRNGKeyArray,
        *,
        active: Bool[Array, " task"] | None = None,
    ) -> PyTree[Float[Array, "task ..."]]:
        """What each task's gradient is multiplied by in each unit, from signed sums over the rows."""
        leak = vector(self.leak, len(jax.tree.leaves(sums)[0]), "graddrop(leak)")
        return jax.tree.map(
            lambda leaf, draw: jnp.stack(surviving(leaf, draw, leak)),
            only_active_rows(sums, active),
            draw_uniform(key, sums),
        )


def draw_uniform(key: PRNGKeyArray, jacobian: PyTree[Float[Array, "task ..."]]) -> PyTree[Float[Array, "..."]]:
    """One number in (0, 1) for each coordinate: 0 would drop a coordinate in which all tasks are negative."""
    leaves, structure = jax.tree.flatten(jacobian)
    dtype = row_dtype(jacobian)
    draws = [
        jax.random.uniform(k, leaf.shape[1:], dtype, minval=jnp.finfo(dtype).tiny)
        for k, leaf in zip(jax.random.split(key, len(leaves)), leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, draws)


def pick_signs(
    jacobian: PyTree[Float[Array, "task ..."]], uniform: PyTree[Float[Array, "..."]], leak: Float[Array, " task"]
) -> PyTree[Float[Array, "..."]]:
    """The direction for given draws."""

    def pick(leaf, draw):
        factors = surviving(leaf, draw, leak)
        kept = (factor * row.astype(draw.dtype) for factor, row in zip(factors, leaf, strict=True))
        return functools.reduce(jnp.add, kept).astype(leaf.dtype)

    return jax.tree.map(pick, jacobian, uniform)


def surviving(
    leaf: Float[Array, "task ..."], draw: Float[Array, "..."], leak: Float[Array, " task"]
) -> list[Float[Array, "..."]]:
    """For each task 1 where its sign survives, else its leak."""
    rows = [row.astype(draw.dtype) for row in leaf]
    size = functools.reduce(jnp.add, map(jnp.abs, rows))
    purity = 0.5 * (1 + functools.reduce(jnp.add, rows) / jnp.where(size > 0, size, 1))
    signs = jnp.sign(purity - draw)  # of the gradients that survive
    return [jnp.where(signs * row > 0, 1, part.astype(draw.dtype)) for row, part in zip(rows, leak, strict=True)]
