"""Softmax gate."""

import jax
from flax import nnx
from jaxtyping import Array, Float


class Gate(nnx.Module):
    r"""Mixture weights :math:`\operatorname{softmax}(x W)` over n members: linear, without bias.

    Args:
      in_features: Width of x.
      num_members: n.
      rngs: Initialisation (Glorot-uniform).
    """

    def __init__(self, in_features: int, num_members: int, *, rngs: nnx.Rngs):
        self.kernel = nnx.Param(nnx.initializers.glorot_uniform()(rngs.params(), (in_features, num_members)))

    def __call__(self, x: Float[Array, "batch in"]) -> Float[Array, "batch member"]:
        return jax.nn.softmax(x.astype(self.kernel.dtype) @ self.kernel[...], axis=-1)
