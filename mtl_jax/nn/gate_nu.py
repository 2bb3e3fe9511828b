"""GateNU: a factor for every unit, around 1."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from mtl_jax.arguments import check_number
from mtl_jax.errors import ConfigError
from mtl_jax.nn.mlp import Linear


class GateNU(nnx.Module):
    r"""Two layers that end in a scaled sigmoid:

    .. math::
        \operatorname{GateNU}(v) = \gamma\, \sigma(\operatorname{ReLU}(v W_1 + b_1) W_2 + b_2)

    W_2 starts at 0 and every factor at γ / 2, so that with γ = 2 whatever is multiplied starts unchanged (ours).

    Args:
      in_features: Width of v.
      out_features: Number of factors, and the width in between.
      gamma: γ > 0; factors lie between 0 and γ.
      rngs: Initialisation of W_1 (Glorot-uniform).

    References:
      Chang et al., *PEPNet: Parameter and Embedding Personalized Network for Infusing with Personalized Prior Information*,
      KDD 2023, arXiv 2302.01115.
    """

    def __init__(self, in_features: int, out_features: int, *, gamma: float = 2.0, rngs: nnx.Rngs):
        check_number(gamma, "gamma", least=0.0)
        if gamma == 0:
            raise ConfigError("gamma is 0; expected a number > 0. Change it")
        self.hidden = Linear(in_features, out_features, rngs=rngs)
        self.output = Linear(out_features, out_features, rngs=rngs)
        self.output.kernel = nnx.Param(jnp.zeros((out_features, out_features)))
        self.gamma = gamma

    def __call__(self, v: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        return self.gamma * jax.nn.sigmoid(self.output(nnx.relu(self.hidden(v))))
