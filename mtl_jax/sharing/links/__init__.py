"""Task links, one a file: what ties tasks together at their logits."""

from mtl_jax.sharing.links.base import Link, Linked
from mtl_jax.sharing.links.chain import chain
from mtl_jax.sharing.links.escm2 import ESCM2
from mtl_jax.sharing.links.esmm import ESMM
from mtl_jax.sharing.links.falling import FallingChances
from mtl_jax.sharing.links.logit_residual import LogitResidual

__all__ = ["ESCM2", "ESMM", "FallingChances", "Link", "Linked", "LogitResidual", "chain"]
