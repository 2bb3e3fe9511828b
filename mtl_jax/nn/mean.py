"""Mean: a history as the mean of its items."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from mtl_jax.nn.context import Context


class Mean(nnx.Module):
    """Mean of the items; an empty history gives 0. Without parameters; arguments as of the others."""

    needs_target = False

    def __init__(self, width: int, max_len: int, *, rngs: nnx.Rngs):
        del width, max_len, rngs

    def __call__(
        self,
        items: Float[Array, "batch length width"],
        mask: Float[Array, "batch length"],
        target: Float[Array, "batch width"] | None = None,
        context: Context = Context(),
    ) -> Float[Array, "batch width"]:
        total = jnp.maximum(mask.sum(axis=-1, keepdims=True), 1e-12)
        return jnp.einsum("bl,blw->bw", mask / total, items)
