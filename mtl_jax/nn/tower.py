"""Task tower: from a task's representation to the outputs of its head."""

from collections.abc import Sequence

from flax import nnx
from jaxtyping import Array, Float

from mtl_jax.nn.context import Context
from mtl_jax.nn.mlp import MLP, Linear


class Tower(nnx.Module):
    """An MLP and a linear head without a final activation.

    Args:
      in_features: Width of the task's representation.
      out_features: Outputs of the head, C; with C = 1 the last axis is dropped.
      units: Hidden widths.
      dropout: Rate after each hidden layer, in [0, 1).
      use_bias: Whether the head has a bias. Cutpoints take its place in ordinal tasks.
      rngs: Initialisation.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int = 1,
        *,
        units: Sequence[int] = (128, 64),
        dropout: float = 0.2,
        use_bias: bool = True,
        rngs: nnx.Rngs,
    ):
        self.hidden = MLP(in_features, units, dropout=dropout, rngs=rngs)
        self.head = Linear(self.hidden.out_features, out_features, use_bias=use_bias, rngs=rngs)

    def __call__(self, z: Float[Array, "batch in"], context: Context = Context()) -> Float[Array, "batch *out"]:
        outputs = self.head(self.hidden(z, context))
        return outputs[:, 0] if outputs.shape[-1] == 1 else outputs
