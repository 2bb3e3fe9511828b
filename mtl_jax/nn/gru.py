"""GRU: a history as the last state of a recurrent network."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from mtl_jax.nn.context import Context
from mtl_jax.nn.mlp import Linear


class GRU(nnx.Module):
    r"""Gated recurrent unit over the items of a history, oldest first.

    .. math::
        r &= \sigma(v W_r + s U_r), \qquad u = \sigma(v W_u + s U_u) \\
        \tilde s &= \tanh(v W_s + (r \odot s) U_s), \qquad s \leftarrow u \odot s + (1 - u) \odot \tilde s

    with a bias on each sum. Padding leaves the state as it is; an empty history gives 0.

    Args:
      width: Of the embeddings, and of the state.
      max_len: Largest number of items; not read.
      rngs: Initialisation.

    References:
      Cho, van Merriënboer, Gulcehre, Bahdanau, Bougares, Schwenk, Bengio, *Learning Phrase Representations using RNN
      Encoder-Decoder for Statistical Machine Translation*, EMNLP 2014; for sessions Hidasi, Karatzoglou, Baltrunas, Tikk,
      *Session-based Recommendations with Recurrent Neural Networks*, ICLR 2016.
    """

    needs_target = False

    def __init__(self, width: int, max_len: int, *, rngs: nnx.Rngs):
        del max_len
        self.of_item = Linear(width, 3 * width, rngs=rngs)
        self.gates_of_state = Linear(width, 2 * width, use_bias=False, rngs=rngs)
        self.of_state = Linear(width, width, use_bias=False, rngs=rngs)

    def __call__(
        self,
        items: Float[Array, "batch length width"],
        mask: Float[Array, "batch length"],
        target: Float[Array, "batch width"] | None = None,
        context: Context = Context(),
    ) -> Float[Array, "batch width"]:
        read = jnp.moveaxis(self.of_item(items), 1, 0)  # for all steps at once

        def step(state, item):
            read, real = item
            reset, update, candidate = jnp.split(read, 3, axis=-1)
            of_reset, of_update = jnp.split(self.gates_of_state(state), 2, axis=-1)
            r, u = jax.nn.sigmoid(reset + of_reset), jax.nn.sigmoid(update + of_update)
            new = u * state + (1 - u) * jnp.tanh(candidate + self.of_state(r * state))
            return jnp.where(real[:, None] > 0, new, state), None

        state = jnp.zeros((items.shape[0], items.shape[-1]), read.dtype)
        return jax.lax.scan(step, state, (read, mask.T))[0]
