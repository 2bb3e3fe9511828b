"""CAGrad: near the mean gradient, the direction that serves the worst task best."""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from mtl_jax.balancing.base import Balancer, num_active, register
from mtl_jax.balancing.options import checked
from mtl_jax.balancing.solvers import (
    SolverState,
    cagrad_weights,
    combined_length,
    scaled,
    solver_diagnostics,
    solver_state,
)
from mtl_jax.errors import ConfigError

RESCALES = ("none", "one_plus_c", "one_plus_c_squared")


def cagrad(*, c: float = 0.5, rescale: str = "none") -> Balancer:
    r"""Conflict-averse gradient descent: the largest worst gain in a ball around the mean gradient :math:`g_0`,

    .. math::
        \max_d \min_i g_i^\top d \quad\text{s.t.}\quad \lVert d - g_0 \rVert \le c \lVert g_0 \rVert

    which is :math:`d = g_0 + c \lVert g_0 \rVert\, g_w / \lVert g_w \rVert` with :math:`g_w = \sum_i w_i g_i` and w
    the minimum over the simplex of :math:`g_w^\top g_0 + c \lVert g_0 \rVert \lVert g_w \rVert`.

    Args:
      c: Radius relative to the mean, >= 0: 0 is the mean, towards infinity the direction is that of MGDA; from 1 on no
        task is harmed.
      rescale: ``none``, or divide by ``one_plus_c`` or ``one_plus_c_squared``, as some code does.

    Returns:
      A balancer that needs the Gramian; its state is the latest solve.

    Raises:
      ConfigError: An option is out of its range.

    Example:
      >>> import jax.numpy as jnp
      >>> import numpy as np
      >>> from mtl_jax.balancing import aggregate, cagrad
      >>> balancer = cagrad()
      >>> direction, _ = aggregate(balancer, jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]), balancer.init(2))
      >>> print(np.asarray(direction).round(3))
      [0.184 1.204 1.204]

    Edge cases:
      ==================================== =======================
      one task                             (1 + c) its gradient
      the mean, or :math:`g_w`, vanishes   weights 0
      ==================================== =======================

      A combination vanishes at 1e-6 of the lengths of its terms, or at their rounding (0.002 in float32 for 8 tasks).

    References:
      Liu, Liu, Jin, Stone, Liu, *Conflict-Averse Gradient Descent for Multi-task Learning*, NeurIPS 2021,
      `arXiv:2110.14048 <https://arxiv.org/abs/2110.14048>`_. The length is the paper's; public code divides by
      1 + c^2 by default, or multiplies by the number of tasks. Solved to rounding, not by a few steps of descent.
    """
    if rescale not in RESCALES:
        raise ConfigError(f"cagrad(rescale) is '{rescale}'; expected one of {list(RESCALES)}. Set one of them")
    return CAGrad(checked(c, "cagrad(c)", at_least=0.0), rescale)


@register
@dataclasses.dataclass(frozen=True)
class CAGrad(Balancer):
    c: Any
    rescale: str = dataclasses.field(metadata={"static": True})

    needs: ClassVar = "gramian"
    scaling: ClassVar = "mean"

    def init(self, num_tasks: int, params: PyTree | None = None) -> SolverState:
        return solver_state()

    def weigh(
        self,
        gramian: Float[Array, "task task"],
        losses: Float[Array, " task"],
        state: SolverState,
        key: PRNGKeyArray | None,
        *,
        active: Bool[Array, " task"] | None = None,
    ) -> tuple[Float[Array, " task"], SolverState]:
        c = jnp.asarray(self.c, gramian.dtype)
        solved = cagrad_weights(gramian, c, active)
        cosines, norms, _, _ = scaled(gramian, active)
        present = jnp.ones(losses.shape, bool) if active is None else active
        mean = present / jnp.asarray(num_active(active, losses.shape[0]), gramian.dtype)
        radius, _ = combined_length(cosines, norms * mean)
        length, vanishes = combined_length(cosines, norms * solved.value)
        weights = mean + c * radius / jnp.where(vanishes, 1, length) * solved.value
        weights = jnp.where(vanishes & (c > 0), 0, weights)
        divisor = {"none": 1, "one_plus_c": 1 + c, "one_plus_c_squared": 1 + c**2}[self.rescale]
        return weights / divisor, solver_state(solved)

    def diagnostics(self, state: SolverState) -> dict[str, Float[Array, ""]]:
        return solver_diagnostics(state)
