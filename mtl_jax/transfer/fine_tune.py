"""Fine-tuning: training goes on from the source's values."""

import dataclasses

from mtl_jax.balancing.base import register
from mtl_jax.train.adaptation import Adaptation


@register
@dataclasses.dataclass(frozen=True)
class FineTune(Adaptation):
    """All parameters are trained on the target, from those of the source; dropout is on, statistics of batches move."""
