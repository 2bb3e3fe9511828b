"""No transfer: the reference of every gain."""

import dataclasses
from typing import ClassVar

from mtl_jax.balancing.base import register
from mtl_jax.train.adaptation import Adaptation


@register
@dataclasses.dataclass(frozen=True)
class Scratch(Adaptation):
    """The target alone, from the values that a model is initialised with, under the same budget and selection."""

    needs_source: ClassVar[bool] = False
