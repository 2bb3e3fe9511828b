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
      rngs: Key of this step and of the rows of this device; required when ``train`` and something random is on.
      step_rngs: Key of this step that is the same for all rows on all devices.
      axis: Named axis of devices that statistics of the batch are summed over; None where the batch is whole.
      units: Factors of what the towers read, in the order of :meth:`mtl_jax.model.MultiTaskModel.features_of`; None: 1.
    """

    train: bool = False
    domain: Int[Array, " batch"] | None = None
    prior: Float[Array, "batch prior"] | None = None
    weight: Float[Array, " batch"] | None = None
    step: Int[Array, ""] | None = None
    rngs: PRNGKeyArray | None = None
    step_rngs: PRNGKeyArray | None = None
    axis: str | None = None
    units: Float[Array, " feature"] | None = None

    def stream(self, name: str) -> "Context":
        """The same context with independent keys, derived from the name and not from the order of calls."""

        def derived(key):
            return None if key is None else stream(key, name)

        return self._replace(rngs=derived(self.rngs), step_rngs=derived(self.step_rngs))

    @property
    def draws(self) -> PRNGKeyArray | None:
        """Key of what is drawn once a step, for all rows alike; None in evaluation.

        Raises:
          ValueError: There is none in training.
        """
        if not self.train:
            return None
        key = self.rngs if self.step_rngs is None else self.step_rngs
        if key is None:
            raise ValueError("what is drawn in training needs a key; pass Context(train=True, rngs=key)")
        return key


def stream(key: PRNGKeyArray, name: str) -> PRNGKeyArray:
    """A key for one named purpose: stable over processes, and untouched by what else draws."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))
