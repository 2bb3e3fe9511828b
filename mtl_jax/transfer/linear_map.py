"""Linear transfer: the target's parameters are a linear map of the source's."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from mtl_jax.balancing.base import register
from mtl_jax.errors import ConfigError
from mtl_jax.train.adaptation import Adaptation
from mtl_jax.transfer.kernels import check_targets, is_target, of_tasks, sibling

PREFIX = "aux/map"
FORMS = ("scalar", "diagonal", "left_right")


@register
@dataclasses.dataclass(frozen=True)
class LinearMap(Adaptation):
    r""":math:`\theta_t = M(\theta_s)` with the source frozen; M and the tasks' own parameters are trained on the target.

    ==============  ========================================================================
    form            kernel W [..., m, n] and bias of a layer become
    ==============  ========================================================================
    ``scalar``      a W
    ``diagonal``    W diag(a), a * bias + b
    ``left_right``  P W Q
    ==============  ========================================================================

    All begin as the identity. Stacked kernels (experts, domains) have a map each. What has no kernel of ``targets``
    (tables, other biases) stays as it came.

    Attributes:
      form: As above.
      targets: Pattern of the paths of the kernels, among those of shared layers.

    Raises:
      ConfigError: An unknown form; by ``init``, where no kernel has such a path.
    """

    adapts: ClassVar[bool] = True

    form: str = dataclasses.field(default="diagonal", metadata={"static": True})
    targets: str = dataclasses.field(default=".*/kernel", metadata={"static": True})

    def __post_init__(self):
        if self.form not in FORMS:
            raise ConfigError(f"transfer.form is {self.form!r}; expected one of {list(FORMS)}. Change it")
        check_targets(self.targets)

    def phases(self):
        return (lambda path: of_tasks(path) or self._mapped(path),)

    def init(self, params, origin, key):
        frozen = {path: array for path, array in params.items() if not of_tasks(path)}
        kernels = {path: array for path, array in frozen.items() if is_target(path, self.targets)}
        check_targets(self.targets, kernels)
        maps = {}
        for path, kernel in kernels.items():
            *stack, m, n = kernel.shape
            if self.form == "scalar":
                maps[f"{path}/a"] = jnp.ones((*stack, 1, 1), kernel.dtype)
            elif self.form == "diagonal":
                maps[f"{path}/a"] = jnp.ones((*stack, n), kernel.dtype)
                if sibling(path, "bias") in frozen:
                    maps[f"{path}/b"] = jnp.zeros((*stack, n), kernel.dtype)
            else:
                for name, size in (("p", m), ("q", n)):
                    maps[f"{path}/{name}"] = jnp.broadcast_to(jnp.eye(size, dtype=kernel.dtype), (*stack, size, size))
        trained = {path: array for path, array in params.items() if path not in frozen}
        return trained | {f"{PREFIX}/{path}": array for path, array in maps.items()}, {"frozen": frozen}

    def adapt(self, params, kept, loss, batches):
        merged = {path: array for path, array in params.items() if not path.startswith(f"{PREFIX}/")} | kept["frozen"]
        for path in [path for path in kept["frozen"] if is_target(path, self.targets)]:
            kernel = kept["frozen"][path]
            of_map = {name: params.get(f"{PREFIX}/{path}/{name}") for name in "abpq"}
            if self.form == "left_right":
                merged[path] = of_map["p"] @ kernel @ of_map["q"]
                continue
            scale = of_map["a"] if self.form == "scalar" else of_map["a"][..., None, :]
            merged[path] = kernel * scale
            if of_map["b"] is not None:
                bias = sibling(path, "bias")
                merged[bias] = kept["frozen"][bias] * of_map["a"] + of_map["b"]
        return merged

    def _mapped(self, path: str) -> bool:
        """Kernels of the map, and the biases beside them, which ``diagonal`` maps as well."""
        if is_target(path, self.targets):
            return True
        beside = sibling(path, "kernel")
        return self.form == "diagonal" and path.endswith("/bias") and is_target(beside, self.targets)
