"""From a source to a target: what is handed on, and updates of parameters, each a pure function."""

from mtl_jax.transfer.gradient import gradient_transfer, gradient_update
from mtl_jax.transfer.loading import Artefact, Coverage, Loading, load

__all__ = ["Artefact", "Coverage", "Loading", "gradient_transfer", "gradient_update", "load"]
