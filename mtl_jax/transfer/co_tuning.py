"""Co-tuning: the source's towers learn what the source's model says of the target's classes."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mtl_jax.arguments import check_number
from mtl_jax.balancing.base import register
from mtl_jax.errors import ConfigError
from mtl_jax.tasks import Task
from mtl_jax.train.adaptation import Adaptation, is_zero, mean_over_rows
from mtl_jax.transfer.fine_tune import FineTune
from mtl_jax.transfer.lwf import deployed, of_source, with_copies

RELATION = "relation"


@register
@dataclasses.dataclass(frozen=True)
class CoTuning(Adaptation):
    r"""Fine-tuning with the source's towers kept beside the target's, trained on soft labels that follow from the classes.

    .. math::
        L_t + \lambda \, \overline{\mathrm{CE}(q(y_t), p(x_t))}, \qquad q(c) = \overline{p^0(x_t)}_{\,y_t = c}

    p are the outputs of the source's towers on the layers that both share, and row c of the relation q f32[class, class] is
    the mean of what the source's model says of the target's training rows of class c: a task has the same classes in
    source and target here, and q is what became of their meaning. A binary task has two classes, with the probabilities
    of its logit. Means are over rows of a weight above 0 whose label is observed, whatever the weight; there is a term for
    every task. The deployed model has the target's towers only.

    This is the paper's direct way to q. The paper also calibrates :math:`p^0` first, by a temperature that is fitted to
    validation rows of the source; here it is taken as it is, since the target's run reads no row of the source.

    Attributes:
      weight: :math:`\lambda \ge 0`.

    Raises:
      ConfigError: By ``init``, where a task's tower did not come from the source; by ``check_labels``, for tasks that are
        neither binary nor multiclass, and for classes that no training row of the target has.

    References:
      You, Kou, Long, Wang, *Co-Tuning for Transfer Learning*, NeurIPS 2020.
    """

    adapts: ClassVar[bool] = True
    penalises: ClassVar[bool] = True
    reads_rows: ClassVar[bool] = True
    studies: ClassVar[float] = np.inf

    weight: float = 2.3

    def __post_init__(self):
        check_number(self.weight, "transfer.weight", least=0)

    def simplified(self):
        return FineTune() if is_zero(self.weight) else self

    def init(self, params, origin, key):
        return with_copies(params, origin, "CoTuning"), {}

    def check_labels(self, tasks, labels, counted):
        found = {task.name: np.unique(labels[task.name][counted[task.name]]).astype(int) for task in tasks}
        absent = {
            task.name: missing
            for task in tasks
            if (missing := [name for number, name in enumerate(_classes(task)) if number not in found[task.name]])
        }
        if absent:
            raise ConfigError(
                f"classes {absent} have no training row of the target, and transfer 'CoTuning' relates every class to the "
                "source's; expected rows of all. Raise data.target_fraction, leave the tasks out (data.tasks), or choose "
                "another transfer"
            )

    def study(self, params, kept, add_up):
        def sums(view):
            outputs, found = view.outputs(deployed(params), train=False), {}
            for task in view.tasks:
                said = jnp.exp(_log_probabilities(task, outputs[task.name]))
                of_class = view.labels[task.name][:, None] == jnp.arange(said.shape[-1])
                of_class = jnp.where(view.counted[task.name][:, None] & of_class, 1.0, 0.0)
                total = jnp.einsum("bc,bs->cs", of_class, said, precision="highest")
                found[task.name] = total, jnp.sum(of_class, axis=0)
            return found

        return {RELATION: {task: total / number[:, None] for task, (total, number) in add_up(sums).items()}}

    def adapt(self, params, kept, loss, batches):
        return deployed(params)

    def penalty(self, params, kept, view):
        outputs, terms = view.outputs(of_source(params), train=True), []
        for task in view.tasks:
            counted = view.counted[task.name]
            classes = jnp.where(counted, view.labels[task.name], 0).astype(int)
            relation = kept[RELATION][task.name][classes]
            rows = -jnp.sum(relation * _log_probabilities(task, outputs[task.name]), axis=-1)
            terms.append(mean_over_rows(rows, counted, view.axis))
        return self.weight * sum(terms)


def _classes(task: Task) -> tuple[str, ...]:
    if task.kind == "binary":
        return ("0", "1")
    if task.kind == "multiclass":
        return task.classes
    raise ConfigError(
        f"transfer 'CoTuning' has no classes for the {task.kind} task '{task.name}'; expected binary or multiclass tasks. "
        "Leave it out (data.tasks), or choose another transfer"
    )


def _log_probabilities(task: Task, outputs: Float[Array, "batch *class"]) -> Float[Array, "batch class"]:
    outputs = outputs.astype(jnp.promote_types(outputs.dtype, jnp.float32))  # sums over all rows follow
    if task.kind == "binary":
        return jnp.stack([jax.nn.log_sigmoid(-outputs), jax.nn.log_sigmoid(outputs)], axis=-1)
    return jax.nn.log_softmax(outputs)
