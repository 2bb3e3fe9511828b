"""Nonlinear transfer: the target's units are a nonlinear function of the source's."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from mtl_jax.arguments import check_count
from mtl_jax.balancing.base import register
from mtl_jax.train.adaptation import Adaptation
from mtl_jax.transfer.kernels import check_targets, is_target, of_tasks, sibling

PREFIX = "aux/map"


@register
@dataclasses.dataclass(frozen=True)
class NonlinearMap(Adaptation):
    r"""Every unit of a shared layer, its weights and its bias as a vector u, is moved by a small network of the layer.

    .. math:: u' = u + V_2 \tanh(V_1 u + c_1) + c_2, \qquad V_1 \in R^{k \times (m + 1)}

    The source is frozen; the networks and the tasks' own parameters are trained. :math:`V_2` and :math:`c_2` begin at
    zero: training begins at the source's model. Layers of a stack (experts, domains) have a network each.

    Attributes:
      hidden: k, at least 1.
      targets: Pattern of the paths of the kernels, among those of shared layers.

    Raises:
      ConfigError: By ``init``, where no kernel has such a path.
    """

    adapts: ClassVar[bool] = True

    hidden: int = dataclasses.field(default=32, metadata={"static": True})
    targets: str = dataclasses.field(default=".*/kernel", metadata={"static": True})

    def __post_init__(self):
        check_count(self.hidden, "transfer.hidden")
        check_targets(self.targets)

    def phases(self):
        return (
            lambda path: (
                of_tasks(path)
                or is_target(path, self.targets)
                or (path.endswith("/bias") and is_target(sibling(path, "kernel"), self.targets))
            ),
        )

    def init(self, params, origin, key):
        frozen = {path: array for path, array in params.items() if not of_tasks(path)}
        kernels = {path: array for path, array in frozen.items() if is_target(path, self.targets)}
        check_targets(self.targets, kernels)
        trained = {path: array for path, array in params.items() if path not in frozen}
        for number, (path, kernel) in enumerate(sorted(kernels.items())):
            *stack, m, _ = kernel.shape
            size = m + (sibling(path, "bias") in frozen)
            first = jax.random.normal(jax.random.fold_in(key, number), (*stack, self.hidden, size), kernel.dtype)
            trained[f"{PREFIX}/{path}/v1"] = first / jnp.sqrt(size)
            trained[f"{PREFIX}/{path}/c1"] = jnp.zeros((*stack, self.hidden, 1), kernel.dtype)
            trained[f"{PREFIX}/{path}/v2"] = jnp.zeros((*stack, size, self.hidden), kernel.dtype)
            trained[f"{PREFIX}/{path}/c2"] = jnp.zeros((*stack, size, 1), kernel.dtype)
        return trained, {"frozen": frozen}

    def adapt(self, params, kept, loss, batches):
        merged = {path: array for path, array in params.items() if not path.startswith(f"{PREFIX}/")} | kept["frozen"]
        for path in [path for path in kept["frozen"] if is_target(path, self.targets)]:
            v1, c1, v2, c2 = (params[f"{PREFIX}/{path}/{name}"] for name in ("v1", "c1", "v2", "c2"))
            units, bias = kept["frozen"][path], sibling(path, "bias")
            if bias in kept["frozen"]:
                units = jnp.concatenate([units, kept["frozen"][bias][..., None, :]], axis=-2)
            units = units + v2 @ jnp.tanh(v1 @ units + c1) + c2
            if bias in kept["frozen"]:
                units, merged[bias] = units[..., :-1, :], units[..., -1, :]
            merged[path] = units
        return merged
