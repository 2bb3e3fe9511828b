"""ESMM: chances of several steps in a row, each trained on all rows."""

from collections.abc import Mapping, Sequence

from mtl_jax.errors import ConfigError
from mtl_jax.sharing.links.base import Link, Linked
from mtl_jax.sharing.links.chain import chain
from mtl_jax.sharing.order import check_order


class ESMM(Link):
    r"""Entire space multi-task model: a step's tower gives its chance *given* the step before, its loss is on all rows.

    With towers a (click) and b (purchase given click),

    .. math:: \ell = \operatorname{BCE}(y_\text{click},\, a)
        + \operatorname{BCE}(y_\text{click} y_\text{purchase},\, \operatorname{chain}(a, b))

    where the logit of the product of two chances is computed without forming it (:func:`~mtl_jax.sharing.chain`). So b
    learns from all impressions, and not from the clicked ones alone, whose choice is not random.

    Args:
      tasks: Task names.
      order: Two steps or more, first to last. Each is a task whose label says, for all rows, that the step and all before
        it were taken: ``("ctr", "ctcvr")``.
      given: Step -> a task with the same label in the rows where the step before was taken only (its ``space``), such
        as ``{"ctcvr": "cvr_click"}``. It has no loss and no tower: b is evaluated as its logit. Do not read the one for
        the other: ``cvr_click`` ranks clicked rows, ``ctcvr`` all.

    Raises:
      ConfigError: Steps are no tasks, not binary, or less than two; a row has a step without the one before.

    Labels: towers and networks of all steps but the last are shared, as the losses of later steps reach them.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtl_jax.sharing import ESMM
      >>> link = ESMM(("ctr", "cvr_click", "ctcvr"), order=("ctr", "ctcvr"), given={"ctcvr": "cvr_click"})
      >>> found = link({"ctr": jnp.zeros(2), "ctcvr": jnp.zeros(2)}).logits
      >>> {task: f"{float(logits[0]):.3f}" for task, logits in found.items()}
      {'ctr': '0.000', 'ctcvr': '-1.099', 'cvr_click': '0.000'}

    Public code often goes by the positions of the tasks, sums losses where others average, or leaves the label of the
    product among the features.

    References:
      Ma, Zhao, Huang, Wang, Hu, Zhu, Gai, *Entire Space Multi-Task Model: An Effective Approach for Estimating Post-Click
      Conversion Rate*, SIGIR 2018, arXiv 1804.07931.
    """

    def __init__(self, tasks: Sequence[str], *, order: Sequence[str], given: Mapping[str, str] | None = None):
        self.tasks = tuple(tasks)
        order = check_order(order, self.tasks, least=2, place="link.order")
        given = dict(given or {})
        check_given(given, order[1:], self.tasks)
        reads = {step: order[: last + 1] for last, step in enumerate(order)}
        self.tie(
            towers=[task for task in self.tasks if task not in given.values()],
            reads=reads | {task: (step,) for step, task in given.items()},
            shared=order[:-1],
            evaluated=given.values(),
            order=order,
            given={task: order[order.index(step) - 1] for step, task in given.items()},
            tied=[*order, *given.values()],
        )
        self.tasks_given = tuple(given.items())

    def __call__(self, logits, labels=None, weight=None) -> Linked:
        found = dict(logits)
        for step in self.order:
            if all(tower in logits for tower in self.reads[step]):
                found[step] = chain(*(logits[tower] for tower in self.reads[step]))
            else:
                found.pop(step, None)
        found |= {task: logits[step] for step, task in self.tasks_given if step in logits}
        return Linked(found, {}, {})


def check_given(given: Mapping[str, str], steps: Sequence[str], tasks: Sequence[str]) -> None:
    """Raises a ConfigError for chances given that are no tasks, or are of no step."""
    wrong = [
        f"{step}: {task}" for step, task in given.items() if step not in steps or task not in tasks or task in steps
    ]
    if wrong or len(set(given.values())) < len(given):
        raise ConfigError(
            f"link.given has {wrong or dict(given)}; expected some of the steps {list(steps)}, each with a task of its own "
            f"of {[task for task in tasks if task not in steps]}. Change it, or set it to null"
        )
