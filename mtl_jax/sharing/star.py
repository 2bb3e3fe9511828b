"""STAR: shared weights times weights of the row's domain."""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from mtl_jax.arguments import check_count, check_counts
from mtl_jax.nn import MLP
from mtl_jax.nn.domain_linear import by_row, domain_linear, domains_of
from mtl_jax.nn.mlp import dropout as drop
from mtl_jax.nn.mlp import dropout_rate
from mtl_jax.nn.partitioned_norm import PartitionedNorm
from mtl_jax.sharing.base import Context, Strategy


class STAR(Strategy):
    r"""Star topology: every layer's weights are shared ones times those of the row's domain m.

    .. math::
        h^l &= \operatorname{ReLU}(h^{l-1} (W^l \odot W_m^l) + b^l + b_m^l), \qquad
        h^0 = \operatorname{PN}_m(x) \\
        z_k &= [h^L;\, \operatorname{MLP}_{\mathrm{aux}}([x;\, e_m])]

    with partitioned normalisation PN (:class:`mtl_jax.nn.partitioned_norm.PartitionedNorm`) and an embedding :math:`e_m` of
    the domain. A tower that is linear in z_k thus adds a logit of the star and one of the auxiliary network. At the start
    :math:`W_m = 1` and :math:`b_m = 0`: one network for all domains.

    Args:
      in_features: Width of x.
      tasks: Task names.
      num_domains: M.
      units: Layer widths of the star.
      auxiliary_units: Layer widths of the auxiliary network.
      embedding_features: Width of the domain's embedding.
      dropout: Rate after each layer of both, in [0, 1).
      rngs: Initialisation.

    Raises:
      ConfigError: ``context.domain`` is None.

    Labels: all parameters are ``shared``, for a domain is no task. The moments are no parameters.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from mtl_jax.nn import Context
      >>> from mtl_jax.sharing import STAR
      >>> strategy = STAR(16, ("click", "buy"), num_domains=3, units=(32, 8), auxiliary_units=(4,), rngs=nnx.Rngs(0))
      >>> context = Context(domain=jnp.array([0, 2, 1, 1, 0]))
      >>> {task: z.shape for task, z in strategy(jnp.ones((5, 16)), context).items()}
      {'click': (5, 12), 'buy': (5, 12)}

    References:
      Sheng, Zhao, Zhou, Ding, Dai, Luo, Yang, Lv, Zhang, Deng, Zhu, *One Model to Serve All: Star Topology Adaptive
      Recommender for Multi-Domain CTR Prediction*, CIKM 2021, arXiv 2101.11427. Public code activates or normalises the
      output logit, starts from random biases, or has an auxiliary network that does not see the domain.
    """

    widths = ("units", "auxiliary_units")

    def __init__(
        self,
        in_features: int,
        tasks: Sequence[str],
        *,
        num_domains: int,
        units: Sequence[int] = (256, 128, 64),
        auxiliary_units: Sequence[int] = (32,),
        embedding_features: int = 16,
        dropout: float = 0.2,
        rngs: nnx.Rngs,
    ):
        self.tasks = tuple(tasks)
        check_counts(auxiliary_units, "auxiliary_units", empty=False)
        self.norm = PartitionedNorm(in_features, num_domains, rngs=rngs)
        self.network = StarNetwork(in_features, units, num_domains, dropout=dropout, rngs=rngs)
        self.embedding = domain_embedding(num_domains, embedding_features, rngs=rngs)
        self.auxiliary = MLP(in_features + embedding_features, auxiliary_units, dropout=dropout, rngs=rngs)
        self.out_features = self.network.out_features + self.auxiliary.out_features

    def common(self, x: Float[Array, "batch in"], context: Context = Context()) -> Float[Array, "batch hidden"]:
        domain = domains_of(context)
        star = self.network(self.norm(x, context), domain, context.stream("star"))
        embedding = by_row(self.embedding[...], domain)
        known = jnp.concatenate([x.astype(embedding.dtype), embedding], axis=-1)
        return jnp.concatenate([star, self.auxiliary(known, context.stream("auxiliary"))], axis=-1)

    def head(self, task: str, common: Float[Array, "batch hidden"]) -> Float[Array, "batch hidden"]:
        return common


class StarNetwork(nnx.Module):
    """Layers whose weights are the product of shared ones and of those of the row's partition, biases the sum.

    Args:
      in_features: Width of x.
      units: Layer widths, ReLU after each.
      num_partitions: Of domains or clusters.
      dropout: Rate after each layer, in [0, 1).
      rngs: Initialisation.
    """

    def __init__(
        self, in_features: int, units: Sequence[int], num_partitions: int, *, dropout: float = 0.0, rngs: nnx.Rngs
    ):
        check_counts(units, "units", empty=False)
        widths = (in_features, *units)
        self.out_features = widths[-1]
        self.dropout = dropout_rate(dropout)
        self.layers = nnx.List(
            [StarLinear(i, o, num_partitions, rngs=rngs) for i, o in zip(widths[:-1], widths[1:], strict=True)]
        )

    def __call__(
        self, x: Float[Array, "batch in"], partition: Int[Array, " batch"], context: Context = Context()
    ) -> Float[Array, "batch out"]:
        for index, layer in enumerate(self.layers):
            x = drop(nnx.relu(layer(x, partition)), self.dropout, context.stream(f"layer {index}"))
        return x


class StarLinear(nnx.Module):
    """A linear layer with the product of a shared kernel and that of the row's partition, and the sum of two biases.

    Args:
      in_features: Width of x.
      out_features: Width of the output.
      num_partitions: Of domains or clusters.
      rngs: Initialisation: shared weights Glorot-uniform, those of partitions 1, all biases 0.
    """

    def __init__(self, in_features: int, out_features: int, num_partitions: int, *, rngs: nnx.Rngs):
        shape = (in_features, out_features)
        self.kernel = nnx.Param(nnx.initializers.glorot_uniform()(rngs.params(), shape))
        self.bias = nnx.Param(jnp.zeros(out_features))
        self.own_kernel = nnx.Param(jnp.ones((num_partitions, *shape)))
        self.own_bias = nnx.Param(jnp.zeros((num_partitions, out_features)))

    def __call__(self, x: Float[Array, "batch in"], partition: Int[Array, " batch"]) -> Float[Array, "batch out"]:
        kernel, bias = self.kernel[...] * self.own_kernel[...], self.bias[...] + self.own_bias[...]
        return domain_linear(x, kernel, bias, partition)


def domain_embedding(num_domains: int, features: int, *, rngs: nnx.Rngs) -> nnx.Param:
    """A small table with a vector for every domain, initialised like the tables of features."""
    check_count(features, "embedding_features")
    return nnx.Param(nnx.initializers.normal(0.01)(rngs.params(), (num_domains, features)))
