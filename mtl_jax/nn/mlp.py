"""Multilayer perceptron and dropout."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from mtl_jax.arguments import check_counts, check_number
from mtl_jax.nn.adapter import Adapters
from mtl_jax.nn.context import Context

NORMS = ("none", "layer")


class MLP(nnx.Module):
    """Per entry of ``units``: linear, norm, ReLU, dropout. The last entry is activated too.

    Args:
      in_features: Width of the input.
      units: Layer widths; empty gives the identity.
      norm: ``none`` or ``layer``.
      dropout: Rate in [0, 1).
      rngs: Initialisation; needs the stream ``params``. Weights are Glorot-uniform, biases 0.

    Attributes:
      aux: Adapters after entries, their dropout included, where a transfer puts any.
    """

    def __init__(
        self,
        in_features: int,
        units: Sequence[int],
        *,
        norm: str = "none",
        dropout: float = 0.0,
        rngs: nnx.Rngs,
    ):
        if norm not in NORMS:
            raise ValueError(f"norm '{norm}' is unknown; expected one of {list(NORMS)}")
        check_counts(units, "units")
        widths = (in_features, *units)
        self.out_features = widths[-1]
        self.dropout = dropout_rate(dropout)
        self.layers = nnx.List([Linear(i, o, rngs=rngs) for i, o in zip(widths[:-1], widths[1:], strict=True)])
        self.norms = nnx.List([nnx.LayerNorm(o, rngs=rngs) for o in units] if norm == "layer" else [])
        self.aux = Adapters()

    def __call__(self, x: Float[Array, "*batch in"], context: Context = Context()) -> Float[Array, "*batch out"]:
        for index in range(len(self.layers)):
            x = self.entry(index, x, context)
        return x

    def entry(self, index: int, x: Float[Array, "*batch in"], context: Context) -> Float[Array, "*batch out"]:
        """What one entry of ``units`` makes of its input."""
        x = self.layers[index](x)
        if self.norms:
            x = self.norms[index](x)
        return self.aux(index, dropout(nnx.relu(x), self.dropout, context.stream(f"layer {index}")))


class Linear(nnx.Module):
    """A linear layer with Glorot-uniform weights, computed in the type of its weights.

    Args:
      in_features: Width of the input.
      out_features: Width of the output.
      use_bias: Whether there is a bias, which starts at 0.
      rngs: Initialisation.
    """

    def __init__(self, in_features: int, out_features: int, *, use_bias: bool = True, rngs: nnx.Rngs):
        init = nnx.initializers.glorot_uniform()
        self.kernel = nnx.Param(init(rngs.params(), (in_features, out_features)))
        self.bias = nnx.Param(jnp.zeros(out_features)) if use_bias else None

    def __call__(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        y = x.astype(self.kernel.dtype) @ self.kernel[...]
        return y if self.bias is None else y + self.bias[...]


class Rate(nnx.Variable):
    """A dropout rate above 0: an array of the model that no optimizer touches, so that runs of several rates share one
    compiled program. A rate of 0 is no dropout, and another program."""


def dropout(x: Float[Array, "..."], rate: float | Rate | None, context: Context) -> Float[Array, "..."]:
    """Zeroes entries with probability ``rate`` in training and scales the others by 1 / (1 - rate).

    Raises:
      ValueError: If the context trains without a key.
    """
    if rate is None or not context.train:
        return x
    if context.rngs is None:
        raise ValueError("dropout in training needs a key; pass Context(train=True, rngs=key)")
    kept = 1.0 - (rate[...] if isinstance(rate, Rate) else rate)
    return jnp.where(jax.random.bernoulli(context.rngs, kept, x.shape), x / jnp.asarray(kept, x.dtype), 0.0)


def dropout_rate(rate: float) -> Rate | None:
    """The rate as part of a module, None for 0; a ConfigError for anything but a number in [0, 1)."""
    check_number(rate, "dropout", least=0.0, below=1.0)
    return Rate(jnp.float32(rate)) if rate > 0 else None
