"""Domain regularisation: a domain's own parameters are trained on other domains first, and then on it."""

import dataclasses
from typing import ClassVar

import numpy as np

from mtl_jax.balancing.base import register
from mtl_jax.errors import ConfigError
from mtl_jax.transfer.domain_negotiation import DomainNegotiation


@register
@dataclasses.dataclass(frozen=True)
class DomainRegularisation(DomainNegotiation):
    r"""MAMDR's loop over the parameters :math:`\theta + \delta` of one domain.

    .. math:: \delta \leftarrow \delta + \gamma (\tilde\theta - \theta - \delta)

    In an epoch a domain of the source is drawn, and :math:`\tilde\theta` is what training ends in that starts from
    :math:`\theta + \delta` and passes through its rows, then through those of the target. :math:`\theta` is the model of
    the source and :math:`\delta` = 0 at first.

    The paper trains :math:`\theta` by domain negotiation in the same epochs, with the :math:`\delta` of all domains beside
    it. Here it comes first (``pretraining=mamdr_dn``), and a run is about one target, of which the others are the source:
    what is deployed is an ordinary model.

    Attributes:
      step_size: :math:`\gamma` in [0, 1].

    References:
      Luo, Li, Gao, Tu, Lu, Zhang, *MAMDR: A Model Agnostic Learning Framework for Multi-Domain Recommendation*, ICDE 2023.
    """

    needs_source: ClassVar[bool] = True
    needs_rows: ClassVar[bool] = True
    by_domain: ClassVar[bool] = False

    def visits(self, target, source, draw):
        if source is None:
            raise ConfigError(
                "transfer 'DomainRegularisation' draws a domain of the source in each epoch, and its rows have none; "
                "expected data with domains. Name their column (data.domain)"
            )
        helper = draw.choice(np.unique(source))
        return [len(target) + np.flatnonzero(source == helper), np.arange(len(target))]
