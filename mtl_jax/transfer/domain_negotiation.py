"""Domain negotiation: after a pass through all domains, one after the other, a part of the way is gone."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax.arguments import check_number
from mtl_jax.balancing.base import register
from mtl_jax.train.adaptation import Adaptation

START = "start"


@register
@dataclasses.dataclass(frozen=True)
class DomainNegotiation(Adaptation):
    r"""MAMDR's outer loop over shared parameters.

    .. math:: \theta \leftarrow \theta + \beta (\tilde\theta - \theta)

    :math:`\tilde\theta` is what training ends in that starts from :math:`\theta` and visits all domains in a new random
    order, an epoch of each. The optimizer begins anew with every epoch, its schedules included; the released code carries
    one state through everything.

    Attributes:
      step_size: :math:`\beta` in [0, 1]; 1 is sequential training.

    Raises:
      ConfigError: By training: fewer than two domains, or a moving average of the parameters.

    References:
      Luo, Li, Gao, Tu, Lu, Zhang, *MAMDR: A Model Agnostic Learning Framework for Multi-Domain Recommendation*, ICDE 2023.
    """

    needs_source: ClassVar[bool] = False
    by_domain: ClassVar[bool] = True
    by_epoch: ClassVar[bool] = True
    afresh: ClassVar[bool] = True

    step_size: float = 0.1

    def __post_init__(self):
        check_number(self.step_size, "transfer.step_size", least=0, most=1)

    def visits(self, target, source, draw):
        return [np.flatnonzero(target == name) for name in draw.permutation(np.unique(target))]

    def init(self, params, origin, key):
        return params, {START: jax.tree.map(jnp.copy, params)}

    def end_epoch(self, params, kept):
        start = kept[START]
        params = {path: start[path] + self.step_size * (array - start[path]) for path, array in params.items()}
        return params, {START: jax.tree.map(jnp.copy, params)}
