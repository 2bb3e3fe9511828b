"""Falling chances: a penalty where a later step is more likely than the one before."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from mtl_jax.arguments import check_number
from mtl_jax.sharing.links.base import Link, Linked
from mtl_jax.sharing.order import check_order


class FallingChances(Link):
    r"""The behavioural expectation calibrator of AITM: along an order of tasks, chances fall.

    .. math:: R = \alpha \sum_{t \ge 2} \operatorname{mean} \max(\sigma(a_t) - \sigma(a_{t-1}),\, 0)

    each mean over the rows where both tasks are observed (0 where there is none). Logits stay as they are. The penalty is
    added after balancing, with factor 1.

    Args:
      tasks: Task names.
      order: Tasks, first to last; None: all, in their order.
      weight: α >= 0.

    Raises:
      ConfigError: The order names no task, or one twice, or a task is not binary.

    Labels: as without a link.

    References:
      Xi, Chen, Yan, Zhang, Zhu, Zhuang, Chen, *Modeling the Sequential Dependence among Audience Multi-step Conversions
      with Multi-task Learning in Targeted Display Advertising*, KDD 2021, arXiv 2105.08489.
    """

    def __init__(self, tasks: Sequence[str], *, order: Sequence[str] | None = None, weight: float = 0.6):
        self.tasks = tuple(tasks)
        check_number(weight, "link.weight", least=0.0)
        order = check_order(order, self.tasks, least=1, place="link.order")
        self.weight = weight
        self.tie(penalised=list(zip(order[:-1], order[1:], strict=True)) if weight > 0 else (), tied=order)

    def __call__(self, logits, labels=None, weight=None) -> Linked:
        chances = {task: jax.nn.sigmoid(logit) for task, logit in logits.items() if task in self.tied}
        aux = {
            (before, after): self.weight * jnp.maximum(chances[after] - chances[before], 0)
            for before, after in self.penalised
            if before in chances and after in chances
        }
        return Linked(dict(logits), {}, aux)
