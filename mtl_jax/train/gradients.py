"""Balanced gradients: the only place that differentiates.

The model is cut in two: ``common`` goes from shared parameters and tables to the cut, one ``head`` a task from the cut
to its loss. Gradients of all tasks at the cut take one backward pass per head over its own graph; what lies below the
cut is pulled back once, with the weights already applied.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from mtl_jax.balancing import Balancer
from mtl_jax.balancing.base import weigh
from mtl_jax.balancing.rows import combine_rows, gramian
from mtl_jax.errors import ConfigError
from mtl_jax.model import is_table, label
from mtl_jax.train.objective import TaskLoss

SCOPES = ("representation", "encoder", "shared", "all")
HEAD_GRADIENTS = ("auto", "plain", "weighted")
JACOBIANS = ("map", "vmap")


@dataclasses.dataclass(frozen=True)
class BalancingOptions:
    """What applies to any balancer.

    Attributes:
      scope: Where a Gramian is taken: ``representation`` (the cut), ``encoder`` (shared parameters without tables),
        ``shared`` (with the tables) or ``all`` (with the heads). The weights then act on all shared parameters.
      head_gradient: What a task's own parameters receive: its gradient (``plain``), its gradient times its weight
        (``weighted``), or what the method's definition implies (``auto``).
      jacobian: How per-task parameter gradients are computed: one task after the other (``map``: memory of one gradient
        at a time, faster on CPU) or together (``vmap``).
    """

    scope: str = "encoder"
    head_gradient: str = "auto"
    jacobian: str = "map"

    def __post_init__(self):
        for field, choices in (("scope", SCOPES), ("head_gradient", HEAD_GRADIENTS), ("jacobian", JACOBIANS)):
            if getattr(self, field) not in choices:
                raise ConfigError(
                    f"balancing.{field} is '{getattr(self, field)}'; expected one of {list(choices)}. Change it"
                )

    def weighted_heads(self, balancer: Balancer) -> bool:
        """What ``head_gradient`` means for this balancer."""
        return balancer.weighted_heads if self.head_gradient == "auto" else self.head_gradient == "weighted"


class Balanced(NamedTuple):
    """Gradients of one step and how they came about.

    Attributes:
      gradients: Path -> gradient, for every differentiated array.
      losses: Task -> loss with its sums.
      weights: Weight of each task.
      state: State of the balancer.
      info: Scalars of the balancer (``null_rows``, ``nonfinite``).
    """

    gradients: dict[str, Array]
    losses: TaskLoss
    weights: Float[Array, " task"]
    state: Any
    info: dict[str, Array]


def balanced_gradients(
    common: Callable[[Mapping[str, Array]], PyTree],
    heads: Mapping[str, Callable[[Mapping[str, Array], PyTree], TaskLoss]],
    params: Mapping[str, Array],
    *,
    balancer: Balancer,
    state: Any,
    key: PRNGKeyArray,
    options: BalancingOptions = BalancingOptions(),
    regulariser: Callable[[Mapping[str, Array]], Float[Array, ""]] | None = None,
) -> Balanced:
    """The gradient of one step, balanced over tasks.

    Args:
      common: Parameters below the cut -> the cut.
      heads: Task -> (that task's parameters, the cut) -> its loss.
      params: Path -> array. Labels and tables are recognised by path.
      balancer: The method.
      state: Its state.
      key: For stochastic methods.
      options: Scope and head gradient.
      regulariser: All parameters -> penalty, whose gradient is added with factor 1 after balancing.
    """
    below = {path: array for path, array in params.items() if below_cut(path)}
    own = {task: {path: array for path, array in params.items() if _owned(path, task)} for task in heads}
    single_pass = balancer.needs == "losses" and options.weighted_heads(balancer)
    run = _one_backward_pass if single_pass else _one_pass_a_head
    result = run(common, heads, below, own, balancer, state, key, options)
    if regulariser is not None:
        penalty = jax.grad(regulariser)(dict(params))
        result = result._replace(gradients=jax.tree.map(jnp.add, result.gradients, penalty))
    return result


def check_scope(params: Mapping[str, Array], balancer: Balancer, scope: str) -> None:
    """Raises a ConfigError where a Gramian method finds no parameter in its scope, naming scopes that are not empty."""
    labels = [label(path) for path in params]
    has_shared, has_tables = "shared" in labels, "embedding" in labels
    private = not has_shared and not has_tables
    filled = [] if private else ["representation", *(["encoder"] if has_shared else []), "shared", "all"]
    if balancer.needs != "losses" and scope not in filled:
        name = type(balancer).__name__
        if private:
            raise ConfigError(
                f"balancing '{name}' compares gradients of shared parameters and the model has none; expected a sharing "
                "strategy that shares. Set balancing=equal or another sharing"
            )
        raise ConfigError(f"balancing.scope '{scope}' holds no parameter of this model; expected one of {filled}")


def below_cut(path: str) -> bool:
    """Whether ``common`` reads the parameter: shared ones and all tables, private ones too."""
    return not label(path).startswith("task/") or is_table(path)


def _owned(path: str, task: str) -> bool:
    return label(path) == f"task/{task}" and not below_cut(path)


def _one_backward_pass(common, heads, below, own, balancer, state, key, options) -> Balanced:
    """Weights from losses: the step is the gradient of sum_i sg(w_i) L_i."""

    def weighted_sum(below, own):
        cut = common(below)
        losses = _stack({task: head(own[task], cut) for task, head in heads.items()})
        weights, new_state, info = weigh(balancer, None, losses.loss, state, key, losses.denominator > 0)
        return jnp.vdot(weights, losses.loss), (losses, weights, new_state, info)

    (below_gradient, own_gradient), aux = jax.grad(weighted_sum, argnums=(0, 1), has_aux=True)(below, own)
    return Balanced(below_gradient | _union(own_gradient), *aux)


def _one_pass_a_head(common, heads, below, own, balancer, state, key, options) -> Balanced:
    """Per-task gradients at the cut, weights from them or from their pull-backs, then one weighted pull."""
    leaves, pull, rebuild = _cut(common, below)
    losses, own_gradient, at_cut = {}, {}, {}
    for task, head in heads.items():

        def loss(own, leaves, head=head):
            result = head(own, rebuild(leaves))
            return result.loss, result

        gradient = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        (_, losses[task]), (own_gradient[task], at_cut[task]) = gradient(own[task], leaves)
    losses = _stack(losses)
    jacobian = jax.tree.map(lambda *rows: jnp.stack(rows), *at_cut.values())
    products = None
    if balancer.needs == "gramian":
        products = _gramian(jacobian, pull, own_gradient, options)
    weights, state, info = weigh(balancer, products, losses.loss, state, key, losses.denominator > 0)
    gradients = pull(combine_rows(weights, jacobian))
    if options.weighted_heads(balancer):
        own_gradient = {
            task: jax.tree.map(lambda g, w=weights[index]: w * g, gradient)
            for index, (task, gradient) in enumerate(own_gradient.items())
        }
    elif any(label(path).startswith("task/") for path in below):  # private tables are heads below the cut
        plain = pull(combine_rows(jnp.ones_like(weights), jacobian))
        gradients |= {path: g for path, g in plain.items() if label(path).startswith("task/")}
    return Balanced(gradients | _union(own_gradient), losses, weights, state, info)


def _cut(common, below):
    """The floating-point leaves of the cut, their pull-back, and the way from leaves to the cut."""

    def floating(below):
        leaves, structure = jax.tree.flatten(common(below))
        inexact = [jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in leaves]
        differentiated = [leaf for leaf, yes in zip(leaves, inexact, strict=True) if yes]
        constants = [leaf for leaf, yes in zip(leaves, inexact, strict=True) if not yes]
        layout.append((structure, inexact))
        return differentiated, constants

    layout: list = []
    leaves, pull, constants = jax.vjp(floating, below, has_aux=True)
    structure, inexact = layout[-1]

    def rebuild(leaves):
        floats, others = iter(leaves), iter(constants)
        return jax.tree.unflatten(structure, [next(floats) if yes else next(others) for yes in inexact])

    return leaves, lambda cotangent: pull(cotangent)[0], rebuild


def _gramian(jacobian, pull, own_gradient, options: BalancingOptions) -> Float[Array, "task task"]:
    """Inner products of the task gradients in the scope; a Jacobian over tables is held only where they are in it."""
    if options.scope == "representation":
        return gramian(jacobian)

    def in_scope(cotangent):
        pulled = pull(cotangent)
        return {path: gradient for path, gradient in pulled.items() if _in_scope(label(path), options.scope)}

    rows = jax.lax.map(in_scope, jacobian) if options.jacobian == "map" else jax.vmap(in_scope)(jacobian)
    products = gramian(rows)
    if options.scope == "all":  # heads of different tasks have no parameter in common
        squares = [sum(jnp.vdot(g, g) for g in jax.tree.leaves(gradient)) for gradient in own_gradient.values()]
        products += jnp.diag(jnp.stack(squares))
    return products


def _in_scope(kind: str, scope: str) -> bool:
    """Whether parameters below the cut with this label count; private tables are heads, and do so under ``all`` only."""
    return scope == "all" or kind == "shared" or (scope == "shared" and kind == "embedding")


def _stack(losses: Mapping[str, TaskLoss]) -> TaskLoss:
    return TaskLoss(*(jnp.stack(column) for column in zip(*losses.values(), strict=True)))


def _union(gradients: Mapping[str, dict[str, Array]]) -> dict[str, Array]:
    return {path: gradient for own in gradients.values() for path, gradient in own.items()}
