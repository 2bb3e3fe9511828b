"""CrossEncoder: explicit products of features, of bounded degree, before any task network."""

from collections.abc import Sequence

from flax import nnx
from jaxtyping import Array, Float

from mtl_jax.arguments import check_count
from mtl_jax.nn.context import Context
from mtl_jax.nn.encoder import Encoder
from mtl_jax.nn.mlp import Linear


class CrossEncoder(Encoder):
    r"""The cross network of DCN-v2 on the concatenated features:

    .. math::
        x_{l+1} = x_0 \odot (x_l W_l + b_l) + x_l

    After n layers an output is a polynomial of degree n + 1 in the features.

    Args:
      num_lookups: Number of features that read a table.
      num_dense: Width of the dense input.
      num_layers: n.
      rank: Rank of W, which is then a product of two thin matrices; None: full.
      embedding_dim: Width of every table.
      stddev: Standard deviation of the tables' normal initialisation.
      dropout: Rate on the concatenation, in [0, 1).
      rngs: Initialisation.

    References:
      Wang, Shivanna, Cheng, Jain, Lin, Hong, Chi, *DCN V2: Improved Deep & Cross Network and Practical Lessons for
      Web-scale Learning to Rank Systems*, WWW 2021.
    """

    def __init__(
        self,
        num_lookups: int,
        num_dense: int,
        *,
        num_layers: int = 2,
        rank: int | None = None,
        embedding_dim: int = 16,
        stddev: float = 0.01,
        dropout: float = 0.0,
        rngs: nnx.Rngs,
    ):
        super().__init__(num_lookups, num_dense, embedding_dim=embedding_dim, stddev=stddev, dropout=dropout, rngs=rngs)
        check_count(num_layers, "encoder.num_layers")
        width = self.out_features

        def layer() -> nnx.List:
            if rank is None:
                return nnx.List([Linear(width, width, rngs=rngs)])
            check_count(rank, "encoder.rank")
            return nnx.List([Linear(width, rank, use_bias=False, rngs=rngs), Linear(rank, width, rngs=rngs)])

        self.layers = nnx.List([layer() for _ in range(num_layers)])

    def __call__(
        self,
        values: Sequence[Float[Array, "batch width"]],
        dense: Float[Array, "batch dense"],
        context: Context = Context(),
    ) -> Float[Array, "batch out"]:
        first = x = super().__call__(values, dense, context)
        for layer in self.layers:
            crossed = x
            for part in layer:
                crossed = part(crossed)
            x = first * crossed + x
        return x
