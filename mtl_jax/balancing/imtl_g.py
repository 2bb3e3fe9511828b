"""IMTL-G: a direction with the same projection on every task's unit gradient."""

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from mtl_jax.balancing.base import Balancer, register
from mtl_jax.balancing.solvers import gramian_eigenpairs, scaled

# Below this share of their absolute sum, the sum of the weights is no measure of their size.
SMALL_SUM = 1e-3


def imtl_g() -> Balancer:
    r"""Impartial learning by gradients: with :math:`n_i = \lVert g_i \rVert`,

    .. math:: v = G^+ n \qquad w = \frac{v}{|\sum_i v_i|} \qquad d = \sum_i w_i g_i

    so that for independent gradients :math:`d^\top g_i / n_i = 1 / |\sum_i v_i|`, equal for all tasks and positive.

    Returns:
      A balancer that needs the Gramian; its state is whether the guard acted in the latest call.

    Example:
      >>> import jax.numpy as jnp
      >>> import numpy as np
      >>> from mtl_jax.balancing import aggregate, imtl_g
      >>> balancer = imtl_g()
      >>> direction, _ = aggregate(balancer, jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]), balancer.init(2))
      >>> print(np.asarray(direction).round(4))
      [0.0767 1.     1.    ]

    Edge cases:
      ========================================= ==========================================================
      one task                                  its own gradient
      dependent gradients                       the pseudo-inverse: projections as equal as they can be
      two opposite gradients of one length      0
      :math:`|\sum v| < 10^{-3} \sum |v|`       divided by :math:`\sum |v|`, reported as ``imtl_guard``
      ========================================= ==========================================================

    References:
      Liu, Li, Kuang, Xue, Chen, Yang, Liao, Zhang, *Towards Impartial Multi-Task Learning*, ICLR 2021. The paper divides
      by the sum with its sign, so that the step ascends on every task where it is negative (some 4 % of Gaussian 3x3
      Jacobians); here by its absolute value.
    """
    return IMTLG()


class GuardState(NamedTuple):
    """``guard`` is 1 where the latest weights were divided by their absolute sum."""

    guard: Float[Array, ""]


@jax.jit
def impartial_weights(
    gramian: Float[Array, "task task"], active: Bool[Array, " task"] | None = None
) -> tuple[Float[Array, " task"], Float[Array, ""]]:
    """The weights, and 1 where the guard acted."""
    pairs = gramian_eigenpairs(gramian, active)
    norms = scaled(gramian, active).norms
    highest = jax.lax.Precision.HIGHEST
    coefficients = jnp.matmul(norms, pairs.vectors, precision=highest)
    rounding = 4 * norms.shape[0] * jnp.finfo(norms.dtype).eps * jnp.matmul(norms, jnp.abs(pairs.vectors))
    kept = pairs.kept & (jnp.abs(coefficients) > rounding)
    solution = jnp.matmul(
        pairs.vectors, jnp.where(kept, coefficients / jnp.where(kept, pairs.values, 1), 0), precision=highest
    )
    size = jnp.sum(jnp.abs(solution))
    total = jnp.abs(jnp.sum(solution))
    guard = total < SMALL_SUM * size
    divisor = jnp.where(guard, size, total)
    return solution / jnp.where(divisor > 0, divisor, 1), guard.astype(float)


@register
@dataclasses.dataclass(frozen=True)
class IMTLG(Balancer):
    needs: ClassVar = "gramian"
    scaling: ClassVar = "mean"

    def init(self, num_tasks: int, params: PyTree | None = None) -> GuardState:
        return GuardState(jnp.zeros(()))

    def weigh(
        self,
        gramian: Float[Array, "task task"],
        losses: Float[Array, " task"],
        state: GuardState,
        key: PRNGKeyArray | None,
        *,
        active: Bool[Array, " task"] | None = None,
    ) -> tuple[Float[Array, " task"], GuardState]:
        weights, guard = impartial_weights(gramian, active)
        return weights, GuardState(guard)

    def diagnostics(self, state: GuardState) -> dict[str, Float[Array, ""]]:
        return {"imtl_guard": state.guard}
