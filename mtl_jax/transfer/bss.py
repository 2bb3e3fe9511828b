"""Batch spectral shrinkage: small singular values of the features are made smaller."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mtl_jax.arguments import check_count, check_number
from mtl_jax.balancing.base import register
from mtl_jax.errors import ConfigError
from mtl_jax.train.adaptation import Adaptation, is_zero
from mtl_jax.train.parallel import total
from mtl_jax.transfer.fine_tune import FineTune


@register
@dataclasses.dataclass(frozen=True)
class BSS(Adaptation):
    r"""Fine-tuning, with a penalty on the smallest singular values of the batch's features H f[B, d].

    .. math:: \eta \sum_{i=1}^{k} \sigma_{r - i + 1}(H)^2, \qquad r = \min(B, d)

    Eigenvectors V of the Gramian are constants and the penalty is :math:`\|H V_k\|^2`: that has the exact gradient and
    divides by no gap between eigenvalues. H is what the towers read, uncentred; rows of weight 0 are rows of zeros, which
    add no singular value as long as B - their number is at least d.

    Attributes:
      weight: :math:`\eta \ge 0`.
      k: How many singular values.

    Raises:
      ConfigError: By ``penalty``, where the batch has fewer rows than features have entries.

    References:
      Chen, Wang, Fu, Long, Wang, *Catastrophic Forgetting Meets Negative Transfer: Batch Spectral Shrinkage for Safe
      Transfer Learning*, NeurIPS 2019.
    """

    penalises: ClassVar[bool] = True
    reads_rows: ClassVar[bool] = True

    weight: float = 1e-3
    k: int = dataclasses.field(default=1, metadata={"static": True})

    def __post_init__(self):
        check_number(self.weight, "transfer.weight", least=0)
        check_count(self.k, "transfer.k")

    def simplified(self):
        return FineTune() if is_zero(self.weight) else self

    def penalty(self, params, kept, view):
        features = view.features(params, train=True)
        num_rows = features.shape[0] * total(1, view.axis)
        if num_rows < features.shape[1]:
            raise ConfigError(
                f"transfer 'BSS' has batches of {num_rows} rows and {features.shape[1]} features; expected at "
                "least as many rows. Raise trainer.batch_size, or make the shared layers smaller"
            )
        features = jnp.where(view.weight[:, None] > 0, features, 0)
        whole = total(jnp.sum(view.weight > 0), view.axis) >= features.shape[1]
        return self.weight * jnp.where(whole, smallest_energy(features, self.k, view.axis), 0.0)


def smallest_energy(features: Float[Array, "row feature"], k: int, axis: str | None = None) -> Float[Array, ""]:
    """The sum of the k smallest squared singular values; of at least as many rows, over the devices, as features."""
    _, vectors = jnp.linalg.eigh(total(jax.lax.stop_gradient(features.T @ features), axis))  # ascending
    return total(jnp.sum(jnp.square(features @ vectors[:, :k])), axis)
