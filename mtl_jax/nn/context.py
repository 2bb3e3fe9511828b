"""Context: what a module may know about the step besides its input."""

import zlib
from typing import NamedTuple

import jax
from jaxtyping import Array, Float, Int, PRNGKeyArray


class Context(NamedTuple):
    """Per-step facts, so that a module reads only what it needs and keeps no random state of its own.

    Attributes:
      train: Turns on dropout and other training behaviour.
      domain: Domain id of each row.
      prior: Embeddings that only gates read.
      weight: Row weights; 0 on padding rows, which keeps them out of statistics.
      step: Number of finished updates; drives schedules.
      rngs: Key of this step; required when ``train`` and something random is on.
    """

    train: bool = False
    domain: Int[Array, " batch"] | None = None
    prior: Float[Array, "batch prior"] | None = None
    weight: Float[Array, " batch"] | None = None
    step: Int[Array, ""] | None = None
    rngs: PRNGKeyArray | None = None

    def stream(self, name: str) -> "Context":
        """The same context with an independent key, derived from the name and not from the order of calls."""
        return self if self.rngs is None else self._replace(rngs=stream(self.rngs, name))


def stream(key: PRNGKeyArray, name: str) -> PRNGKeyArray:
    """A key for one named purpose: stable over processes, and untouched by what else draws."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))
