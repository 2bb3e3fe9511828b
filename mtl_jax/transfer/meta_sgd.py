"""Meta-SGD: a learned rate for every parameter of the inner step."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from mtl_jax.arguments import check_count, check_number
from mtl_jax.balancing.base import register
from mtl_jax.transfer.episodes import KINDS, OverDomains, block, check_scope, in_scope, of_model

RATE = "aux/rate"
"""Where the rates are, beside the parameters that they belong to."""


@register
@dataclasses.dataclass(frozen=True)
class MetaSGD(OverDomains):
    r""":class:`mtl_jax.transfer.MAML` whose inner rates are trained, one for each number.

    .. math:: \theta'_d = \theta - \alpha \odot \nabla \ell_d^{\text{support}}(\theta)

    A rate may become negative. The paper draws them at random from a small range; here all start alike, as an ablation
    against MAML wants it.

    Attributes:
      num_domains: D, domains of a step; None: all.
      step_size: First value of every rate.
      num_steps: Inner steps, on the same rates.
      scope: Labels that the inner steps move.

    References:
      Li, Zhou, Chen, Li, *Meta-SGD: Learning to Learn Quickly for Few-Shot Learning*, 2017.
    """

    blocks: ClassVar[int] = 2

    step_size: float = 0.01
    num_steps: int = dataclasses.field(default=1, metadata={"static": True})
    scope: tuple[str, ...] = dataclasses.field(default=KINDS, metadata={"static": True})

    def __post_init__(self):
        super().__post_init__()
        check_number(self.step_size, "transfer.step_size", least=0)
        check_count(self.num_steps, "transfer.num_steps")
        object.__setattr__(self, "scope", tuple(self.scope))
        check_scope(self.scope)

    def init(self, params, origin, key):
        moved = in_scope(params, self.scope)
        rates = {
            f"{RATE}/{path}": jnp.full_like(array, self.step_size) for path, array in params.items() if moved[path]
        }
        return params | rates, {}

    def adapt_to_domains(self, params, kept, loss, rows):
        rates = {path: params[f"{RATE}/{path}"] for path in of_model(params) if f"{RATE}/{path}" in params}
        fixed = {path: array for path, array in of_model(params).items() if path not in rates}

        def adapted(rows):
            support, moved = block(rows, 0), {path: params[path] for path in rates}

            @jax.checkpoint
            def step(moved):
                gradient = jax.grad(lambda moved: loss(fixed | moved, support))(moved)
                return {path: array - rates[path] * gradient[path] for path, array in moved.items()}

            for _ in range(self.num_steps):
                moved = step(moved)
            return fixed | moved

        return jax.vmap(adapted)(rows)
