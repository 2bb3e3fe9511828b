"""LoRA: low-rank changes of frozen kernels."""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from mtl_jax.arguments import check_count, check_number
from mtl_jax.balancing.base import register
from mtl_jax.train.adaptation import Adaptation
from mtl_jax.transfer.kernels import check_targets, is_target, of_tasks

PREFIX = "aux/lora"


@register
@dataclasses.dataclass(frozen=True)
class LoRA(Adaptation):
    r"""Frozen kernels of shared layers with a trained low-rank change, beside the tasks' own parameters.

    .. math:: W + \frac{\alpha}{r} A B, \qquad A \in R^{m \times r}, \; B \in R^{r \times n}

    A is drawn from :math:`\pm 1/\sqrt{m}` and B is zero, so that training begins at the source's model. Stacked kernels
    [..., m, n] (experts, domains) have a pair each. The deployed model is the merged one: an ordinary model.

    Attributes:
      rank: r, at least 1.
      alpha: :math:`\alpha > 0`.
      targets: Pattern of the paths of the kernels, among those of shared layers.
      rank_stabilised: :math:`\alpha / \sqrt{r}` in place of :math:`\alpha / r`.

    Raises:
      ConfigError: By ``init``, where no kernel has such a path.

    References:
      Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang, Chen, *LoRA: Low-Rank Adaptation of Large Language Models*, ICLR 2022;
      Kalajdzievski, *A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA*, 2023.
    """

    adapts: ClassVar[bool] = True

    rank: int = dataclasses.field(default=8, metadata={"static": True})
    alpha: float = 8.0
    targets: str = dataclasses.field(default=".*/kernel", metadata={"static": True})
    rank_stabilised: bool = dataclasses.field(default=False, metadata={"static": True})

    def __post_init__(self):
        check_count(self.rank, "transfer.rank")
        check_number(self.alpha, "transfer.alpha", above=0)
        check_targets(self.targets)

    def phases(self):
        return (lambda path: of_tasks(path) or is_target(path, self.targets),)

    def init(self, params, origin, key):
        frozen = {path: array for path, array in params.items() if is_target(path, self.targets)}
        check_targets(self.targets, frozen)
        trained = {path: array for path, array in params.items() if path not in frozen}
        for number, (path, kernel) in enumerate(sorted(frozen.items())):
            *stack, m, n = kernel.shape
            bound = 1 / math.sqrt(m)
            own = jax.random.fold_in(key, number)
            trained[f"{PREFIX}/{path}/a"] = jax.random.uniform(own, (*stack, m, self.rank), kernel.dtype, -bound, bound)
            trained[f"{PREFIX}/{path}/b"] = jnp.zeros((*stack, self.rank, n), kernel.dtype)
        return trained, {"frozen": frozen}

    def adapt(self, params, kept, loss, batches):
        scale = self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)
        merged = {path: array for path, array in params.items() if not path.startswith(f"{PREFIX}/")}
        for path, kernel in kept["frozen"].items():
            merged[path] = kernel + scale * (params[f"{PREFIX}/{path}/a"] @ params[f"{PREFIX}/{path}/b"])
        return merged
