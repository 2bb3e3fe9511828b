"""Softmax gate, and the mixture that it weighs."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from mtl_jax.arguments import check_count, check_counts, check_number
from mtl_jax.errors import ConfigError
from mtl_jax.nn.context import Context
from mtl_jax.nn.mlp import MLP, NORMS, dropout, dropout_rate


class Gate(nnx.Module):
    r"""Mixture weights :math:`\operatorname{softmax}(s / T)` over n members, with scores :math:`s = x W`.

    The default is the gate of the MMoE paper: linear, no bias, nothing between scores and softmax. Public libraries
    differ from it, each in its own way, and their numbers with it; every difference is an option here.

    Args:
      in_features: Width of x.
      num_members: n.
      hidden: Widths of ReLU layers in front of the scores.
      bias: Whether the scores have a bias, which starts at 0.
      temperature: T > 0; a small one sharpens.
      norm: Of the scores, ``none`` or ``layer``.
      dropout: Rate on the scores, in [0, 1).
      rngs: Initialisation (Glorot-uniform).
    """

    def __init__(
        self,
        in_features: int,
        num_members: int,
        *,
        hidden: Sequence[int] = (),
        bias: bool = False,
        temperature: float = 1.0,
        norm: str = "none",
        dropout: float = 0.0,
        rngs: nnx.Rngs,
    ):
        check_count(num_members, "num_members")
        check_counts(hidden, "gate.hidden")
        check_number(temperature, "gate.temperature", least=0.0)
        if temperature == 0:
            raise ConfigError("gate.temperature is 0; expected a number > 0. Change it")
        if norm not in NORMS:
            raise ConfigError(f"gate.norm is '{norm}'; expected one of {list(NORMS)}. Change it")
        self.hidden = MLP(in_features, hidden, rngs=rngs)
        self.kernel = nnx.Param(
            nnx.initializers.glorot_uniform()(rngs.params(), (self.hidden.out_features, num_members))
        )
        self.bias = nnx.Param(jnp.zeros(num_members)) if bias else None
        self.norm = nnx.LayerNorm(num_members, rngs=rngs) if norm == "layer" else None
        self.temperature = temperature
        self.dropout = dropout_rate(dropout)
        self.num_members = num_members

    def __call__(self, x: Float[Array, "batch in"], context: Context = Context()) -> Float[Array, "batch member"]:
        scores = self.hidden(x.astype(self.kernel.dtype), context.stream("hidden")) @ self.kernel[...]
        if self.bias is not None:
            scores = scores + self.bias[...]
        if self.norm is not None:
            scores = self.norm(scores)
        scores = dropout(scores, self.dropout, context.stream("scores"))
        return jax.nn.softmax(scores / self.temperature, axis=-1)


def mix(weights: Float[Array, "batch member"], *banks: Float[Array, "_ batch hidden"]) -> Float[Array, "batch hidden"]:
    """Sum of the members of all banks, each times its weight; the weights are in the order of the banks.

    Banks are not concatenated first: that would copy every expert's output.
    """
    mixed, start = None, 0
    for bank in banks:
        stop = start + bank.shape[0]
        part = jnp.einsum("be,ebh->bh", weights[:, start:stop], bank)
        mixed, start = part if mixed is None else mixed + part, stop
    return mixed
