"""Gradual unfreezing: the towers first, then from epoch to epoch one group more towards the input."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from mtl_jax.arguments import check_count
from mtl_jax.balancing.base import register
from mtl_jax.errors import ConfigError
from mtl_jax.train.adaptation import Adaptation
from mtl_jax.transfer.discriminative_lr import groups

EPOCHS, FINISHED = "epochs", "finished"


@register
@dataclasses.dataclass(frozen=True)
class GradualUnfreeze(Adaptation):
    r"""In epoch e = 1, 2, ... the first :math:`\lceil e / k \rceil` groups train: towers, layers from the top, tables.

    A group that waits stays to the last bit, without weight decay, and has no part in the norm of the gradient that
    ``optimizer.clip_norm`` bounds. When it begins its optimizer does, too: moments are 0, and schedules of the learning
    rate count from there. What compares gradients of tasks sees those of all groups, so that it has something to compare
    while only towers are trained. Dropout is on and statistics of batches move everywhere from the first step.

    Patience counts from the first epoch that trains all groups. With one group it is plain fine-tuning.

    Attributes:
      epochs_per_group: k, from 1.
      allow_partial: Whether training may have too few epochs to give each group k of them.

    Raises:
      ConfigError: Where it has too few and may not.

    References:
      Howard, Ruder, *Universal Language Model Fine-tuning for Text Classification*, ACL 2018. The groups are those of
      :class:`mtl_jax.transfer.DiscriminativeLR`.
    """

    by_epoch: ClassVar[bool] = True

    epochs_per_group: int = dataclasses.field(default=1, metadata={"static": True})
    allow_partial: bool = dataclasses.field(default=False, metadata={"static": True})

    def __post_init__(self):
        check_count(self.epochs_per_group, "transfer.epochs_per_group")

    def groups(self, params):
        depths = groups(params)
        present = sorted(set(depths.values()))
        return {path: present.index(depth) for path, depth in depths.items()} if len(present) > 1 else {}

    def init(self, params, origin, key):
        return params, {EPOCHS: {FINISHED: jnp.zeros((), jnp.int32)}}

    def num_begun(self, kept):
        return kept[EPOCHS][FINISHED] // self.epochs_per_group + 1

    def end_epoch(self, params, kept):
        return params, {EPOCHS: {FINISHED: kept[EPOCHS][FINISHED] + 1}}

    def patient_from(self, params, epochs):
        number, each = 1 + max(self.groups(params).values(), default=0), self.epochs_per_group
        if epochs < number * each and not self.allow_partial:
            raise ConfigError(
                f"trainer.epochs is {epochs} for {number} groups of parameters that begin one after the other, "
                f"transfer.epochs_per_group={each}; expected at least {number * each}. Raise it, or set "
                "transfer.allow_partial=true"
            )
        return (number - 1) * each + 1
