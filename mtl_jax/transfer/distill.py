"""Distillation: the target's model keeps to what the source's says of the target's rows."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mtl_jax.arguments import check_number
from mtl_jax.balancing.base import register
from mtl_jax.errors import ConfigError
from mtl_jax.tasks import Task
from mtl_jax.train.adaptation import TEACHER, Adaptation, is_zero, mean_over_rows
from mtl_jax.transfer.fine_tune import FineTune


@register
@dataclasses.dataclass(frozen=True)
class Distill(Adaptation):
    r"""Fine-tuning, with the source's model as a teacher on every row of the target, labelled or not.

    .. math:: \lambda T^2 \, \overline{\mathrm{KL}(p_T \,\|\, p_S)}, \qquad p = \mathrm{softmax}(z / T)

    Binary and multilabel tasks have the Bernoulli divergence of their logits, regression tasks the mean squared distance
    of outputs. The factor :math:`T^2` keeps the size of the gradient as the temperature rises. Teacher and student read
    the same rows, the teacher as in evaluation.

    Attributes:
      weight: :math:`\lambda \ge 0`.
      temperature: :math:`T > 0`.

    Raises:
      ConfigError: By ``penalty``, for a task of a kind without such a distance (ordinal, count, zero-inflated).

    References:
      Hinton, Vinyals, Dean, *Distilling the Knowledge in a Neural Network*, NIPS workshop 2014; with the source's model
      as its own teacher it is the forgetting term of Li, Hoiem, *Learning without Forgetting*, ECCV 2016.
    """

    penalises: ClassVar[bool] = True
    reads_rows: ClassVar[bool] = True

    weight: float = 1.0
    temperature: float = 2.0

    def __post_init__(self):
        check_number(self.weight, "transfer.weight", least=0)
        check_number(self.temperature, "transfer.temperature", above=0)

    def init(self, params, origin, key):
        return params, {TEACHER: {path: jnp.copy(array) for path, array in params.items()}}

    def simplified(self):
        return FineTune() if is_zero(self.weight) else self

    def penalty(self, params, kept, view):
        taught = jax.lax.stop_gradient(view.outputs(kept[TEACHER], train=False))
        student = view.outputs(params, train=True)
        distances = [distance(task, taught[task.name], student[task.name], self.temperature) for task in view.tasks]
        return self.weight * sum(mean_over_rows(rows, view.weight, view.axis) for rows in distances)


def distance(
    task: Task, teacher: Float[Array, "batch *out"], student: Float[Array, "batch *out"], temperature: float
) -> Float[Array, " batch"]:
    """T^2 times the divergence of each row; the squared distance of a regression task."""
    if task.kind == "regression":
        return jnp.square(student - teacher)
    teacher, student = teacher / temperature, student / temperature
    if task.kind == "multiclass":
        p, q = jax.nn.log_softmax(teacher), jax.nn.log_softmax(student)
        return temperature**2 * jnp.sum(jnp.exp(p) * (p - q), axis=-1)
    if task.kind in ("binary", "multilabel"):
        yes, no = jax.nn.log_sigmoid(teacher), jax.nn.log_sigmoid(-teacher)
        of_labels = jnp.exp(yes) * (yes - jax.nn.log_sigmoid(student)) + jnp.exp(no) * (
            no - jax.nn.log_sigmoid(-student)
        )
        return temperature**2 * of_labels.reshape(len(of_labels), -1).sum(axis=-1)
    raise ConfigError(
        f"transfer 'Distill' has no distance for the {task.kind} task '{task.name}'; expected binary, multiclass, "
        "multilabel or regression tasks. Leave it out (data.tasks), or choose another transfer"
    )
