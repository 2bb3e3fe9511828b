"""Tables and lookups: features point to tables, and several features may read one table."""

from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int


class Table(nnx.Module):
    """The rows of one vocabulary.

    Args:
      num_rows: V, the two reserved rows (padding, out of vocabulary) included.
      width: D.
      stddev: Standard deviation of the normal initialisation.
      rngs: Initialisation.
    """

    def __init__(self, num_rows: int, width: int, *, stddev: float = 0.01, rngs: nnx.Rngs):
        self.rows = nnx.Param(nnx.initializers.normal(stddev)(rngs.params(), (num_rows, width)))


class Lookup(NamedTuple):
    """What one feature reads: a row (``[batch]``), or a weighted mean of rows (``[batch, length]``)."""

    ids: Int[Array, "batch *length"]
    weight: Float[Array, "batch length"] | None = None

    def items(self, rows: Float[Array, "row width"]) -> Float[Array, "batch *length width"]:
        """The rows, one by one."""
        return rows[self.ids]

    def __call__(self, rows: Float[Array, "row width"]) -> Float[Array, "batch width"]:
        """Reads the rows; a set without members reads 0."""
        values = self.items(rows)
        if self.weight is None:
            return values
        total = jnp.maximum(self.weight.sum(axis=-1, keepdims=True), 1e-12)
        return jnp.einsum("bl,blw->bw", self.weight / total, values)
