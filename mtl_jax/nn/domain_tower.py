"""A tower for each domain: from a task's representation to the outputs of its head, by the row's domain."""

from collections.abc import Sequence

from flax import nnx
from jaxtyping import Array, Float

from mtl_jax.arguments import check_counts
from mtl_jax.nn.context import Context
from mtl_jax.nn.domain_linear import DomainLinear, domains_of
from mtl_jax.nn.mlp import dropout as drop
from mtl_jax.nn.mlp import dropout_rate


class DomainTower(nnx.Module):
    """:class:`mtl_jax.nn.Tower` once for each domain, of which every row passes through its own.

    Args:
      in_features: Width of the task's representation.
      out_features: Outputs of the head, C; with C = 1 the last axis is dropped.
      num_domains: M; a model fills it in from its data.
      units: Hidden widths, each with ReLU and dropout.
      dropout: Rate after each hidden layer, in [0, 1).
      use_bias: Whether the heads have a bias.
      rngs: Initialisation.

    Raises:
      ConfigError: When called: the context tells no domains.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from mtl_jax.nn import Context, DomainTower
      >>> tower = DomainTower(4, num_domains=3, units=(8,), rngs=nnx.Rngs(0))
      >>> tower(jnp.ones((5, 4)), Context(domain=jnp.array([0, 1, 2, 1, 0]))).shape
      (5,)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int = 1,
        *,
        num_domains: int,
        units: Sequence[int] = (128, 64),
        dropout: float = 0.2,
        use_bias: bool = True,
        rngs: nnx.Rngs,
    ):
        check_counts(units, "units")
        widths = (in_features, *units)
        self.dropout = dropout_rate(dropout)
        self.layers = nnx.List(
            [DomainLinear(num_domains, i, o, rngs=rngs) for i, o in zip(widths[:-1], widths[1:], strict=True)]
        )
        self.head = DomainLinear(num_domains, widths[-1], out_features, use_bias=use_bias, rngs=rngs)

    def __call__(self, z: Float[Array, "batch in"], context: Context = Context()) -> Float[Array, "batch *out"]:
        domain = domains_of(context)
        for index, layer in enumerate(self.layers):
            z = drop(nnx.relu(layer(z, domain)), self.dropout, context.stream(f"layer {index}"))
        outputs = self.head(z, domain)
        return outputs[:, 0] if outputs.shape[-1] == 1 else outputs
