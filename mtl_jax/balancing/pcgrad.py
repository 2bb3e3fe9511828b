"""PCGrad: take out of each task's gradient what conflicts with the others."""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from mtl_jax.balancing.base import Balancer, NoState, only_active, register


def pcgrad() -> Balancer:
    r"""Projecting conflicting gradients.

    Each task visits the others in a random order of its own. Where its gradient, as projected so far, conflicts with
    another task's original gradient, the conflicting part is removed; the results are summed:

    .. math::
        g_i \leftarrow g_i - \frac{\min(g_i^\top g_j,\, 0)}{\lVert g_j \rVert^2}\, g_j
        \qquad d = \sum_i g_i

    Every projection is a combination of the original gradients, so the Gramian suffices: the weights cost
    :math:`O(T^3)`, whatever the number of parameters.

    Returns:
      A balancer that needs the Gramian, draws one permutation per task and step, and has no state.
      Its direction is the plain sum when no two tasks conflict.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from mtl_jax.balancing import aggregate, pcgrad
      >>> jacobian = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])  # two tasks, three parameters
      >>> balancer = pcgrad()
      >>> direction, _ = aggregate(balancer, jacobian, balancer.init(2), key=jax.random.key(0))
      >>> print(direction.round(4))
      [0.5848 3.8012 3.8012]

    Edge cases:
      ============================ =====================================
      one task                     its own gradient
      a zero gradient              never projected on, contributes zero
      orthogonal or agreeing pairs untouched
      an exactly opposite pair     both vanish
      ============================ =====================================

    References:
      Yu, Kumar, Gupta, Levine, Hausman, Finn, *Gradient Surgery for Multi-Task Learning*, NeurIPS 2020,
      `arXiv:2001.06782 <https://arxiv.org/abs/2001.06782>`_. As in the paper and unlike some later code, each task
      has its own visiting order, projections use the original :math:`g_j`, and the result is a sum, not a mean.
    """
    return PCGrad()


@register
@dataclasses.dataclass(frozen=True)
class PCGrad(Balancer):
    needs: ClassVar = "gramian"
    scaling: ClassVar = "sum"
    stochastic: ClassVar = True
    homogeneity: ClassVar = 1

    def weigh(
        self,
        gramian: Float[Array, "task task"],
        losses: Float[Array, " task"],
        state: NoState,
        key: PRNGKeyArray,
        *,
        active: Bool[Array, " task"] | None = None,
    ) -> tuple[Float[Array, " task"], NoState]:
        orders = draw_orders(key, losses.shape[0])
        weights = projection_weights(only_active(gramian, active), orders)
        return weights if active is None else jnp.where(active, weights, 0), state


@functools.partial(jax.jit, static_argnums=1)
def draw_orders(key: PRNGKeyArray, num_tasks: int) -> Int[Array, "task task"]:
    """Independent uniform orders, one per task. Leaving absent tasks out of them keeps them uniform."""
    return jax.vmap(lambda k: jax.random.permutation(k, num_tasks))(jax.random.split(key, num_tasks))


# Jitted, because a scan outside of jit is compiled anew at every call.
@jax.jit
def projection_weights(gramian: Float[Array, "task task"], orders: Int[Array, "task task"]) -> Float[Array, " task"]:
    """Weights of the summed projections; ``orders[i]`` is the order in which task i visits the tasks."""
    num_tasks = gramian.shape[0]
    squared_norms = jnp.diagonal(gramian)
    safe_norms = jnp.where(squared_norms > 0, squared_norms, 1.0)

    def project(task, order):
        def visit(weights, other):
            dot = jnp.dot(gramian[other], weights, precision=jax.lax.Precision.HIGHEST)
            removed = jnp.where(other == task, 0.0, jnp.minimum(dot, 0.0) / safe_norms[other])
            return weights.at[other].add(-removed), None

        weights, _ = jax.lax.scan(visit, jax.nn.one_hot(task, num_tasks, dtype=gramian.dtype), order)
        return weights

    return jax.vmap(project)(jnp.arange(num_tasks), orders).sum(axis=0)
