"""TargetAttention: a history as the sum of what matters for the item at hand."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from mtl_jax.nn.context import Context
from mtl_jax.nn.mlp import MLP, Linear


class TargetAttention(nnx.Module):
    r"""The activation unit of the deep interest network.

    .. math::
        h = \sum_i a(v_i, t) \, v_i, \qquad a(v, t) = \operatorname{MLP}([v;\, t;\, v - t;\, v \odot t])

    over the items v of the history, with the embedding t of the item that is scored.

    Args:
      width: Of the embeddings, and of h.
      max_len: Largest number of items; not read.
      units: Layer widths of the MLP (ReLU after each), before its one output.
      softmax: Whether weights are normalised over the history. The paper does without, so that h grows with the interest.
      dropout: Rate after each layer of the MLP, in [0, 1).
      rngs: Initialisation.

    References:
      Zhou, Zhu, Song, Fan, Zhu, Ma, Yan, Jin, Li, Gai, *Deep Interest Network for Click-Through Rate Prediction*,
      KDD 2018. ReLU in place of Dice, whose moments would be those of a batch.
    """

    needs_target = True

    def __init__(
        self,
        width: int,
        max_len: int,
        *,
        units: Sequence[int] = (36,),
        softmax: bool = False,
        dropout: float = 0.0,
        rngs: nnx.Rngs,
    ):
        del max_len
        self.hidden = MLP(4 * width, units, dropout=dropout, rngs=rngs)
        self.score = Linear(self.hidden.out_features, 1, rngs=rngs)
        self.softmax = softmax

    def __call__(
        self,
        items: Float[Array, "batch length width"],
        mask: Float[Array, "batch length"],
        target: Float[Array, "batch width"],
        context: Context = Context(),
    ) -> Float[Array, "batch width"]:
        t = jnp.broadcast_to(target[:, None], items.shape)
        pairs = jnp.concatenate([items, t, items - t, items * t], axis=-1)
        scores = self.score(self.hidden(pairs, context))[..., 0]
        if self.softmax:
            scores = jax.nn.softmax(jnp.where(mask > 0, scores, -1e30), axis=-1)
        return jnp.einsum("bl,blw->bw", jnp.where(mask > 0, scores, 0), items)
