"""Length of a balanced direction, and what a step tells about it."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mtl_jax.balancing import Balancer
from mtl_jax.balancing.base import num_active

FROM_PRODUCTS = ("direction_norm", "direction_cosine", "conflict_rate", "log10_gramian_condition")
# A direction this much shorter than its longest term (1e-6, squared) is one that cancels.
CANCELLED_SQUARED = 1e-12


def diagnostic_names(balancer: Balancer, state: Any) -> Sequence[str]:
    """Names of the numbers that a step with this balancer reports, besides its weights.

    ``negative_weights`` (how many), those of the balancer, and where it compares the gradients of one batch:
    ``direction_norm``, ``direction_cosine`` (with the plain sum), ``conflict_rate`` (pairs of tasks with a negative inner
    product, as a share), ``log10_gramian_condition``. Lengths and products are those of the scope.
    """
    compares = balancer.needs == "gramian" and balancer.num_batches == 1
    own = tuple(balancer.diagnostics(state))
    return ("negative_weights", *(FROM_PRODUCTS if compares or balancer.needs == "jacobian" else ()), *own)


def length_factor(
    options: Any,
    balancer: Balancer,
    squared_norm: Float[Array, ""] | None,
    squared_sum: Float[Array, ""] | None,
    active: Bool[Array, " task"],
) -> Float[Array, ""]:
    """What the direction is multiplied by under the ``scale``, ``length`` and ``max_norm`` of the options.

    Args:
      options: :class:`mtl_jax.train.gradients.BalancingOptions`.
      balancer: The method.
      squared_norm: Of its direction; None where the gradients are not compared, and the last two cannot be asked for.
      squared_sum: Squared length of the plain sum of the gradients.
      active: Tasks that count.
    """
    count = jnp.asarray(num_active(active, len(active)), float)
    factor = jnp.ones(())
    if options.scale == "sum" and balancer.scaling == "mean":
        factor = count
    if options.scale == "mean" and balancer.scaling == "sum":
        factor = 1 / count
    if squared_norm is None:
        return factor
    norm = jnp.sqrt(jnp.where(squared_norm > 0, squared_norm, jnp.inf))  # a direction of 0 stays 0
    if options.length != "native":
        target = jnp.sqrt(squared_sum) if options.length == "sum_norm" else 1.0
        factor = jnp.where(squared_norm > 0, target / norm, 0)
    if options.max_norm is not None:
        factor = jnp.where(squared_norm > 0, jnp.minimum(factor, options.max_norm / norm), factor)
    return factor


def squared_lengths(
    weights: Float[Array, " task"], products: Float[Array, "task task"], active: Bool[Array, " task"]
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """Of the direction and of the plain sum of the active gradients, and their inner product."""
    plain = active.astype(products.dtype)
    terms = weights * weights * jnp.diagonal(products)
    direction = _quadratic(weights, products, weights)
    direction = jnp.where(direction > CANCELLED_SQUARED * jnp.max(terms), direction, 0)
    return direction, jnp.maximum(_quadratic(plain, products, plain), 0), _quadratic(weights, products, plain)


def told(
    products: Float[Array, "task task"],
    active: Bool[Array, " task"],
    squared_norm: Float[Array, ""],
    squared_sum: Float[Array, ""],
    inner: Float[Array, ""],
) -> dict[str, Float[Array, ""]]:
    """The numbers of :data:`FROM_PRODUCTS` of one step."""
    lengths = jnp.sqrt(squared_norm * squared_sum)
    pairs = jnp.triu(active[:, None] & active, 1)
    conflicts = jnp.sum(pairs & (products < 0)) / jnp.maximum(jnp.sum(pairs), 1)
    diagonal = jnp.diagonal(products)
    # An absent task gets an eigenvalue between the others.
    filled = products + jnp.diag(jnp.where(active, 0, jnp.max(diagonal) - diagonal))
    filled = jnp.where(jnp.all(jnp.isfinite(filled)), filled, jnp.eye(len(active), dtype=products.dtype))
    eigenvalues = jnp.linalg.eigvalsh(filled)
    largest = jnp.maximum(eigenvalues[-1], jnp.finfo(products.dtype).tiny)
    smallest = jnp.maximum(eigenvalues[0], largest * jnp.finfo(products.dtype).eps)
    numbers = (
        jnp.sqrt(squared_norm),
        jnp.where(lengths > 0, inner / jnp.where(lengths > 0, lengths, 1), 0),
        conflicts,
        jnp.log10(largest / smallest),
    )
    return dict(zip(FROM_PRODUCTS, numbers, strict=True))


def _quadratic(left, products, right):
    return jnp.einsum("i,ij,j->", left, products, right, precision="highest")
