"""Batch normalisation of a bank of experts."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from mtl_jax.nn.batch_norm import EPSILON, batch_moments, moments
from mtl_jax.nn.context import Context
from mtl_jax.nn.state import State


class StackedBatchNorm(nnx.Module):
    """E batch norms, one for each expert: :class:`mtl_jax.nn.BatchNorm` with stacked arrays.

    Args:
      num_stacks: E.
      features: Width of each.
    """

    def __init__(self, num_stacks: int, features: int):
        shape = (num_stacks, features)
        self.scale, self.bias = nnx.Param(jnp.ones(shape)), nnx.Param(jnp.zeros(shape))
        self.mean, self.variance = State(jnp.zeros(shape)), State(jnp.zeros(shape))
        self.seen = State(jnp.zeros((num_stacks, 1)))

    def __call__(
        self, x: Float[Array, "expert batch features"], context: Context = Context()
    ) -> Float[Array, "expert batch features"]:
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        found = ()
        if context.train:
            of_batch, enough = jax.vmap(lambda one: batch_moments(one, context))(x)
            found = of_batch, enough[:, None]
        mean, variance = moments(self, *found)
        y = (x - mean[:, None]) * lax.rsqrt(variance + EPSILON)[:, None]
        return y.astype(self.scale.dtype) * self.scale[...][:, None] + self.bias[...][:, None]
