"""Parameters of a loss: what turns the one score of a tower into what the loss and the metrics read.

They belong to a task but are no weights of a network: pulling them towards 0 would pull predictions towards an arbitrary
class or variance, so they have no weight decay (:func:`mtl_jax.model.decays`).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

LEAST_DISTANCE = 1e-4
LEAST_DISPERSION = 1e-3


class Cutpoints(nnx.Module):
    r"""Cumulative logits of an ordinal task from its score: :math:`a \mapsto (a - b_1, \dots, a - b_{C-1})`.

    .. math:: P(y \ge j) = \sigma(a - b_j), \qquad b_1 = \beta_1, \quad
        b_j = b_{j-1} + \mathrm{softplus}(\beta_j) + 10^{-4}

    so the cutpoints stay in order whatever the optimizer does.

    Args:
      frequencies: Share > 0 of each class, lowest first. At first :math:`b_j = -\mathrm{logit}\,P(y \ge j)` of these
        shares, so a score of 0 predicts them.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtl_jax.nn import Cutpoints
      >>> print(Cutpoints((0.5, 0.25, 0.25))(jnp.array([0.0, 1.0])).round(4))
      [[ 0.     -1.0986]
       [ 1.     -0.0986]]

    References:
      McCullagh, *Regression Models for Ordinal Data*, Journal of the Royal Statistical Society B 1980.
    """

    def __init__(self, frequencies: Sequence[float]):
        shares = np.asarray(frequencies, np.float64)
        if shares.size < 2 or not (shares > 0).all():
            raise ValueError(f"frequencies are {tuple(frequencies)}; expected at least two numbers > 0. Smooth them")
        below = np.cumsum(shares)[:-1]
        above = np.cumsum(shares[::-1])[::-1][1:]
        cutpoints = np.log(below) - np.log(above)
        # Two large neighbours of a class that hardly occurs may start closer than the least distance.
        steps = np.maximum(np.diff(cutpoints) - LEAST_DISTANCE, 1e-6)
        self.beta = nnx.Param(jnp.asarray(np.append(cutpoints[:1], _inverse_softplus(steps)), jnp.float32))

    @property
    def cutpoints(self) -> Float[Array, " cuts"]:
        """b, ascending."""
        beta = self.beta[...]
        steps = jax.nn.softplus(beta[1:]) + LEAST_DISTANCE
        return jnp.cumsum(jnp.concatenate([beta[:1], steps]))

    def __call__(self, score: Float[Array, "*batch"]) -> Float[Array, "*batch cuts"]:
        return score[..., None] - self.cutpoints


class Dispersion(nnx.Module):
    r"""Log mean and log size of a negative binomial task from its score: :math:`a \mapsto (a, \log r)`.

    .. math:: r = 1/\alpha, \qquad \alpha = 10^{-3} + \mathrm{softplus}(\kappa)

    with one κ for all rows. The variance is :math:`\mu + \alpha\mu^2`; at first α = 1.
    """

    def __init__(self):
        self.kappa = nnx.Param(jnp.asarray(_inverse_softplus(1 - LEAST_DISPERSION), jnp.float32))

    @property
    def alpha(self) -> Float[Array, ""]:
        return LEAST_DISPERSION + jax.nn.softplus(self.kappa[...])

    def __call__(self, score: Float[Array, "*batch"]) -> Float[Array, "*batch 2"]:
        return jnp.stack([score, jnp.broadcast_to(-jnp.log(self.alpha), score.shape)], axis=-1)


def _inverse_softplus(values):
    return np.log(np.expm1(values))
