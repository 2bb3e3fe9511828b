"""Pooling: rows of the source are trained on beside those of the target."""

import dataclasses
from typing import ClassVar

from mtl_jax.arguments import check_number
from mtl_jax.balancing.base import register
from mtl_jax.train.adaptation import Adaptation


@register
@dataclasses.dataclass(frozen=True)
class Pooled(Adaptation):
    r"""One model for the rows of both, from its initial values; it is selected and judged on the target.

    Attributes:
      weight: Row weight of the source's rows, > 0; 1 pools them.

    References:
      The baselines ``all`` and ``weighted`` of Daumé III, *Frustratingly Easy Domain Adaptation*, ACL 2007.
    """

    needs_source: ClassVar[bool] = False

    weight: float = dataclasses.field(default=1.0, metadata={"static": True})

    def __post_init__(self):
        check_number(self.weight, "transfer.weight", above=0)

    @property
    def source_row_weight(self):
        return self.weight
