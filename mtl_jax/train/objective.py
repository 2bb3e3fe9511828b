"""The joint objective: from element-wise losses to one number a task."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from mtl_jax import losses
from mtl_jax.errors import ConfigError
from mtl_jax.tasks import Task

REDUCTIONS = ("mean", "sum")
NONFINITE = ("raise", "skip")


@dataclasses.dataclass(frozen=True)
class Objective:
    r"""How the losses of one task become a number, over the observed labels of a step.

    With masks m, weights s and element losses l, :math:`N_k = \sum m s l` and :math:`D_k = \sum m s`:

    .. math::
        L_k = w_k \, N_k / D_k \quad (\text{mean}) \qquad L_k = w_k \, N_k \quad (\text{sum})

    A task without a label in the step has loss 0, gradient 0, and is inactive. The textbook objective
    :math:`\frac{1}{n} \sum_{i=1}^{n} \sum_{j=1}^{m} l(\theta_s, \theta_i; x_{ij}, y_{ij})` is ``reduction="sum"`` with
    the balancer ``equal(reduction="mean")``.

    Attributes:
      reduction: ``mean`` or ``sum`` over a task's observed rows.
      nonfinite: What a non-finite loss or gradient does: ``raise`` stops training before the update, ``skip`` leaves
        the update out and counts it.
    """

    reduction: str = "mean"
    nonfinite: str = "raise"

    def __post_init__(self):
        for field, choices in (("reduction", REDUCTIONS), ("nonfinite", NONFINITE)):
            if getattr(self, field) not in choices:
                raise ConfigError(
                    f"objective.{field} is '{getattr(self, field)}'; expected one of {list(choices)}. Change it"
                )

    def denominator(self, task: Task, batch: Mapping[str, Any]) -> Float[Array, ""]:
        """D_k of a batch: the weights of the task's observed labels."""
        return jnp.sum(label_weights(task, batch))

    def __call__(
        self,
        task: Task,
        outputs: Float[Array, "batch *out"],
        batch: Mapping[str, Any],
        total: Float[Array, ""] | None = None,
        key: PRNGKeyArray | None = None,
        elements: Float[Array, " batch"] | None = None,
    ) -> "TaskLoss":
        """The loss of one task on a batch.

        Args:
          task: The task.
          outputs: Of its head.
          batch: Labels, masks and weights.
          total: D_k of the whole step, where the batch is a part of it: the losses of the parts then add up to the loss
            of the step. By default the batch is the step.
          key: For losses that sample.
          elements: Losses of the rows, where they are not those of the task (see :class:`mtl_jax.sharing.Linked`).
        """
        scale = label_weights(task, batch)
        # A row of weight 0 (padding) counts as unobserved: its label must not reach the loss either.
        if elements is None:
            elements = losses.element_losses(task, outputs, batch["labels"][task.name], scale > 0, key=key)
        numerator, denominator = jnp.sum(scale * elements), jnp.sum(scale)
        loss = numerator
        if self.reduction == "mean":
            total = denominator if total is None else total
            loss = numerator / jnp.where(total > 0, total, 1.0)
        return TaskLoss(task.loss_weight * loss, numerator, denominator)


class TaskLoss(NamedTuple):
    """One task's loss in a step or a part of it, with the sums that it came from. Losses of the parts of a step add up."""

    loss: Float[Array, ""]
    numerator: Float[Array, ""]
    denominator: Float[Array, ""]


def label_weights(task: Task, batch: Mapping[str, Any]) -> Float[Array, "batch *width"]:
    """m s of every label; row masks and row weights count for all labels of a row."""
    labels, scale = batch["labels"][task.name], batch["weight"]
    if task.name in batch["task_weight"]:
        scale = scale * batch["task_weight"][task.name]

    def over_labels(rows):
        return rows.reshape(rows.shape + (1,) * (labels.ndim - rows.ndim))

    return jnp.broadcast_to(over_labels(batch["mask"][task.name]) * over_labels(scale), labels.shape)
