"""Partitioned normalisation: batch normalisation by domain."""

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from mtl_jax.arguments import check_count
from mtl_jax.nn.batch_norm import EPSILON, moments
from mtl_jax.nn.context import Context
from mtl_jax.nn.domain_linear import by_row, domains_of
from mtl_jax.nn.state import State


class PartitionedNorm(nnx.Module):
    r"""Normalisation by the moments of the row's domain m, with a scale and a shift of all domains and one of its own.

    .. math:: y = (\gamma \odot \gamma_m) \odot \frac{x - \mu_m}{\sqrt{v_m + \epsilon}} + (\beta + \beta_m)

    In training the moments are those of the domain's rows in the batch, weighted by ``context.weight`` (rows of weight 0 do
    not enter) and summed over the devices of ``context.axis``; the domain's running moments go a hundredth of the way to
    them. Evaluation reads the running ones, divided by the share of them that batches have. A domain with less than two
    rows of positive weight in the batch is normalised by its running moments and keeps them. With one domain this is
    :class:`mtl_jax.nn.BatchNorm`.

    Args:
      features: Width of x.
      num_domains: M.
      rngs: Not drawn from; taken so that it can stand where other layers do.

    Raises:
      ConfigError: ``context.domain`` is None.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtl_jax.nn import Context
      >>> from mtl_jax.nn.partitioned_norm import PartitionedNorm
      >>> norm = PartitionedNorm(1, num_domains=2)
      >>> x = jnp.array([[1.0], [3.0], [10.0], [50.0]])
      >>> context = Context(train=True, domain=jnp.array([0, 0, 1, 1]))
      >>> norm(x, context)[:, 0].round(3).tolist()
      [-1.0, 1.0, -1.0, 1.0]
      >>> [f"{mean:.2f}" for mean in norm.mean[...][:, 0]]
      ['0.02', '0.30']

    References:
      Sheng, Zhao, Zhou, Ding, Dai, Luo, Yang, Lv, Zhang, Deng, Zhu, *One Model to Serve All: Star Topology Adaptive
      Recommender for Multi-Domain CTR Prediction*, CIKM 2021. Public code takes moments over the rows of all domains, in
      evaluation too.
    """

    def __init__(self, features: int, num_domains: int, *, rngs: nnx.Rngs | None = None):
        check_count(num_domains, "num_domains")
        shape = (num_domains, features)
        self.scale, self.bias = nnx.Param(jnp.ones(features)), nnx.Param(jnp.zeros(features))
        self.domain_scale, self.domain_bias = nnx.Param(jnp.ones(shape)), nnx.Param(jnp.zeros(shape))
        self.mean, self.variance = State(jnp.zeros(shape)), State(jnp.zeros(shape))
        self.seen = State(jnp.zeros((num_domains, 1)))

    def __call__(
        self, x: Float[Array, "batch features"], context: Context = Context()
    ) -> Float[Array, "batch features"]:
        domain = domains_of(context)
        x = x.astype(jnp.promote_types(self.scale.dtype, jnp.float32))
        found = domain_moments(x, domain, len(self.seen[...]), context) if context.train else ()
        mean, variance = moments(self, *found)
        y = (x - mean[domain]) * lax.rsqrt(variance + EPSILON)[domain]
        scale = by_row(self.scale[...] * self.domain_scale[...], domain)
        return y.astype(scale.dtype) * scale + by_row(self.bias[...] + self.domain_bias[...], domain)


def domain_moments(
    x: Float[Array, "batch features"], domain: Int[Array, " batch"], num_domains: int, context: Context
) -> tuple[tuple[Float[Array, "domain features"], Float[Array, "domain features"]], Bool[Array, "domain 1"]]:
    """Weighted mean and variance of each domain's rows on all devices, and whether two or more of them count."""
    weight = jnp.ones(len(x), x.dtype) if context.weight is None else context.weight.astype(x.dtype)
    weight = weight[:, None]

    def over_rows(values: Float[Array, "batch _"]) -> Float[Array, "domain _"]:
        total = jnp.zeros((num_domains, values.shape[1]), x.dtype).at[domain].add(values)
        return total if context.axis is None else lax.psum(total, context.axis)

    count = over_rows(weight)
    count = jnp.where(count > 0, count, 1)
    mean = over_rows(weight * x) / count
    variance = over_rows(weight * jnp.square(x - mean[domain])) / count
    return (mean, variance), over_rows((weight > 0).astype(x.dtype)) >= 2
