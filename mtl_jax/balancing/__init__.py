"""Balancing: one loss weighting or gradient aggregator a file; needs jax, optax and numpy only."""

from mtl_jax.balancing.as_optax import as_optax
from mtl_jax.balancing.base import Balancer, NoState, TaskLike, aggregate
from mtl_jax.balancing.equal import equal
from mtl_jax.balancing.fixed import fixed
from mtl_jax.balancing.pcgrad import pcgrad
from mtl_jax.balancing.uncertainty import uncertainty

__all__ = [
    "Balancer",
    "NoState",
    "TaskLike",
    "aggregate",
    "as_optax",
    "equal",
    "fixed",
    "pcgrad",
    "uncertainty",
]
