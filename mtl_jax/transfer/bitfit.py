"""BitFit: biases only."""

import dataclasses

from mtl_jax.balancing.base import register
from mtl_jax.errors import ConfigError
from mtl_jax.model import label
from mtl_jax.train.adaptation import Adaptation
from mtl_jax.transfer.kernels import of_norm


@register
@dataclasses.dataclass(frozen=True)
class BitFit(Adaptation):
    """Biases and the tasks' own parameters are trained; kernels and tables stay as the source left them.

    Attributes:
      include_norm: Whether shifts of normalisations are biases too.

    Raises:
      ConfigError: By ``init``, where shared layers have no bias.

    References:
      Ben Zaken, Goldberg, Ravfogel, *BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked
      Language-models*, ACL 2022.
    """

    include_norm: bool = dataclasses.field(default=False, metadata={"static": True})

    def phases(self):
        return (lambda path: label(path).startswith("task/") or self._is_bias(path),)

    def init(self, params, origin, key):
        if not any(label(path) == "shared" and self._is_bias(path) for path in params):
            raise ConfigError(
                "transfer 'BitFit' trains biases and the shared layers have none; expected some. Choose another"
            )
        return params, {}

    def _is_bias(self, path: str) -> bool:
        return path.split("/")[-1] in ("bias", "domain_bias") and (self.include_norm or not of_norm(path))
