"""FMEncoder: the sum of the products of all pairs of features beside the features themselves."""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from mtl_jax.nn.context import Context
from mtl_jax.nn.encoder import Encoder


class FMEncoder(Encoder):
    r"""Bi-interaction pooling of a factorization machine, appended to the concatenated features:

    .. math::
        \sum_{i<j} v_i \odot v_j = \tfrac12 \Bigl[\bigl(\textstyle\sum_i v_i\bigr)^2 - \sum_i v_i^2\Bigr]

    over what the features read from their tables; linear work in their number. Numbers have no table and stay out of it.

    Args:
      num_lookups: Number of features that read a table.
      num_dense: Width of the dense input.
      embedding_dim: Width of every table, and of the sum.
      stddev: Standard deviation of the tables' normal initialisation.
      dropout: Rate on the concatenation, in [0, 1).
      rngs: Initialisation; unused, because there is no parameter but the tables.

    References:
      Rendle, *Factorization Machines*, ICDM 2010; the pooled form is of He, Chua, *Neural Factorization Machines for
      Sparse Predictive Analytics*, SIGIR 2017.
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
        super().__init__(num_lookups, num_dense, embedding_dim=embedding_dim, stddev=stddev, dropout=dropout, rngs=rngs)
        if num_lookups:
            self.out_features += embedding_dim

    def __call__(
        self,
        values: Sequence[Float[Array, "batch width"]],
        dense: Float[Array, "batch dense"],
        context: Context = Context(),
    ) -> Float[Array, "batch out"]:
        x = super().__call__(values, dense, context)
        if not values:
            return x
        total, squares = sum(values), sum(value * value for value in values)
        return jnp.concatenate([x, 0.5 * (total * total - squares)], axis=-1)
