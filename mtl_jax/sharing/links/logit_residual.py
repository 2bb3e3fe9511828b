"""Logit residual: a step's logits are added to those of the step before."""

from collections.abc import Sequence

import jax

from mtl_jax.sharing.links.base import Link, Linked
from mtl_jax.sharing.order import check_order


class LogitResidual(Link):
    r"""Residual logits along an order of tasks: each tower learns what its step adds to those before.

    .. math:: a_k \leftarrow a_k + a_{k-1}, \qquad k = 2, \dots, K \text{ in order, so } a_k = \sum_{j \le k} a_j

    Args:
      tasks: Task names.
      order: Tasks, first to last; None: all, in their order. Tasks that are not named pass through.
      detach_previous: Whether gradients stop at the logits of the steps before.

    Raises:
      ConfigError: The order names no task, or one twice, or a task is not binary.

    Labels: towers and networks of all steps but the last are shared; with ``detach_previous`` each is its task's own.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtl_jax.sharing import LogitResidual
      >>> link = LogitResidual(("click", "cart", "buy"))
      >>> found = link({task: jnp.ones(1) for task in link.towers}).logits
      >>> {task: float(logits[0]) for task, logits in found.items()}
      {'click': 1.0, 'cart': 2.0, 'buy': 3.0}

    References:
      Fu, Liu, Zhao, Cheng, Sun, Ji, Liu, *Residual Multi-Task Learner for Applied Ranking*, KDD 2024, arXiv 2411.09705.
    """

    def __init__(self, tasks: Sequence[str], *, order: Sequence[str] | None = None, detach_previous: bool = False):
        self.tasks = tuple(tasks)
        order = check_order(order, self.tasks, least=1, place="link.order")
        self.steps, self.detach_previous = order, detach_previous
        before = order[:-1]
        self.tie(
            reads={step: order[: last + 1] for last, step in enumerate(order)},
            shared=() if detach_previous else before,
            detached=before if detach_previous else (),
            tied=order,
        )

    def __call__(self, logits, labels=None, weight=None) -> Linked:
        found = dict(logits)
        for step in self.steps:
            if any(tower not in logits for tower in self.reads[step]):
                found.pop(step, None)
                continue
            *before, own = (logits[tower] for tower in self.reads[step])
            stop = jax.lax.stop_gradient if self.detach_previous else lambda a: a
            found[step] = own + sum(map(stop, before))
        return Linked(found, {}, {})
