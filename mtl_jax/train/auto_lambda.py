"""Auto-Lambda: weights that lower the held-out losses of the primary tasks, one step ahead."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from mtl_jax.balancing import Balancer, TaskLike
from mtl_jax.balancing.base import register
from mtl_jax.balancing.learnable import Learnable, adam_step, learnable
from mtl_jax.balancing.options import checked
from mtl_jax.errors import ConfigError
from mtl_jax.train.cut_model import CutModel
from mtl_jax.train.gradients import Balanced, BalancingOptions, by_weights, task_gradients, weighted_sum


def auto_lambda(
    *, primary: Sequence[str] | None = None, initial: float = 0.1, meta_lr: float = 1e-4, inner_lr: float | None = None
) -> Balancer:
    r"""Weights by look-ahead. One half of the batch trains; the other is held out, and says how the losses of the primary
    tasks P would change with the weights of the step before it is taken:

    .. math::
        \theta' = \theta - \eta \nabla \sum_i \lambda_i L_i^{train}(\theta)
        \qquad
        h_i = \frac{\partial}{\partial \lambda_i} \sum_{p \in P} L_p^{held}(\theta')
            = -\eta\, \Bigl\langle \nabla \sum_{p \in P} L_p^{held}(\theta'),\ \nabla L_i^{train}(\theta) \Bigr\rangle

    Adam moves :math:`\lambda` along -h, and the step is that of :math:`\sum_i \lambda_i L_i^{train}` with the new weights,
    over the whole network.

    Args:
      primary: Names of the tasks that count in the end; None: all.
      initial: :math:`\lambda` at first.
      meta_lr: Learning rate of :math:`\lambda` in its own Adam, >= 0; 0 keeps the weights.
      inner_lr: :math:`\eta > 0`. None: the optimizer's rate in this step; an optimizer that is a bare optax transform
        keeps its rate to itself, and stands for 1.

    Returns:
      A balancer for the train step: two halves of a batch, three backward passes and a forward derivative. Its state is
      :math:`\lambda` with its Adam.

    Raises:
      ConfigError: An option is out of its range, or a primary task is none of the model's.

    Example:
      >>> from mtl_jax.train import auto_lambda
      >>> balancer = auto_lambda(primary=["buy"])  # for mtl_jax.train.fit(model, data, balancer=balancer)
      >>> print(balancer.init(3).weights.value)
      [0.1 0.1 0.1]

    Edge cases:
      ===================================== =========================================================
      a task without labels in its half     weight 0, its :math:`\lambda` stays
      no primary task in the held-out half  h = 0
      :math:`\lambda` below 0               is allowed, as in the paper: the task is ascended on
      ===================================== =========================================================

    References:
      Liu, James, Davison, Johns, *Auto-Lambda: Disentangling Dynamic Task Relationships*, TMLR 2022,
      `arXiv:2202.03091 <https://arxiv.org/abs/2202.03091>`_. h is exact here, by one forward derivative of all losses;
      the authors' program takes a finite difference. Theirs draws the held-out batch from the training set too.
    """
    if primary is not None and (isinstance(primary, str) or not primary):
        raise ConfigError(
            f"auto_lambda(primary) is {primary!r}; expected a list of task names, or null for all. Change it"
        )
    return AutoLambda(
        None if primary is None else tuple(primary),
        checked(initial, "auto_lambda(initial)"),
        checked(meta_lr, "auto_lambda(meta_lr)", at_least=0.0),
        None if inner_lr is None else checked(inner_lr, "auto_lambda(inner_lr)", at_least=0.0),
    )


class AutoLambdaState(NamedTuple):
    """The weights."""

    weights: Learnable


@register
@dataclasses.dataclass(frozen=True)
class AutoLambda(Balancer):
    primary: tuple[str, ...] | None = dataclasses.field(metadata={"static": True})
    initial: Any
    meta_lr: Any
    inner_lr: Any

    needs: ClassVar = "losses"
    num_batches: ClassVar = 2
    homogeneity: ClassVar = None
    owns_step: ClassVar = True
    weighted_heads: ClassVar = True

    def init(self, num_tasks: int, params: PyTree | None = None) -> AutoLambdaState:
        return AutoLambdaState(learnable(jnp.full(num_tasks, self.initial, float)))

    def for_tasks(self, tasks: Sequence[TaskLike]) -> Balancer:
        names = [task.name for task in tasks]
        for name in self.primary or ():
            if name not in names:
                raise ConfigError(f"auto_lambda(primary) names the task '{name}'; expected some of {names}. Change it")
        return super().for_tasks(tasks)

    def weigh(
        self,
        gramian: None,
        losses: Float[Array, " task"],
        state: AutoLambdaState,
        key: PRNGKeyArray | None,
        *,
        active: Bool[Array, " task"] | None = None,
    ) -> tuple[Float[Array, " task"], AutoLambdaState]:
        weights = state.weights.value.astype(losses.dtype)
        return weights if active is None else jnp.where(active, weights, 0), state

    def gradients(
        self,
        model: CutModel,
        state: AutoLambdaState,
        key: PRNGKeyArray,
        options: BalancingOptions,
        learning_rate: Callable[[str], Any],
    ) -> Balanced:
        train, held_out = model.batch(0), model.batch(1)
        found = task_gradients(model, train)
        active = found.losses.denominator > 0
        weights, _ = self.weigh(None, found.losses.loss, state, None, active=active)
        rate = learning_rate if self.inner_lr is None else lambda path: self.inner_lr
        ahead = jax.tree.map(jnp.subtract, model.params, scaled(weighted_sum(model, found, weights, weights), rate))
        primary = jnp.array([self.primary is None or task in self.primary for task in model.heads])

        def held_out_loss(params):
            return jnp.sum(model.losses(*params, held_out).loss, where=primary)

        # The held-out losses fall along this tangent, and every training loss has a part in it.
        tangent = scaled(model.total(jax.grad(held_out_loss)(ahead)), rate)
        _, slopes = jax.jvp(lambda params: model.losses(*params, train).loss, (model.params,), (tangent,))
        slopes = model.total(slopes)
        learned = adam_step(state.weights, -slopes, self.meta_lr, active=active & jnp.all(jnp.isfinite(slopes)))
        return by_weights(model, found, None, self, AutoLambdaState(learned), None, options)


def scaled(gradients: PyTree, rate: Callable[[str], Any]) -> PyTree:
    """Each gradient times the rate of its path."""
    return jax.tree.map_with_path(lambda where, leaf: rate(where[-1].key) * leaf, gradients)
