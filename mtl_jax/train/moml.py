"""MOML: weights that lower the held-out losses of all tasks, one step ahead, as MGDA would."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from mtl_jax.balancing import Balancer
from mtl_jax.balancing.base import register
from mtl_jax.balancing.learnable import Learnable, adam_step, learnable
from mtl_jax.balancing.options import checked
from mtl_jax.balancing.solvers import min_norm
from mtl_jax.train.cut_model import CutModel
from mtl_jax.train.gradients import Balanced, BalancingOptions, by_weights, task_gradients, weighted_sum


def moml(*, inner_lr: float = 0.1, meta_lr: float = 1e-3) -> Balancer:
    r"""Multi-objective meta learning of the weights :math:`w = \mathrm{softmax}(\alpha)`. One half of the batch trains; the
    losses of the other half, a step ahead, are as many objectives for :math:`\alpha`:

    .. math::
        \theta' = \theta - \eta \sum_i w_i\, g_i
        \qquad
        a_t = \nabla_\alpha L_t^{held}(\theta')
            = -\eta\, \bigl[\langle \nabla L_t^{held}(\theta'),\ g_i \rangle\bigr]_i\,
            \bigl(\mathrm{diag}\, w - w w^\top\bigr)

    The shortest convex combination of the :math:`a_t / \lVert a_t \rVert` goes through Adam, and the step is that of
    :math:`\sum_i w_i L_i^{train}` with the new weights, over the whole network.

    Args:
      inner_lr: :math:`\eta \ge 0`, the step that is looked ahead.
      meta_lr: Learning rate of :math:`\alpha` in its own Adam, >= 0; 0 keeps equal weights.

    Returns:
      A balancer for the train step: two halves of a batch, T + 2 backward passes and T forward derivatives. Its state is
      :math:`\alpha` with its Adam.

    Raises:
      ConfigError: An option is out of its range.

    Example:
      >>> from mtl_jax.train import moml
      >>> balancer = moml(inner_lr=0.05)  # for mtl_jax.train.fit(model, data, balancer=balancer)
      >>> balancer.num_batches
      2

    Edge cases:
      ============================================ ==================================================
      tasks with equal gradients                   :math:`\alpha` stays
      a task without labels in the training half   weight 0, its :math:`\alpha` stays
      a task without labels in the held-out half   is no objective in this step
      ============================================ ==================================================

    References:
      Ye, Lin, Yue, Guo, Xiao, Zhang, *Multi-Objective Meta Learning*, NeurIPS 2021,
      `arXiv:2102.07121 <https://arxiv.org/abs/2102.07121>`_, with one inner step.
    """
    return Moml(checked(inner_lr, "moml(inner_lr)", at_least=0.0), checked(meta_lr, "moml(meta_lr)", at_least=0.0))


class MomlState(NamedTuple):
    """The logits of the weights."""

    logits: Learnable


@register
@dataclasses.dataclass(frozen=True)
class Moml(Balancer):
    inner_lr: Any
    meta_lr: Any

    needs: ClassVar = "losses"
    num_batches: ClassVar = 2
    homogeneity: ClassVar = None
    scaling: ClassVar = "mean"
    owns_step: ClassVar = True
    weighted_heads: ClassVar = True

    def init(self, num_tasks: int, params: PyTree | None = None) -> MomlState:
        return MomlState(learnable(jnp.zeros(num_tasks)))

    def weigh(
        self,
        gramian: None,
        losses: Float[Array, " task"],
        state: MomlState,
        key: PRNGKeyArray | None,
        *,
        active: Bool[Array, " task"] | None = None,
    ) -> tuple[Float[Array, " task"], MomlState]:
        active = jnp.ones(losses.shape, bool) if active is None else active
        return jax.nn.softmax(state.logits.value.astype(losses.dtype), where=active), state

    def gradients(
        self,
        model: CutModel,
        state: MomlState,
        key: PRNGKeyArray,
        options: BalancingOptions,
        learning_rate: Callable[[str], Any] | None = None,
    ) -> Balanced:
        train, held_out = model.batch(0), model.batch(1)
        found = task_gradients(model, train)
        active = found.losses.denominator > 0
        weights, _ = self.weigh(None, found.losses.loss, state, None, active=active)
        inner = weighted_sum(model, found, weights, weights)
        ahead = jax.tree.map(lambda value, slope: value - self.inner_lr * slope, model.params, inner)

        def judged(params):
            losses = model.losses(*params, held_out)
            return losses.loss, losses.denominator

        _, pull_held_out, labels = jax.vjp(judged, ahead, has_aux=True)
        judges = model.total(labels) > 0  # of all devices
        _, slopes_along = jax.linearize(lambda params: model.losses(*params, train).loss, model.params)
        one_by_one = jnp.eye(len(model.heads), dtype=found.losses.loss.dtype)
        products = jax.lax.map(lambda task: model.total(slopes_along(model.total(pull_held_out(task)[0]))), one_by_one)
        slopes = slopes_of_logits(products, weights, self.inner_lr, judges)
        learned = adam_step(state.logits, slopes, self.meta_lr, active=active & jnp.all(jnp.isfinite(slopes)))
        return by_weights(model, found, None, self, MomlState(learned), None, options)


def slopes_of_logits(
    products: Float[Array, "objective task"],
    weights: Float[Array, " task"],
    inner_lr: float | Float[Array, ""],
    judges: Bool[Array, " objective"],
) -> Float[Array, " task"]:
    """The shortest combination of the unit gradients of all objectives in the logits."""
    rows = -inner_lr * (products - (products @ weights)[:, None]) * weights
    norms = jnp.linalg.norm(rows, axis=1)
    rounding = 16 * jnp.finfo(rows.dtype).eps * inner_lr * jnp.max(jnp.abs(products), axis=1)
    present = judges & (norms > rounding)
    units = jnp.where(present[:, None], rows / jnp.where(norms > 0, norms, 1)[:, None], 0)
    mixture = min_norm(jnp.matmul(units, units.T, precision="highest"), present).value
    return jnp.matmul(mixture, units, precision="highest")
