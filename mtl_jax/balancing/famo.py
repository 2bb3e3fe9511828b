"""FAMO: weights by which all losses fall at the same rate, learned from how they fell."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from mtl_jax.balancing.base import Balancer, TaskLike, register
from mtl_jax.balancing.learnable import Learnable, adam_step, learnable
from mtl_jax.balancing.options import PerTask, by_position, checked, vector

# Of the largest distance to the bounds: a loss at its bound keeps a logarithm.
EPSILON = 1e-8


def famo(*, weight_lr: float = 0.025, weight_decay: float = 1e-3, bound: PerTask = 0.0) -> Balancer:
    r"""Fast adaptive multitask optimization. Where :math:`D_i = L_i - b_i` is the distance of a loss to its lower bound,

    .. math::
        z = \mathrm{softmax}(\omega)
        \qquad w_i = \frac{z_i / D_i}{\sum_j z_j / D_j}
        \qquad O = c \sum_i z_i \log D_i, \quad c = \Bigl(\sum_j z_j / D_j\Bigr)^{-1} \text{ held constant}

    After the update of the parameters the losses of the same batch are looked at once more, which costs a forward
    pass. By how much each logarithm fell moves the logits, so that a task that improved more counts less:

    .. math::
        \delta_i = \log D_i - \log D_i^{\text{after}}
        \qquad \nabla_{\omega_i} = z_i \Bigl(\delta_i - \sum_j z_j \delta_j\Bigr) + \gamma\, \omega_i

    Args:
      weight_lr: Learning rate of :math:`\omega` in its own Adam, >= 0.
      weight_decay: :math:`\gamma \ge 0`, in the gradient; without it one task may take all the weight.
      bound: :math:`b`, below every value of the loss; one number, one per task, or by task name.

    Returns:
      A balancer that needs one backward pass, the losses, and the losses after the update through ``observe``; its
      state is :math:`\omega` with its Adam, and the losses that wait for their observation.

    Raises:
      ConfigError: An option is out of its range, or does not fit the tasks.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtl_jax.balancing import aggregate, famo
      >>> jacobian, balancer = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]), famo()
      >>> direction, state = aggregate(balancer, jacobian, balancer.init(2), losses=[1.0, 2.0])
      >>> state = balancer.observe(jnp.array([0.5, 1.5]), state)  # the first task improved more
      >>> print(direction.round(4), state.logits.value.round(4))
      [-0.6667  1.      1.    ] [-0.025  0.025]

    Edge cases:
      ======================================== =========================================================
      one task                                 its own gradient
      a loss at its bound                      stands for 1e-8 of the largest distance
      a loss below its bound, or all at theirs a non-finite step: the weights are NaN
      such losses, or others, after the update not finite in the logarithm: :math:`\omega` stays
      an inactive task                         is in no sum; its logit, moments and step count stay
      no observation before the next step      the losses of that step replace those that wait
      ======================================== =========================================================

    References:
      Liu, Feng, Stone, Liu, *FAMO: Fast Adaptive Multitask Optimization*, NeurIPS 2023,
      `arXiv:2306.03792 <https://arxiv.org/abs/2306.03792>`_. As in the paper :math:`\delta` compares one batch with
      itself, before and after its own update; code that waits for the losses of the next batch measures the batches
      too. The paper leaves :math:`\gamma` to a search and the authors' programs disagree on it: here 1e-3.
    """
    return Famo(
        checked(weight_lr, "famo(weight_lr)", at_least=0.0),
        checked(weight_decay, "famo(weight_decay)", at_least=0.0),
        checked(bound, "famo(bound)"),
    )


class FamoState(NamedTuple):
    """The logits, the losses of the latest step, and which of them are still to be compared."""

    logits: Learnable
    losses: Float[Array, " task"]
    pending: Bool[Array, " task"]


@register
@dataclasses.dataclass(frozen=True)
class Famo(Balancer):
    weight_lr: Any
    weight_decay: Any
    bound: Any

    needs: ClassVar = "losses"
    scaling: ClassVar = "mean"
    reads_losses: ClassVar = True
    observes: ClassVar = True
    weighted_heads: ClassVar = True

    def init(self, num_tasks: int, params: PyTree | None = None) -> FamoState:
        vector(self.bound, num_tasks, "famo(bound)")
        return FamoState(learnable(jnp.zeros(num_tasks)), jnp.zeros(num_tasks), jnp.zeros(num_tasks, bool))

    def for_tasks(self, tasks: Sequence[TaskLike]) -> Balancer:
        bound = by_position(self.bound, [task.name for task in tasks], "famo(bound)")
        return dataclasses.replace(super().for_tasks(tasks), bound=bound)

    def weigh(
        self,
        gramian: Float[Array, "task task"] | None,
        losses: Float[Array, " task"],
        state: FamoState,
        key: PRNGKeyArray | None,
        *,
        active: Bool[Array, " task"] | None = None,
    ) -> tuple[Float[Array, " task"], FamoState]:
        pending = jnp.ones(losses.shape, bool) if active is None else active
        kept = jnp.where(pending, losses.astype(state.losses.dtype), state.losses)
        distances = self._distances(kept)
        logs = jnp.log(distances + self._epsilon(distances, pending))
        weights = jax.nn.softmax(state.logits.value - logs, where=pending)
        return weights.astype(losses.dtype), FamoState(state.logits, kept, pending)

    def observe(
        self,
        losses_after: Float[Array, " task"],
        state: FamoState,
        *,
        active: Bool[Array, " task"] | None = None,
    ) -> FamoState:
        pending = state.pending if active is None else state.pending & active
        before, after = self._distances(state.losses), self._distances(losses_after)
        epsilon = self._epsilon(before, pending)
        fall = jnp.where(pending, jnp.log(before + epsilon) - jnp.log(after + epsilon), 0)
        moves = pending & jnp.all(jnp.isfinite(fall))
        shares = jax.nn.softmax(state.logits.value, where=pending)
        gradient = shares * (fall - jnp.sum(shares * fall)) + self.weight_decay * state.logits.value
        logits = adam_step(state.logits, gradient, self.weight_lr, active=moves)
        return FamoState(logits, state.losses, jnp.zeros_like(pending))

    def _distances(self, losses):
        return losses - vector(self.bound, losses.shape[0], "famo(bound)").astype(losses.dtype)

    def _epsilon(self, distances, pending):
        return EPSILON * jnp.max(distances, where=pending, initial=0)
