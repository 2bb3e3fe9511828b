"""Transformer: a history by self-attention over its items."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from mtl_jax.arguments import check_count
from mtl_jax.errors import ConfigError
from mtl_jax.nn.context import Context
from mtl_jax.nn.mlp import Linear, dropout, dropout_rate


class Transformer(nnx.Module):
    r"""Blocks of SASRec; the output at the newest item stands for the history.

    .. math::
        x &\leftarrow x + \operatorname{Attention}(N(x), x, x), \qquad
        x \leftarrow x + \operatorname{FFN}(N(x)), \qquad \operatorname{FFN}(x) = \operatorname{ReLU}(x W_1 + b_1) W_2 + b_2

    Items look at themselves and at older ones. A learned position, counted from the newest item, is added to each
    embedding. An empty history gives 0.

    Args:
      width: Of the embeddings, and of the output.
      max_len: Largest number of items.
      num_blocks: Blocks one after the other.
      num_heads: Heads of the attention; they divide the width.
      dropout: Rate on the embeddings and on what each part adds, in [0, 1).
      rngs: Initialisation.

    Raises:
      ConfigError: The heads do not divide the width.

    References:
      Kang, McAuley, *Self-Attentive Sequential Recommendation*, ICDM 2018: queries are normalised, keys and values are
      not.
    """

    needs_target = False

    def __init__(
        self,
        width: int,
        max_len: int,
        *,
        num_blocks: int = 1,
        num_heads: int = 1,
        dropout: float = 0.0,
        rngs: nnx.Rngs,
    ):
        check_count(num_blocks, "history.num_blocks")
        check_count(num_heads, "history.num_heads")
        if width % num_heads:
            raise ConfigError(f"history.num_heads is {num_heads}; expected a divisor of the width {width}. Change it")
        self.positions = nnx.Param(nnx.initializers.normal(0.01)(rngs.params(), (max_len, width)))
        self.blocks = nnx.List([_Block(width, num_heads, dropout, rngs) for _ in range(num_blocks)])
        self.norm = nnx.LayerNorm(width, epsilon=1e-5, rngs=rngs)
        self.dropout = dropout_rate(dropout)

    def __call__(
        self,
        items: Float[Array, "batch length width"],
        mask: Float[Array, "batch length"],
        target: Float[Array, "batch width"] | None = None,
        context: Context = Context(),
    ) -> Float[Array, "batch width"]:
        real = mask > 0
        age = jnp.cumsum(real[:, ::-1], axis=1)[:, ::-1] - 1  # of the newest item 0, whichever side is padded
        x = items.astype(self.positions.dtype) + self.positions[...][jnp.maximum(age, 0)]
        x = dropout(x, self.dropout, context.stream("items"))
        earlier = (age[:, :, None] <= age[:, None, :]) & real[:, None, :]
        for index, block in enumerate(self.blocks):
            x = block(x, earlier, context.stream(f"block {index}"))
        newest = (real & (age == 0)).astype(x.dtype)
        return jnp.einsum("bl,blw->bw", newest, self.norm(x))


class _Block(nnx.Module):
    def __init__(self, width: int, num_heads: int, dropout: float, rngs: nnx.Rngs):
        self.query, self.key, self.value = (Linear(width, width, use_bias=False, rngs=rngs) for _ in range(3))
        self.first, self.second = Linear(width, width, rngs=rngs), Linear(width, width, rngs=rngs)
        self.attention_norm, self.ffn_norm = (nnx.LayerNorm(width, epsilon=1e-5, rngs=rngs) for _ in range(2))
        self.num_heads = num_heads
        self.dropout = dropout_rate(dropout)

    def __call__(self, x, allowed, context: Context):
        def heads(y):
            return y.reshape(*y.shape[:-1], self.num_heads, -1)

        query, key, value = heads(self.query(self.attention_norm(x))), heads(self.key(x)), heads(self.value(x))
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
        weights = jax.nn.softmax(jnp.where(allowed[:, None], scores, -1e30), axis=-1)
        attended = jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(x.shape)
        x = x + dropout(attended, self.dropout, context.stream("attention"))
        fed = self.second(nnx.relu(self.first(self.ffn_norm(x))))
        return x + dropout(fed, self.dropout, context.stream("ffn"))
