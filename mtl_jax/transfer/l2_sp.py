"""L2-SP: a spring to the starting point."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from mtl_jax.arguments import check_number
from mtl_jax.balancing.base import register
from mtl_jax.train.adaptation import Adaptation, from_source, is_zero
from mtl_jax.transfer.fine_tune import FineTune


@register
@dataclasses.dataclass(frozen=True)
class L2SP(Adaptation):
    r"""Fine-tuning that is pulled to the source's values :math:`w^0`, and what is new to zero.

    .. math::
        \Omega = \frac{\alpha}{2} \sum_{\text{from the source}} (w - w^0)^2 + \frac{\beta}{2} \sum_{\text{new}} w^2

    Sums run over all entries: strength does not depend on the size of an array. In tables it goes row by row, and rows of
    ids that the source lacks are new. Of tables updated by rows only the touched rows are pulled, as weight decay is.

    Attributes:
      alpha: Pull of what came from the source.
      beta: Pull of the rest.

    References:
      Li, Grandvalet, Davoine, *Explicit Inductive Bias for Transfer Learning with Convolutional Networks*, ICML 2018.
    """

    penalises: ClassVar[bool] = True

    alpha: float = 0.1
    beta: float = 0.01

    def __post_init__(self):
        check_number(self.alpha, "transfer.alpha", least=0)
        check_number(self.beta, "transfer.beta", least=0)

    def init(self, params, origin, key):
        old = {path: jnp.asarray(from_source(origin, path, array)) for path, array in params.items()}
        anchor = {path: jnp.where(old[path] > 0, array, 0) for path, array in params.items()}
        # one entry a row: arrays of tables are gathered by rows
        return params, {"anchor": anchor, "old": old}

    def simplified(self):
        return FineTune() if is_zero(self.alpha, self.beta) else self

    def penalty(self, params, kept, view):
        total = 0.0
        for path, array in params.items():
            strength = jnp.where(kept["old"][path] > 0, self.alpha, self.beta)
            total += jnp.sum(strength * jnp.square(array - kept["anchor"][path])) / 2
        return total
