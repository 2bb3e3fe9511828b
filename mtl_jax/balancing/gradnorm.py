"""GradNorm: weights learn to give each task a gradient as long as its training rate asks for."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from mtl_jax.balancing.base import Balancer, TaskLike, num_active, register
from mtl_jax.balancing.learnable import Learnable, adam_step, learnable
from mtl_jax.balancing.options import checked
from mtl_jax.errors import ConfigError

WEIGHT_OPTIMIZERS = ("adam", "sgd")
INITIAL_LOSSES = ("first", "log2")
MIN_WEIGHT = 1e-3


def gradnorm(
    *, alpha: float = 1.5, weight_lr: float = 0.025, weight_optimizer: str = "adam", initial: str = "first"
) -> Balancer:
    r"""Gradient normalization. A task that trains slowly, measured by its loss relative to its first one, is to have a
    longer gradient:

    .. math::
        q_i = w_i \lVert g_i \rVert
        \qquad r_i = \frac{L_i / L_i^0}{\operatorname{mean}_j L_j / L_j^0}
        \qquad \frac{\partial}{\partial w_i} = \operatorname{sign}(q_i - \bar q\, r_i^\alpha)\,
        \frac{\lVert g_i \rVert}{\bar q}

    with :math:`\bar q` the mean of q. The weights of a step are read before their own step along that derivative, after
    which :math:`w \leftarrow \max(w, 10^{-3})` and :math:`w \leftarrow T w / \sum_i w_i`.

    Args:
      alpha: :math:`\alpha`, how strongly a slow task is pulled; 0 asks for equal lengths.
      weight_lr: Learning rate of w, >= 0.
      weight_optimizer: ``adam`` or ``sgd``.
      initial: What :math:`L^0` is: ``first``, the first loss of each task, or ``log2``, :math:`\log 2` for binary tasks
        (for all, where only a number of tasks is known) and the first loss for the others.

    Returns:
      A balancer that needs the Gramian and the losses; its state is w with its optimizer and :math:`L^0`. The weights
      start at 1 and sum to T. The paper takes the gradients at the last shared layer.

    Raises:
      ConfigError: An option is out of its range.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtl_jax.balancing import aggregate, gradnorm
      >>> balancer = gradnorm(weight_lr=0.1)
      >>> jacobian, state = jnp.eye(2), balancer.init(2)
      >>> for losses in ([1.0, 1.0], [0.5, 1.0], [0.25, 1.0]):  # the first task trains fast
      ...     _, state = aggregate(balancer, jacobian, state, losses=losses)
      >>> print(state.weights.value.round(2))
      [0.84 1.16]

    Edge cases:
      ====================== ===========================================================================
      one task               its own gradient
      a loss below zero      a non-finite step: ratios of losses mean nothing
      a first loss of zero   the same, until there is one above zero
      an inactive task       keeps w, moments and :math:`L^0`; the others share what is left of the T
      ====================== ===========================================================================

    References:
      Chen, Badrinarayanan, Lee, Rabinovich, *GradNorm: Gradient Normalization for Adaptive Loss Balancing in Deep
      Multitask Networks*, ICML 2018, `arXiv:1711.02257 <https://arxiv.org/abs/1711.02257>`_. The derivative is divided
      by :math:`\bar q`, so that ``weight_lr`` means the same at any scale of the gradients. As in the paper the target
      :math:`\bar q\, r_i^\alpha` is a constant; some public code lets a gradient through it, uses one ratio for all
      tasks, or another :math:`\alpha`.
    """
    for option, value, choices in (
        ("weight_optimizer", weight_optimizer, WEIGHT_OPTIMIZERS),
        ("initial", initial, INITIAL_LOSSES),
    ):
        if value not in choices:
            raise ConfigError(f"gradnorm({option}) is {value!r}; expected one of {list(choices)}. Set one of them")
    return GradNorm(
        checked(alpha, "gradnorm(alpha)"),
        checked(weight_lr, "gradnorm(weight_lr)", at_least=0.0),
        weight_optimizer,
        initial,
    )


class GradNormState(NamedTuple):
    """``weights.value`` is w; a first loss of 0 is one that is not known yet."""

    weights: Learnable
    first_losses: Float[Array, " task"]


@register
@dataclasses.dataclass(frozen=True)
class GradNorm(Balancer):
    alpha: Any
    weight_lr: Any
    weight_optimizer: str = dataclasses.field(metadata={"static": True})
    initial: str | tuple[str, ...] = dataclasses.field(metadata={"static": True})

    needs: ClassVar = "gramian"
    reads_losses: ClassVar = True
    scaling: ClassVar = "sum"

    def init(self, num_tasks: int, params: PyTree | None = None) -> GradNormState:
        names = (self.initial,) * num_tasks if isinstance(self.initial, str) else self.initial
        first_losses = jnp.array([math.log(2) if name == "log2" else 0.0 for name in names])
        return GradNormState(learnable(jnp.ones(num_tasks)), first_losses)

    def for_tasks(self, tasks: Sequence[TaskLike]) -> Balancer:
        bound = super().for_tasks(tasks)
        if self.initial != "log2":
            return bound
        initial = tuple("log2" if task.kind == "binary" else "first" for task in tasks)
        return dataclasses.replace(bound, initial=initial)

    def weigh(
        self,
        gramian: Float[Array, "task task"],
        losses: Float[Array, " task"],
        state: GradNormState,
        key: PRNGKeyArray | None,
        *,
        active: Bool[Array, " task"] | None = None,
    ) -> tuple[Float[Array, " task"], GradNormState]:
        active = jnp.ones(losses.shape, bool) if active is None else active
        count = num_active(active, losses.shape[0])
        weights = state.weights.value
        unknown = active & (state.first_losses == 0)
        first_losses = jnp.where(unknown, losses, state.first_losses).astype(state.first_losses.dtype)

        ratios = losses / first_losses
        norms = jnp.sqrt(jnp.diagonal(gramian))
        mean_length = jnp.sum(weights * norms, where=active) / count
        rates = ratios / (jnp.sum(ratios, where=active) / count)
        gradient = jnp.sign(weights * norms - mean_length * rates**self.alpha) * norms / mean_length

        moved = self._step(state.weights, jnp.where(active, gradient, 0), active)
        floored = jnp.maximum(moved.value, MIN_WEIGHT)
        left = losses.shape[0] - jnp.sum(weights, where=~active)
        value = jnp.where(active, left * floored / jnp.sum(floored, where=active), weights)

        known = jnp.all(jnp.isfinite(ratios) & (losses >= 0), where=active)
        result = jnp.where(known, jnp.where(active, weights, 0), jnp.nan).astype(losses.dtype)
        return result, GradNormState(moved._replace(value=value.astype(weights.dtype)), first_losses)

    def _step(self, weights, gradient, active):
        if self.weight_optimizer == "adam":
            return adam_step(weights, gradient, self.weight_lr, active=active)
        return weights._replace(value=weights.value - self.weight_lr * gradient)
