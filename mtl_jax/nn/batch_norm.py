"""Batch normalisation with running moments, and the moments of a batch."""

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float

from mtl_jax.nn.context import Context
from mtl_jax.nn.state import State

EPSILON = 1e-5
MOMENTUM = 0.99


class BatchNorm(nnx.Module):
    r"""Batch normalisation.

    .. math:: y = \gamma \odot \frac{x - \mu}{\sqrt{v + \epsilon}} + \beta

    In training the moments are those of the batch, weighted by ``context.weight`` (rows of weight 0 do not enter) and
    summed over the devices of ``context.axis``; the running moments go a hundredth of the way to them. Evaluation reads
    the running ones, so that a row's prediction does not depend on the others of its batch, divided by the
    share of them that batches have, so that a model of few steps is evaluated as it was trained. A batch with less
    than two rows of positive weight is normalised by the running moments and leaves them.

    Args:
      features: Width of x.
      rngs: Not drawn from; taken so that it can stand where other layers do.

    References:
      Ioffe, Szegedy, *Batch Normalization*, ICML 2015.
    """

    def __init__(self, features: int, *, rngs: nnx.Rngs | None = None):
        self.scale, self.bias = nnx.Param(jnp.ones(features)), nnx.Param(jnp.zeros(features))
        self.mean, self.variance = State(jnp.zeros(features)), State(jnp.zeros(features))
        self.seen = State(jnp.zeros(()))  # share of the running moments that comes from batches

    def __call__(
        self, x: Float[Array, "batch features"], context: Context = Context()
    ) -> Float[Array, "batch features"]:
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        mean, variance = moments(self, *(batch_moments(x, context) if context.train else ()))
        y = (x - mean) * lax.rsqrt(variance + EPSILON)
        return y.astype(self.scale.dtype) * self.scale[...] + self.bias[...]


def moments(
    norm: nnx.Module,
    of_batch: tuple[Float[Array, "*features"], Float[Array, "*features"]] | None = None,
    enough: Bool[Array, "..."] | None = None,
) -> tuple[Float[Array, "*features"], Float[Array, "*features"]]:
    """Mean and variance to normalise by: the running ones, or in training those of a batch, to which these move.

    Args:
      norm: Holds ``mean``, ``variance`` and ``seen``.
      of_batch: Of the batch, if these count.
      enough: Whether the batch has rows enough.
    """
    running = settled(norm.mean[...], norm.variance[...], norm.seen[...])
    if of_batch is None:
        return running
    for stored, new in zip((norm.mean, norm.variance, norm.seen), (*of_batch, 1.0), strict=True):
        moved = MOMENTUM * stored[...] + (1 - MOMENTUM) * lax.stop_gradient(new)
        stored[...] = jnp.where(enough, moved, stored[...]).astype(stored.dtype)
    return tuple(jnp.where(enough, new, old) for new, old in zip(of_batch, running, strict=True))


def settled(
    mean: Float[Array, "*features"], variance: Float[Array, "*features"], seen: Float[Array, "*features"]
) -> tuple[Float[Array, "*features"], Float[Array, "*features"]]:
    """Moments from running ones that start at 0 and the share of them that batches have; where that is 0, 0 and 1."""
    share = jnp.where(seen > 0, seen, 1)
    return mean / share, jnp.where(seen > 0, variance / share, 1)


def batch_moments(
    x: Float[Array, "batch features"], context: Context
) -> tuple[tuple[Float[Array, " features"], Float[Array, " features"]], Array]:
    """Weighted mean and variance over the rows of all devices, in float32 at least, and whether two rows or more count."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    weight = jnp.ones(len(x), x.dtype) if context.weight is None else context.weight.astype(x.dtype)

    def over_rows(values):
        total = values.sum(axis=0)
        return total if context.axis is None else lax.psum(total, context.axis)

    count = jnp.maximum(over_rows(weight), jnp.finfo(x.dtype).tiny)
    mean = over_rows(weight[:, None] * x) / count
    variance = over_rows(weight[:, None] * jnp.square(x - mean)) / count
    return (mean, variance), over_rows((weight > 0).astype(x.dtype)) >= 2
