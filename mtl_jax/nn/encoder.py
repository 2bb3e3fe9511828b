"""Encoder: from features to the input of a sharing strategy."""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from mtl_jax.arguments import check_count, check_number
from mtl_jax.nn.context import Context
from mtl_jax.nn.mlp import dropout, dropout_rate


class Encoder(nnx.Module):
    """Concatenates what every feature reads from its table with the standardised numbers.

    Args:
      num_lookups: Number of features that read a table.
      num_dense: Width of the dense input.
      embedding_dim: Width of every table.
      stddev: Standard deviation of the tables' normal initialisation.
      dropout: Rate on the concatenation, in [0, 1).
      rngs: Initialisation; unused, because a concatenation has no parameters (the tables belong to the model).
    """

    def __init__(
        self,
        num_lookups: int,
        num_dense: int,
        *,
        embedding_dim: int = 16,
        stddev: float = 0.01,
        dropout: float = 0.0,
        rngs: nnx.Rngs,
    ):
        check_count(embedding_dim, "embedding_dim")
        check_number(stddev, "stddev", least=0.0)
        self.embedding_dim = embedding_dim
        self.stddev = stddev
        self.dropout = dropout_rate(dropout)
        self.out_features = num_lookups * embedding_dim + num_dense

    def __call__(
        self,
        values: Sequence[Float[Array, "batch width"]],
        dense: Float[Array, "batch dense"],
        context: Context = Context(),
    ) -> Float[Array, "batch out"]:
        return dropout(jnp.concatenate([*values, dense], axis=-1), self.dropout, context)
