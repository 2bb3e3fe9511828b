"""Meta-SGD: a learned rate for every parameter of the inner step."""

import dataclasses

import jax
import jax.numpy as jnp

from mtl_jax.balancing.base import register
from mtl_jax.train.parallel import mean
from mtl_jax.transfer.episodes import FromSupport, in_scope, of_model

RATE = "aux/rate"
"""Where the rates are, beside the parameters that they belong to."""


@register
@dataclasses.dataclass(frozen=True)
class MetaSGD(FromSupport):
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

    def init(self, params, origin, key):
        moved = in_scope(params, self.scope)
        rates = {
            f"{RATE}/{path}": jnp.full_like(array, self.step_size) for path, array in params.items() if moved[path]
        }
        return params | rates, {}

    def adapted(self, params, loss):
        rates = {path: params[f"{RATE}/{path}"] for path in of_model(params) if f"{RATE}/{path}" in params}
        fixed = {path: array for path, array in of_model(params).items() if path not in rates}

        def step(moved, _):
            gradient = mean(jax.grad(lambda moved: loss(fixed | moved))(moved), loss.axis)
            return {path: array - rates[path] * gradient[path] for path, array in moved.items()}, None

        again = jax.checkpoint(step, prevent_cse=False)
        moved, _ = jax.lax.scan(again, {path: params[path] for path in rates}, length=self.num_steps)
        return fixed | moved
