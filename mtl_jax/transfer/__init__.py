"""From a source to a target: strategies on parameters, each a pure function."""

from mtl_jax.transfer.gradient import gradient_transfer, gradient_update

__all__ = ["gradient_transfer", "gradient_update"]
