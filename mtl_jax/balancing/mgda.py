"""MGDA: the shortest convex combination of the task gradients."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from mtl_jax.balancing.base import Balancer, register
from mtl_jax.balancing.solvers import SolverState, min_norm, solver_diagnostics, solver_state
from mtl_jax.errors import ConfigError

NORMALIZATIONS = ("none", "l2", "loss", "loss+")


def mgda(*, normalize: str = "none") -> Balancer:
    r"""Multiple-gradient descent: all tasks descend, until no direction is left in which they can.

    .. math::
        w = \arg\min_{\alpha \in \Delta} \bigl\lVert \textstyle\sum_i \alpha_i g_i / \nu_i \bigr\rVert^2
        \qquad d = \sum_i w_i g_i

    Without normalisation :math:`d^\top g_i \ge \lVert d \rVert^2` for every task.

    Args:
      normalize: :math:`\nu_i`: ``none`` 1, ``l2`` the length of the gradient, ``loss`` the loss, ``loss+`` their
        product. The weights are those of the normalised gradients and act on the gradients as they are.

    Returns:
      A balancer that needs the Gramian (and the losses under ``loss`` and ``loss+``); its state is the latest solve.

    Raises:
      ConfigError: ``normalize`` is none of the four.

    Example:
      >>> import jax.numpy as jnp
      >>> import numpy as np
      >>> from mtl_jax.balancing import aggregate, mgda
      >>> balancer = mgda()
      >>> direction, _ = aggregate(balancer, jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]), balancer.init(2))
      >>> print(np.asarray(direction).round(4) + 0)
      [0. 1. 1.]

    Edge cases:
      ============================== ===================================================
      one task                       its own gradient
      0 in the hull of the gradients 0: the shared parameters stay
      two equal gradients            half each
      a loss <= 0 (``loss``)         a non-finite step
      ============================== ===================================================

    References:
      Desideri, *Multiple-gradient descent algorithm (MGDA) for multiobjective optimization*, C. R. Acad. Sci. 2012;
      Sener, Koltun, *Multi-Task Learning as Multi-Objective Optimization*, NeurIPS 2018,
      `arXiv:1810.04650 <https://arxiv.org/abs/1810.04650>`_. Solved exactly, by active sets; Frank-Wolfe, as published,
      is far from the minimum after its 100 to 250 steps. Some code applies the weights to the normalised gradients, or
      multiplies by the number of tasks.
    """
    if normalize not in NORMALIZATIONS:
        raise ConfigError(f"mgda(normalize) is '{normalize}'; expected one of {list(NORMALIZATIONS)}. Set one of them")
    return MGDA(normalize)


@register
@dataclasses.dataclass(frozen=True)
class MGDA(Balancer):
    normalize: str = dataclasses.field(metadata={"static": True})

    needs: ClassVar = "gramian"
    scaling: ClassVar = "mean"

    @property
    def reads_losses(self) -> bool:
        return self.normalize in ("loss", "loss+")

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
        factors = jnp.ones_like(losses)
        if self.normalize in ("l2", "loss+"):
            lengths = jnp.sqrt(jnp.maximum(jnp.diagonal(gramian), 0))
            factors = factors / jnp.where(lengths > 0, lengths, 1)
        if self.reads_losses:
            factors = factors / jnp.where(losses > 0, losses, 1)
            # Relative, so that squares of small losses stay in the range of the type.
            factors = factors / jnp.max(factors if active is None else jnp.where(active, factors, 0))
        solved = min_norm(factors[:, None] * gramian * factors, active)
        weights = solved.value
        if self.reads_losses:
            weights = jnp.where(jnp.all(losses > 0, where=active), weights, jnp.nan)
        return weights, solver_state(solved)

    def diagnostics(self, state: SolverState) -> dict[str, Float[Array, ""]]:
        return solver_diagnostics(state)
