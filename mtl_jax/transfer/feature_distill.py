"""Feature distillation: representations stay near those of the source's model."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from mtl_jax.arguments import check_number
from mtl_jax.balancing.base import register
from mtl_jax.train.adaptation import TEACHER, Adaptation, is_zero, mean_over_rows
from mtl_jax.transfer.fine_tune import FineTune


@register
@dataclasses.dataclass(frozen=True)
class FeatureDistill(Adaptation):
    r"""Fine-tuning, with the representations of the source's model as targets for those of the trained one.

    .. math:: \lambda \, \tfrac{1}{2} \, \overline{\| h - h^0 \|^2}

    :math:`h` is what the towers read. Both are of one shape here, so no regressor lies between them.

    Attributes:
      weight: :math:`\lambda \ge 0`.

    References:
      Romero, Ballas, Kahou, Chassang, Gatta, Bengio, *FitNets: Hints for Thin Deep Nets*, ICLR 2015.
    """

    penalises: ClassVar[bool] = True
    reads_rows: ClassVar[bool] = True

    weight: float = 1.0

    def __post_init__(self):
        check_number(self.weight, "transfer.weight", least=0)

    def init(self, params, origin, key):
        return params, {TEACHER: {path: jnp.copy(array) for path, array in params.items()}}

    def simplified(self):
        return FineTune() if is_zero(self.weight) else self

    def penalty(self, params, kept, view):
        taught = jax.lax.stop_gradient(view.features(kept[TEACHER], train=False))
        distance = jnp.sum(jnp.square(view.features(params, train=True) - taught), axis=-1)
        return self.weight / 2 * mean_over_rows(distance, view.weight, view.axis)
