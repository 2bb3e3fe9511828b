"""SAMO: every task's gradient at a point nearby where the losses are higher, and then another method."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from mtl_jax.arguments import shown
from mtl_jax.balancing import Balancer
from mtl_jax.balancing.base import register
from mtl_jax.balancing.options import checked
from mtl_jax.balancing.wrapper import Wrapper
from mtl_jax.errors import ConfigError
from mtl_jax.train.cut_model import CutModel, only_in_scope
from mtl_jax.train.gradients import Balanced, BalancingOptions, TaskGradients, by_entries, by_weights


def samo(base: Balancer, *, rho: float = 1e-3, beta: float = 0.5, difference_step: float = 0.01) -> Balancer:
    r"""Sharpness-aware multi-task optimization. Each task has a point of its own, in a direction that mixes the gradient
    of the mean loss, :math:`\bar g`, with an estimate of the task's own gradient from two losses, tensor by tensor:

    .. math::
        \hat z_i = \frac{L_i(\theta + \zeta \xi_i) - L_i(\theta - \zeta \xi_i)}{2 \zeta}\, \xi_i, \quad \xi_i \sim N(0, I)
        \qquad
        u_i = (1 - \beta)\, \bar g + \beta\, \lVert \bar g \rVert \frac{\hat z_i}{\lVert \hat z_i \rVert}

    .. math::
        g_i = \nabla L_i\Bigl(\theta + \rho \frac{u_i}{\lVert u_i \rVert},\;
        \phi_i + \rho \frac{\nabla_{\phi_i} L_i}{\lVert \nabla_{\phi_i} L_i \rVert}\Bigr)

    with the length of :math:`u_i` over all tensors. The other method balances these gradients; heads receive their own.

    Args:
      base: The other method; one batch a step.
      rho: :math:`\rho \ge 0`, how far away the points are; 0 gives the other method.
      beta: :math:`\beta` in [0, 1], the share of a task's own direction; 0 is SAM's point, the same for all tasks.
      difference_step: :math:`\zeta > 0`, the step of the estimate.

    Returns:
      A balancer for the train step, with the scopes ``encoder`` and ``shared``, which are what it perturbs: 1 + T backward
      and 2 T forward passes. Its state is that of ``base``. The gradients of all tasks are held, those of tables too.

    Raises:
      ConfigError: An option is out of its range, or ``base`` is no balancer, takes several batches or owns the step.

    Example:
      >>> from mtl_jax.balancing import mgda
      >>> from mtl_jax.train import samo
      >>> balancer = samo(mgda(), rho=0.01)  # for mtl_jax.train.fit(model, data, balancer=balancer)
      >>> balancer.needs
      'gramian'

    Edge cases:
      ================================ ===============================================================
      a tensor without a gradient      is not perturbed
      a task without labels            has no gradient; the others' points do not depend on it
      dropout                          the same units are dropped in all passes of a step
      ================================ ===============================================================

    References:
      Ban, Subramani, Ji, *SAMO: Sharpness-Aware Multi-Task Optimization with Joint Global-Local Perturbation*, ICCV 2025.
      Defaults are those of the published run scripts; the argument parser there has :math:`\rho` 3e-3, :math:`\beta` 0.1.
      Sharpness-aware steps of one loss: Foret, Kleiner, Mobahi, Neyshabur, ICLR 2021.
    """
    if not isinstance(base, Balancer) or base.num_batches > 1 or base.owns_step:
        raise ConfigError(
            f"samo(base) is {shown(type(base).__name__ if isinstance(base, Balancer) else base)}; expected a balancer of "
            "one batch a step, such as mgda(). Choose another base"
        )
    return Samo(
        base,
        checked(rho, "samo(rho)", at_least=0.0),
        checked(beta, "samo(beta)", at_least=0.0, at_most=1.0),
        checked(difference_step, "samo(difference_step)", at_least=1e-12),
    )


class SamoState(NamedTuple):
    """The state of the other method."""

    base: Any


@register
@dataclasses.dataclass(frozen=True)
class Samo(Wrapper):
    base: Balancer
    rho: Any
    beta: Any
    difference_step: Any

    stochastic: ClassVar = True
    homogeneity: ClassVar = None
    weighted_heads: ClassVar = False
    scopes: ClassVar = ("encoder", "shared")
    owns_step: ClassVar = True

    def init(self, num_tasks: int, params: PyTree | None = None) -> SamoState:
        return SamoState(self.base.init(num_tasks, params))

    def gradients(
        self, model: CutModel, state: SamoState, key: PRNGKeyArray, options: BalancingOptions, learning_rate: Any = None
    ) -> Balanced:
        key, noise = jax.random.split(key)
        tasks, keys = jnp.arange(len(model.heads)), jax.random.split(noise, len(model.heads))
        ascent, own_ascent = model.sum(lambda part: _of_sum(model, part))
        ascent = only_in_scope(ascent, options.scope)
        own = {task: _moved(values, own_ascent[task], self.rho) for task, values in model.own.items()}

        def rise(part):
            def of_task(task_and_key):
                task, key = task_and_key
                step = {path: self.difference_step * draw for path, draw in _drawn(key, ascent).items()}
                ahead, behind = (_one_loss(model, task, _added(model.below, step, s), model.own, part) for s in (1, -1))
                return ahead.loss - behind.loss

            return jax.lax.map(of_task, (tasks, keys))

        rises = model.sum(rise)

        def gradients(part):
            def of_task(carry, task_key_and_rise):
                task, key, rise = task_key_and_rise
                below = _moved(model.below, self._direction(ascent, _drawn(key, ascent), rise), self.rho)

                def loss(below, own):
                    found = _one_loss(model, task, below, own, part)
                    return found.loss, found

                (_, found), (rows, own_gradient) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(below, own)
                return jax.tree.map(jnp.add, carry, own_gradient), (found, rows)

            zeros = jax.tree.map(jnp.zeros_like, own)
            own_gradient, (losses, rows) = jax.lax.scan(of_task, zeros, (tasks, keys, rises))
            return losses, own_gradient, rows

        found = TaskGradients(*model.sum(gradients))
        rows = only_in_scope(found.jacobian, options.scope)
        if options.head_gradient == "auto":
            options = dataclasses.replace(options, head_gradient="plain")
        if self.needs == "jacobian":
            balanced = by_entries(model, found, rows, self.base, state.base, key, options)
        else:
            products = self.base.products(rows) if self.needs == "gramian" else None
            balanced = by_weights(model, found, products, self.base, state.base, key, options)
        return balanced._replace(state=SamoState(balanced.state))

    def _direction(self, ascent: Mapping[str, Array], drawn: Mapping[str, Array], rise: Float[Array, ""]):
        """u of one task: of its estimated gradient only the sign of the difference is left."""

        def mixed(mean, draw):
            return (1 - self.beta) * mean + self.beta * jnp.linalg.norm(mean) * jnp.sign(rise) * _unit(draw)

        return {path: mixed(mean, drawn[path]) for path, mean in ascent.items()}


def _of_sum(model: CutModel, part: Any) -> tuple[dict[str, Array], dict[str, dict[str, Array]]]:
    """The gradient of the sum of the losses, which has the direction of that of their mean."""
    return jax.grad(lambda below, own: jnp.sum(model.losses(below, own, part).loss), argnums=(0, 1))(
        model.below, model.own
    )


def _one_loss(model: CutModel, task: Int[Array, ""], below: Mapping[str, Array], own: Mapping, part: Any):
    """The loss of the task with this number; the program has the common part once, and runs one head."""
    cut = model.common(below, part)
    heads = [lambda own, cut, task=task, head=head: head(own[task], cut, part) for task, head in model.heads.items()]
    return jax.lax.switch(task, heads, own, cut)


def _drawn(key: PRNGKeyArray, like: Mapping[str, Array]) -> dict[str, Array]:
    keys = jax.random.split(key, len(like))
    return {
        path: jax.random.normal(key, like[path].shape, like[path].dtype) for key, path in zip(keys, like, strict=True)
    }


def _moved(values: Mapping[str, Array], direction: Mapping[str, Array], distance: Any) -> dict[str, Array]:
    """The values at this distance along the direction, whose length counts over all of its arrays."""
    norm = jnp.sqrt(sum(jnp.vdot(leaf, leaf) for leaf in direction.values()))
    return _added(values, direction, distance / jnp.where(norm > 0, norm, 1))


def _added(values: Mapping[str, Array], direction: Mapping[str, Array], scale: Any) -> dict[str, Array]:
    return {path: value + scale * direction[path] if path in direction else value for path, value in values.items()}


def _unit(array: Array) -> Array:
    norm = jnp.linalg.norm(array)
    return array / jnp.where(norm > 0, norm, 1)
