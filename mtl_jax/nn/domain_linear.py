"""Parameters of the row's domain: linear layers, and whatever else is stacked by domain."""

import math

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from mtl_jax.arguments import check_count
from mtl_jax.errors import ConfigError
from mtl_jax.nn.context import Context

BLOCK = 64
"""Most rows of a block. Larger ones read fewer kernels and pad more."""


class DomainLinear(nnx.Module):
    r"""M linear layers, of which every row passes through that of its domain m.

    .. math:: y = x W_m + b_m

    Args:
      num_domains: M.
      in_features: Width of x.
      out_features: Width of y.
      use_bias: Whether there are biases, which start at 0.
      rngs: Initialisation; each layer has the fan-in of one layer (Glorot-uniform).

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from mtl_jax.nn.domain_linear import DomainLinear
      >>> layer = DomainLinear(2, 4, 3, rngs=nnx.Rngs(0))
      >>> layer.bias[...] = jnp.array([[0.0] * 3, [1.0] * 3])
      >>> layer(jnp.zeros((4, 4)), jnp.array([1, 0, 0, 1]))[:, 0].tolist()
      [1.0, 0.0, 0.0, 1.0]
    """

    def __init__(self, num_domains: int, in_features: int, out_features: int, *, use_bias: bool = True, rngs: nnx.Rngs):
        check_count(num_domains, "num_domains")
        init = nnx.initializers.glorot_uniform(batch_axis=(0,))
        self.kernel = nnx.Param(init(rngs.params(), (num_domains, in_features, out_features)))
        self.bias = nnx.Param(jnp.zeros((num_domains, out_features))) if use_bias else None

    def __call__(self, x: Float[Array, "batch in"], domain: Int[Array, " batch"]) -> Float[Array, "batch out"]:
        return domain_linear(x, self.kernel[...], None if self.bias is None else self.bias[...], domain)


def domain_linear(
    x: Float[Array, "batch in"],
    kernel: Float[Array, "domain in out"],
    bias: Float[Array, "domain out"] | None,
    domain: Int[Array, " batch"],
) -> Float[Array, "batch out"]:
    """Every row through the linear layer of its domain, computed in the type of the kernels.

    Rows are put into blocks of one domain each, the last block of a domain padded, and every block is multiplied by its
    domain's kernel. The work is that of ``batch + M * block`` rows through one layer, however many domains there are.

    Milliseconds for the gradients of all arguments (4096 rows of 128, 64 outputs, float32, 2 CPU cores shared with other
    work, jax 0.10.2, the best of 20 in turn, 2026-11-29), for M = 3, 8 and 32 domains:

    ======================================================  =====  =====  =====
    blocks of 64 rows (this function)                         4.6    4.8    6.6
    one whole product a domain, of which rows are selected    7.7     28    159
    sorted rows and ``jax.lax.ragged_dot``                     12     32    187
    all domains in one einsum, then selection                  16     44    264
    one kernel gathered a row (M = 3 alone)                   149
    ======================================================  =====  =====  =====

    ``ragged_dot`` moreover has no rule for ``jax.vmap`` over kernels alone. A domain without rows has a gradient of
    exactly zero.

    Args:
      x: The rows.
      kernel: Of all domains.
      bias: Of all domains, or None.
      domain: Of each row, in 0 to M - 1 (which data are checked for; here it is not).
    """
    (batch, width), num_domains = x.shape, len(kernel)
    x = jnp.asarray(x, kernel.dtype)
    if num_domains == 1:
        return x @ kernel[0] if bias is None else x @ kernel[0] + bias[0]
    size = min(BLOCK, max(8, 2 ** round(math.log2(max(1, batch / num_domains)))))
    whole = -(-batch // size)
    number = min(whole + num_domains, whole * num_domains)  # of blocks, at most
    rank, counts = _ranks(domain, num_domains)
    blocks = -(-counts // size)
    ends = jnp.cumsum(blocks)
    place = ((ends - blocks) * size)[domain] + rank
    rows = jnp.full(number * size, batch).at[place].set(jnp.arange(batch), unique_indices=True)
    owner = jnp.minimum((ends[:, None] <= jnp.arange(number)).sum(axis=0), num_domains - 1)
    inside = x.at[rows].get(mode="fill", fill_value=0).reshape(number, size, width)
    outputs = jnp.einsum("nti,nio->nto", inside, by_row(kernel, owner))
    if bias is not None:
        outputs = outputs + by_row(bias, owner)[:, None]
    return outputs.reshape(number * size, -1).at[place].get(unique_indices=True)


def _ranks(domain: Int[Array, " batch"], num_domains: int) -> tuple[Int[Array, " batch"], Int[Array, " domain"]]:
    """How many rows of the same domain come before each row, and how many every domain has."""
    until = jnp.cumsum(domain[:, None] == jnp.arange(num_domains), axis=0)
    return jnp.take_along_axis(until, domain[:, None], axis=1)[:, 0] - 1, until[-1]


def by_row(stack: Float[Array, "domain *shape"], domain: Int[Array, " batch"]) -> Float[Array, "batch *shape"]:
    """What is stacked by domain, for each row; its gradient adds up in float32 at least."""
    return stack.astype(jnp.promote_types(stack.dtype, jnp.float32))[domain].astype(stack.dtype)


def domains_of(context: Context) -> Int[Array, " batch"]:
    """The domain ids of the rows; a ConfigError where there are none."""
    if context.domain is None:
        raise ConfigError(
            "context.domain is None; expected the domain id of every row. Choose data that has domains, or pass "
            "Context(domain=...)"
        )
    return context.domain
