"""The source's model as it is."""

import dataclasses
from typing import ClassVar

from mtl_jax.balancing.base import register
from mtl_jax.train.adaptation import Adaptation


@register
@dataclasses.dataclass(frozen=True)
class ZeroShot(Adaptation):
    """No step at all: the source's model judged on the target. Every task needs a tower of the source."""

    trains: ClassVar[bool] = False
