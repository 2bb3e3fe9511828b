"""Random loss weighting: new weights from the simplex each step."""

import dataclasses
from typing import ClassVar

import jax
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from mtl_jax.balancing.base import Balancer, NoState, register
from mtl_jax.errors import ConfigError

DISTRIBUTIONS = ("normal", "dirichlet")


def random(*, distribution: str = "normal") -> Balancer:
    r"""Weights drawn anew each step, a baseline that any method with a mechanism has to beat:

    .. math::
        w = \mathrm{softmax}(\xi) \qquad \xi_i \sim \mathcal{N}(0, 1)

    They sum to 1, so that a step is as long as the mean of the tasks and :math:`T` times shorter than their sum.

    Args:
      distribution: ``normal``, or ``dirichlet``: uniform on the simplex, :math:`w \sim \mathrm{Dir}(1, \dots, 1)`.

    Returns:
      A balancer that needs one backward pass, draws one number a task and step, and has no state.

    Raises:
      ConfigError: ``distribution`` is neither.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from mtl_jax.balancing import aggregate, random
      >>> balancer = random(distribution="dirichlet")
      >>> direction, _ = aggregate(balancer, jnp.eye(3), balancer.init(3), key=jax.random.key(0))
      >>> print(direction.sum().round(4))
      1.0

    Edge cases:
      ================ =================================================
      one task         its own gradient
      an inactive task the weights of the others have the same law as if
                       it did not exist
      ================ =================================================

    References:
      Lin, Ye, Zhang, Tsang, *Reasonable Effectiveness of Random Weighting: A Litmus Test for Multi-Task Learning*,
      TMLR 2022, `arXiv:2111.10603 <https://arxiv.org/abs/2111.10603>`_.
    """
    if distribution not in DISTRIBUTIONS:
        raise ConfigError(
            f"random(distribution) is '{distribution}'; expected one of {list(DISTRIBUTIONS)}. Set one of them"
        )
    return Random(distribution)


@register
@dataclasses.dataclass(frozen=True)
class Random(Balancer):
    distribution: str = dataclasses.field(metadata={"static": True})

    needs: ClassVar = "losses"
    scaling: ClassVar = "mean"
    stochastic: ClassVar = True
    weighted_heads: ClassVar = True

    def weigh(
        self,
        gramian: Float[Array, "task task"] | None,
        losses: Float[Array, " task"],
        state: NoState,
        key: PRNGKeyArray,
        *,
        active: Bool[Array, " task"] | None = None,
    ) -> tuple[Float[Array, " task"], NoState]:
        if self.distribution == "normal":
            draws = jax.random.normal(key, losses.shape, losses.dtype)
        else:
            # Logarithms of exponential variables, whose shares of their sum are uniform on the simplex.
            draws = -jax.random.gumbel(key, losses.shape, losses.dtype)
        return weights_from_draws(draws, active), state


def weights_from_draws(draws: Float[Array, " task"], active: Bool[Array, " task"] | None) -> Float[Array, " task"]:
    """The softmax over the active tasks."""
    return jax.nn.softmax(draws, where=active)
