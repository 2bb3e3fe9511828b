"""Weights of another method, kept over some steps, so that task gradients are compared now and then only."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from mtl_jax.balancing.base import Balancer, register
from mtl_jax.balancing.options import checked_count
from mtl_jax.balancing.wrapper import Wrapper
from mtl_jax.errors import ConfigError


def reuse(base: Balancer, *, every: int) -> Balancer:
    """Weighs at every n-th step and keeps the weights in between. The train step then takes one backward pass, where a
    comparison of T tasks takes T; it puts this around any method by ``balancing.update_every``.

    Args:
      base: The other method, one that compares the gradients of one batch.
      every: n, at least 1.

    Returns:
      A balancer that needs what ``base`` does; its state is that of ``base``, the weights, the products that they came
      from, and the steps since then.

    Raises:
      ConfigError: ``every`` is no whole number >= 1, or ``base`` is no such balancer.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtl_jax.balancing import aggregate, ntkmtl
      >>> from mtl_jax.balancing.reuse import reuse
      >>> balancer = reuse(ntkmtl(exponent=1.0), every=2)
      >>> state = balancer.init(2)
      >>> for length in (1.0, 3.0, 3.0):
      ...     _, state = aggregate(balancer, jnp.diag(jnp.array([length, 1.0])), state)
      ...     print(state.weights.round(2))
      [2. 2.]
      [2. 2.]
      [ 1.11 10.  ]

    Edge cases:
      ==================================================== =================================================
      a task that is absent                                weight 0; its weight of before stays
      a task that was absent when weights were found       its weight of before; in the train step, with none
                                                           so far, it waits for the next time
      micro-batches, or a run axis that is vmapped         the same numbers, and nothing is saved
      ==================================================== =================================================

    References:
      Lin, Ye, *LibMTL: A Python Library for Multi-Task Learning*, JMLR 2023, and the authors of Nash-MTL (Navon et al.,
      ICML 2022) reuse weights in this way.
    """
    if not isinstance(base, Balancer) or base.needs != "gramian" or base.num_batches > 1 or base.owns_step:
        name = f"'{type(base).__name__}'" if isinstance(base, Balancer) else repr(base)
        expectation = "expected a method that compares the gradients of one batch, such as pcgrad()"
        raise ConfigError(
            f"update_every reuses the weights of {name}; {expectation}. Leave it out, or change the method"
        )
    return Reuse(base, checked_count(every, "update_every", at_least=1))


class ReuseState(NamedTuple):
    """The state of the other method, its latest weights and the products that they came from, and the steps since."""

    base: Any
    weights: Float[Array, " task"]
    products: Float[Array, "task task"]
    steps: Int[Array, ""]


@register
@dataclasses.dataclass(frozen=True)
class Reuse(Wrapper):
    base: Balancer
    every: int = dataclasses.field(metadata={"static": True})

    homogeneity = None

    def init(self, num_tasks: int, params: PyTree | None = None) -> ReuseState:
        weights, products = jnp.ones(num_tasks), jnp.zeros((num_tasks, num_tasks))
        return ReuseState(self.base.init(num_tasks, params), weights, products, jnp.zeros((), jnp.int32))

    def kept(self, state: ReuseState) -> tuple[Bool[Array, ""], Float[Array, "task task"]]:
        return state.steps == 0, state.products

    def weigh(
        self,
        gramian: Float[Array, "task task"],
        losses: Float[Array, " task"],
        state: ReuseState,
        key: PRNGKeyArray | None,
        *,
        active: Bool[Array, " task"] | None = None,
    ) -> tuple[Float[Array, " task"], ReuseState]:
        active = jnp.ones(losses.shape, bool) if active is None else active

        def found():
            weights, base = self.base.weigh(gramian, losses, state.base, key, active=active)
            weights = jnp.where(active, weights, state.weights).astype(state.weights.dtype)
            products = jnp.where(active[:, None] & active, gramian, state.products)
            return base, weights, products.astype(state.products.dtype)

        base, weights, products = jax.lax.cond(
            state.steps == 0, found, lambda: (state.base, state.weights, state.products)
        )
        new = ReuseState(base, weights, products, (state.steps + 1) % self.every)
        return jnp.where(active, weights, 0).astype(losses.dtype), new
