"""Towers whose last layer has a part that all domains share and a part of each one's own."""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from mtl_jax.nn.context import Context
from mtl_jax.nn.domain_linear import DomainLinear, domains_of
from mtl_jax.nn.mlp import MLP, Linear


class AugmentedTower(nnx.Module):
    r"""Feature augmentation at the input of a linear head.

    .. math:: h W_0 + h W_m + b, \qquad h = f(z)

    for a row of domain m, which is a linear head on the augmented features :math:`\Phi_m(h) = (h, 0, \dots, h, \dots, 0)`
    with one block for all domains and one for each; the zeros are not stored. Every :math:`W_m` starts at zero: a domain
    without rows to learn from is served by :math:`W_0`, as are rows whose id is none of 0 to M - 1.

    Args:
      in_features: Width of the task's representation.
      out_features: Outputs of the head, C; with C = 1 the last axis is dropped.
      num_domains: M; a model fills it in from its data.
      units: Hidden widths of f, which all domains share, each with ReLU and dropout; empty gives h = z.
      dropout: Rate after each hidden layer, in [0, 1).
      use_bias: Whether there is a bias, which all domains share.
      rngs: Initialisation.

    Raises:
      ConfigError: When called: the context tells no domains.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from mtl_jax.nn import AugmentedTower, Context
      >>> tower = AugmentedTower(4, num_domains=2, rngs=nnx.Rngs(0))
      >>> tower(jnp.ones((5, 4)), Context(domain=jnp.array([0, 1, 1, 0, 7]))).shape
      (5,)

    References:
      Daumé III, *Frustratingly Easy Domain Adaptation*, ACL 2007.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int = 1,
        *,
        num_domains: int,
        units: Sequence[int] = (),
        dropout: float = 0.0,
        use_bias: bool = True,
        rngs: nnx.Rngs,
    ):
        self.hidden = MLP(in_features, units, dropout=dropout, rngs=rngs)
        width = self.hidden.out_features
        self.common = Linear(width, out_features, use_bias=use_bias, rngs=rngs)
        self.own = DomainLinear(num_domains, width, out_features, use_bias=False, rngs=rngs)
        self.own.kernel[...] = jnp.zeros_like(self.own.kernel[...])
        self.num_domains = num_domains

    def __call__(self, z: Float[Array, "batch in"], context: Context = Context()) -> Float[Array, "batch *out"]:
        h, domain = self.hidden(z, context), domains_of(context)
        known = (domain >= 0) & (domain < self.num_domains)
        own = self.own(h, jnp.where(known, domain, 0))
        outputs = self.common(h) + jnp.where(known[:, None], own, 0)
        return outputs[:, 0] if outputs.shape[-1] == 1 else outputs
