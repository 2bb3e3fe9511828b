"""A bank of experts, evaluated together."""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from mtl_jax.arguments import check_count, check_counts
from mtl_jax.nn.adapter import Adapters
from mtl_jax.nn.context import Context
from mtl_jax.nn.mlp import dropout, dropout_rate


class Experts(nnx.Module):
    r"""E independent MLPs of one shape, with stacked weights.

    .. math::
        h_e^{l} = \operatorname{ReLU}(h_e^{l-1} W_e^l + b_e^l), \qquad h_e^0 = x

    The expert axis leads: on CPU a batch-major layout costs 1.5 to 2 times the step.

    Args:
      in_features: Width of x.
      units: Layer widths of every expert.
      num_experts: E.
      dropout: Rate after each layer, in [0, 1).
      rngs: Initialisation; each expert has the fan-in of one expert (Glorot-uniform).

    Attributes:
      aux: As of :class:`mtl_jax.nn.MLP`; every expert has an adapter of its own.
    """

    def __init__(
        self,
        in_features: int,
        units: Sequence[int],
        *,
        num_experts: int,
        dropout: float = 0.0,
        rngs: nnx.Rngs,
    ):
        check_counts(units, "expert_units", empty=False)
        check_count(num_experts, "num_experts")
        widths = (in_features, *units)
        self.out_features = widths[-1]
        self.num_experts = num_experts
        self.dropout = dropout_rate(dropout)
        self.layers = nnx.List(
            [StackedLinear(num_experts, i, o, rngs=rngs) for i, o in zip(widths[:-1], widths[1:], strict=True)]
        )
        self.aux = Adapters()

    def __call__(self, x: Float[Array, "batch in"], context: Context = Context()) -> Float[Array, "expert batch out"]:
        for index, layer in enumerate(self.layers):
            x = dropout(nnx.relu(layer(x)), self.dropout, context.stream(f"layer {index}"))
            x = self.aux(index, x)
        return x


class StackedLinear(nnx.Module):
    """E linear layers. The input is common to all (``[batch, in]``) or one each (``[expert, batch, in]``).

    A common input is multiplied with all kernels side by side, in one wide matrix product. Forward and backward of experts
    191-64-32 on 2,048 rows (ms, least of 25; 2 CPU cores shared with other work, JAX 0.10.2, 2026-11-29):

    ======= ============ ===================== ================= ====================
    experts this layout  ``bi,eio->ebo``       a loop, stacked   a loop over networks
    ======= ============ ===================== ================= ====================
    4       7.8          10.1                  9.9               7.6
    8       12.5         18.1                  34.6              14.4
    ======= ============ ===================== ================= ====================
    """

    def __init__(self, num_stacks: int, in_features: int, out_features: int, *, rngs: nnx.Rngs):
        init = nnx.initializers.glorot_uniform(batch_axis=(0,))
        self.kernel = nnx.Param(init(rngs.params(), (num_stacks, in_features, out_features)))
        self.bias = nnx.Param(jnp.zeros((num_stacks, out_features)))

    def __call__(self, x: Float[Array, "*expert batch in"]) -> Float[Array, "expert batch out"]:
        kernel, x = self.kernel[...], x.astype(self.kernel.dtype)
        if x.ndim == 3:
            return jnp.einsum("ebi,eio->ebo", x, kernel) + self.bias[...][:, None]
        wide = x @ jnp.moveaxis(kernel, 0, 1).reshape(kernel.shape[1], -1)
        return jnp.moveaxis(wide.reshape(len(x), *kernel.shape[::2]), 1, 0) + self.bias[...][:, None]
