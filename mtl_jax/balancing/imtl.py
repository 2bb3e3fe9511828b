"""IMTL: impartial in losses and gradients, the two halves of the paper together."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from mtl_jax.balancing.base import Balancer, register
from mtl_jax.balancing.imtl_g import impartial_weights
from mtl_jax.balancing.learnable import Learnable, adam_step, learnable
from mtl_jax.balancing.options import checked

# exp(10) = 22026: a task whose loss reaches 0 would otherwise send its scale to infinity.
MAX_SCALE = 10.0


def imtl(*, weight_lr: float = 1e-3) -> Balancer:
    r"""IMTL-G on losses that are scaled to be alike: with a learned :math:`s_i` for each task,

    .. math::
        w_i = e^{s_i}\, \tilde w_i, \quad \tilde w \text{ of IMTL-G for the rows } e^{s_i} g_i
        \qquad \frac{\partial}{\partial s_i} \sum_j (e^{s_j} L_j - s_j) = e^{s_i} L_i - 1

    The weights of a step are read before its update of s, an Adam step without weight decay; s stays in [-10, 10].

    Args:
      weight_lr: Learning rate of s, >= 0.

    Returns:
      A balancer that needs the Gramian and the losses; its state is s and its Adam, and the guard of IMTL-G.

    Raises:
      ConfigError: ``weight_lr`` is out of its range.

    Example:
      >>> import jax.numpy as jnp
      >>> import numpy as np
      >>> from mtl_jax.balancing import aggregate, imtl
      >>> balancer = imtl()
      >>> jacobian = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> direction, state = aggregate(balancer, jacobian, balancer.init(2), losses=jnp.array([0.5, 2.0]))
      >>> print(np.asarray(direction).round(4), state.scale.value.round(4))
      [0.0767 1.     1.    ] [ 0.001 -0.001]

    Edge cases:
      ==================== ==========================================
      a loss of zero       s rises by ``weight_lr`` a step up to 10
      an inactive task     its s, moments and step count stay
      s = 0                IMTL-G
      ==================== ==========================================

    References:
      Liu, Li, Kuang, Xue, Chen, Yang, Liao, Zhang, *Towards Impartial Multi-Task Learning*, ICLR 2021. In the paper the
      heads descend the scaled losses: ``head_gradient="weighted"``. As in IMTL-G, the absolute value of the sum is
      divided by.
    """
    return IMTL(checked(weight_lr, "imtl(weight_lr)", at_least=0.0))


class IMTLState(NamedTuple):
    """``scale.value`` is s, ``factors`` its exponential in the latest step; ``guard`` is 1 where the latest weights were
    divided by their absolute sum."""

    scale: Learnable
    factors: Float[Array, " task"]
    guard: Float[Array, ""]


@register
@dataclasses.dataclass(frozen=True)
class IMTL(Balancer):
    weight_lr: Any

    needs: ClassVar = "gramian"
    scaling: ClassVar = "mean"
    reads_losses: ClassVar = True

    def init(self, num_tasks: int, params: PyTree | None = None) -> IMTLState:
        return IMTLState(learnable(jnp.zeros(num_tasks)), jnp.ones(num_tasks), jnp.zeros(()))

    def weigh(
        self,
        gramian: Float[Array, "task task"],
        losses: Float[Array, " task"],
        state: IMTLState,
        key: PRNGKeyArray | None,
        *,
        active: Bool[Array, " task"] | None = None,
    ) -> tuple[Float[Array, " task"], IMTLState]:
        factors = jnp.exp(state.scale.value)
        moved = adam_step(state.scale, factors * losses - 1, self.weight_lr, active=active)
        moved = moved._replace(value=jnp.clip(moved.value, -MAX_SCALE, MAX_SCALE))
        kept = factors if active is None else jnp.where(active, factors, state.factors)
        factors = factors.astype(gramian.dtype)
        weights, guard = impartial_weights(factors[:, None] * gramian * factors, active)
        return factors * weights, IMTLState(moved, kept.astype(state.factors.dtype), guard)

    def head_weights(
        self, weights: Float[Array, " task"], losses: Float[Array, " task"], state: IMTLState
    ) -> Float[Array, " task"]:
        return state.factors.astype(weights.dtype)

    def diagnostics(self, state: IMTLState) -> dict[str, Float[Array, ""]]:
        return {"imtl_guard": state.guard}
