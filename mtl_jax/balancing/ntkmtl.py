"""NTKMTL: tasks that learn slowly, by the tangent kernel of their losses, get longer steps."""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from mtl_jax.balancing.base import Balancer, NoState, only_active, register
from mtl_jax.balancing.options import checked


def ntkmtl(*, exponent: float = 0.5) -> Balancer:
    r"""Balanced convergence by the neural tangent kernel, which for one loss a task is its squared gradient length:

    .. math::
        w_i = \Big( \frac{\sum_j \lVert g_j \rVert^2}{\lVert g_i \rVert^2} \Big)^{\kappa}

    Args:
      exponent: :math:`\kappa`; 0 is the sum of the gradients, 1/2 the sum of the unit gradients times
        :math:`\sqrt{\sum_j \lVert g_j \rVert^2}`.

    Returns:
      A balancer that needs the Gramian and has no state.

    Raises:
      ConfigError: ``exponent`` is not a finite number.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtl_jax.balancing import aggregate, ntkmtl
      >>> balancer = ntkmtl()
      >>> direction, _ = aggregate(balancer, jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]), balancer.init(2))
      >>> print(direction.round(1))
      [0.2 3.  3. ]

    Edge cases:
      =============== =====================================
      one task        its own gradient
      a zero gradient left out of the sum, contributes zero
      =============== =====================================

    References:
      Qin, Wang, Liao, Yan, *Mitigating Task Imbalance from Neural Tangent Kernel Perspective*, NeurIPS 2025,
      `arXiv:2510.18258 <https://arxiv.org/abs/2510.18258>`_. Without the clipping of the norm and the factor T of its
      published code.
    """
    return NtkMtl(checked(exponent, "ntkmtl(exponent)"))


@register
@dataclasses.dataclass(frozen=True)
class NtkMtl(Balancer):
    exponent: Any

    needs: ClassVar = "gramian"

    def weigh(
        self,
        gramian: Float[Array, "task task"],
        losses: Float[Array, " task"],
        state: NoState,
        key: PRNGKeyArray | None,
        *,
        active: Bool[Array, " task"] | None = None,
    ) -> tuple[Float[Array, " task"], NoState]:
        return kernel_weights(jnp.diagonal(only_active(gramian, active)), self.exponent), state


def kernel_weights(kernels: Float[Array, " task"], exponent: float | Float[Array, ""]) -> Float[Array, " task"]:
    """(sum / own) ** exponent of numbers >= 0, and 0 where a number is 0."""
    safe = jnp.where(kernels > 0, kernels, 1)
    return jnp.where(kernels > 0, (jnp.sum(kernels) / safe) ** exponent, 0).astype(kernels.dtype)
