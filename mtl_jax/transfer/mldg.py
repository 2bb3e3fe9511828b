"""MLDG: a step on some domains has to serve another one, too."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from mtl_jax.arguments import check_number
from mtl_jax.balancing.base import register
from mtl_jax.transfer.episodes import OverDomains
from mtl_jax.transfer.gradient import gradient_update


@register
@dataclasses.dataclass(frozen=True)
class MLDG(OverDomains):
    r"""Meta-learning for domain generalisation: in each step one domain, drawn at random, plays the unseen one.

    .. math::
        \min_\theta F(\theta) + \beta \, G(\theta - \alpha \nabla F(\theta)), \qquad
        F = \frac{1}{D - 1} \sum_{d < D} L_d, \quad G = L_D

    Attributes:
      num_domains: D >= 2, domains of a step; None: all.
      step_size: :math:`\alpha \ge 0`.
      weight: :math:`\beta \ge 0`.
      first_order: Whether no gradient flows through the gradient of F.

    References:
      Li, Yang, Song, Hospedales, *Learning to Generalize: Meta-Learning for Domain Generalization*, AAAI 2018.
    """

    least_domains: ClassVar[int] = 2

    step_size: float = 0.01
    weight: float = 1.0
    first_order: bool = dataclasses.field(default=False, metadata={"static": True})

    def __post_init__(self):
        super().__post_init__()
        check_number(self.step_size, "transfer.step_size", least=0)
        check_number(self.weight, "transfer.weight", least=0)

    def domain_weights(self):
        seen = self.num_domains - 1
        return jnp.concatenate([jnp.full(seen, 1 / seen), jnp.full(1, self.weight)])

    def adapt_to_domains(self, params, kept, loss, rows):
        seen = jax.tree.map(lambda leaf: leaf[:-1, 0], rows)
        update = gradient_update(
            lambda params: jnp.mean(jax.vmap(lambda rows: loss(params, rows))(seen)),
            step_size=self.step_size,
            first_order=self.first_order,
            axis=loss.axis,
        )
        moved = update(params)
        repeated = {
            path: jnp.broadcast_to(array, (self.num_domains - 1, *array.shape)) for path, array in params.items()
        }
        return {path: jnp.concatenate([repeated[path], moved[path][None]]) for path in params}
