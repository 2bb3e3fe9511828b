"""Adapters: small residual networks after layers that stay as they are."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from mtl_jax.arguments import check_count


class Adapter(nnx.Module):
    r"""A bottleneck with a way around it.

    .. math:: h + \operatorname{gelu}(h W_d + b_d) W_u + b_u

    :math:`W_u` and both biases start at zero, so that it is the identity at first, and :math:`W_d` is Glorot-uniform. gelu
    is the approximation by tanh, as in the authors' code.

    Args:
      layer: The linear layer, or the stack of them, whose outputs h it reads: a stack has a pair of matrices for each.
      width: Columns of :math:`W_d`, at least 1.
      rngs: Initialisation.

    References:
      Houlsby, Giurgiu, Jastrzebski, Morrone, de Laroussilhe, Gesmundo, Attariyan, Gelly, *Parameter-Efficient Transfer
      Learning for NLP*, ICML 2019.
    """

    def __init__(self, layer: nnx.Module, width: int, *, rngs: nnx.Rngs):
        check_count(width, "width")
        *stack, _, features = layer.kernel.shape
        linear = type(layer)
        self.down = linear(*stack, features, width, rngs=rngs)
        self.up = linear(*stack, width, features, rngs=rngs)
        self.up.kernel[...] = jnp.zeros_like(self.up.kernel[...])

    def __call__(self, h: Float[Array, "*batch features"]) -> Float[Array, "*batch features"]:
        return h + self.up(nnx.gelu(self.down(h)))


class Adapters(nnx.Module):
    """Adapters after some layers of a network, as its attribute ``aux``: paths then say ``aux/adapter/<layer>``.

    At first there are none, and no parameters.
    """

    def __init__(self):
        self.adapter = nnx.Dict()

    def put(self, number: int, adapter: Adapter) -> None:
        """Puts an adapter after a layer."""
        self.adapter[str(number)] = adapter

    def __call__(self, number: int, h: Float[Array, "*batch features"]) -> Float[Array, "*batch features"]:
        """What follows from the outputs h of a layer; h itself where the layer has no adapter."""
        return self.adapter[str(number)](h) if str(number) in self.adapter else h
