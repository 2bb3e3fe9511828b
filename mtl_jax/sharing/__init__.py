"""Sharing strategies, one a file: interchangeable Flax NNX modules."""

from mtl_jax.sharing.base import Context, Strategy
from mtl_jax.sharing.mmoe import MMoE
from mtl_jax.sharing.shared_bottom import SharedBottom
from mtl_jax.sharing.single_task import SingleTask

__all__ = ["Context", "MMoE", "SharedBottom", "SingleTask", "Strategy"]
