"""The logit of several steps in a row, from the logits of each step given the one before."""

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float


def chain(*logits: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    r"""The logit of :math:`\sigma(a)\,\sigma(b)`, and of longer products from the left.

    .. math:: \operatorname{chain}(a, b) = -\log\left(e^{-a} + e^{-b} + e^{-a-b}\right)

    No probability is formed, so values and gradients are exact where products of sigmoids round to 0 or 1.

    Args:
      logits: One or more, of one shape.

    Edge cases:
      ================== ====================================================
      a = b = 0          -log 3
      b → ∞              a: a step that is sure changes nothing
      a, b = -80 or 80   finite in float32, and so are the gradients
      ================== ====================================================

    Example:
      >>> import jax.numpy as jnp
      >>> from mtl_jax.sharing import chain
      >>> print(f"{chain(jnp.float32(0.0), jnp.float32(0.0)):.4f}")
      -1.0986
    """
    return functools.reduce(lambda a, b: -jnp.logaddexp(jnp.logaddexp(-a, -b), -a - b), logits)
