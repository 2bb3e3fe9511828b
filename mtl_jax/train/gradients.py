"""Balanced gradients: the only place that differentiates.

The model is cut in two: ``common`` goes from shared parameters and tables to the cut, one ``head`` a task from the cut
to its loss. Gradients of all tasks at the cut take one backward pass per head over its own graph; what lies below the
cut is pulled back once, with the weights already applied.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from mtl_jax.balancing import Balancer
from mtl_jax.balancing.base import combine, weigh
from mtl_jax.balancing.rows import combine_rows, gramian
from mtl_jax.errors import ConfigError
from mtl_jax.model import is_table, label
from mtl_jax.train.direction import length_factor, squared_lengths, told
from mtl_jax.train.objective import TaskLoss
from mtl_jax.train.parallel import total

SCOPES = ("representation", "encoder", "shared", "all")
HEAD_GRADIENTS = ("auto", "plain", "weighted")
JACOBIANS = ("map", "vmap")
SCALES = ("paper", "sum", "mean")
LENGTHS = ("native", "sum_norm", "unit")


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
      scale: Whether the length of the direction is that of the method's paper, or for methods whose length is that of a
        sum or of a mean of the gradients, the other one (``sum``, ``mean``).
      length: ``native``; or the direction is given the length of the plain sum (``sum_norm``), or 1 (``unit``), to
        compare directions apart from lengths. For methods that see the gradients.
      max_norm: Longest direction, > 0; longer ones are shortened. None: any. For methods that see the gradients.
    """

    scope: str = "encoder"
    head_gradient: str = "auto"
    jacobian: str = "map"
    scale: str = "paper"
    length: str = "native"
    max_norm: float | None = None

    def __post_init__(self):
        choices = {
            "scope": SCOPES, "head_gradient": HEAD_GRADIENTS, "jacobian": JACOBIANS, "scale": SCALES, "length": LENGTHS
        }  # fmt: skip
        for field, known in choices.items():
            if getattr(self, field) not in known:
                raise ConfigError(
                    f"balancing.{field} is '{getattr(self, field)}'; expected one of {list(known)}. Change it"
                )
        if self.max_norm is not None and not (isinstance(self.max_norm, int | float) and 0 < self.max_norm < math.inf):
            raise ConfigError(f"balancing.max_norm is {self.max_norm!r}; expected a number > 0, or null. Change it")

    def weighted_heads(self, balancer: Balancer) -> bool:
        """What ``head_gradient`` means for this balancer."""
        return balancer.weighted_heads if self.head_gradient == "auto" else self.head_gradient == "weighted"


class Balanced(NamedTuple):
    """Gradients of one step and how they came about.

    Attributes:
      gradients: Path -> gradient, for every differentiated array.
      losses: Task -> loss with its sums.
      weights: Weight of each task; of a method without, those for parameters outside of its scope.
      state: State of the balancer.
      info: Scalars of the step (``null_rows``, ``nonfinite``, and the :func:`diagnostic_names`).
      cosines: Of each pair of task gradients in the scope; 0 where a gradient is 0. None for methods that need losses only.
    """

    gradients: dict[str, Array]
    losses: TaskLoss
    weights: Float[Array, " task"]
    state: Any
    info: dict[str, Array]
    cosines: Float[Array, "task task"] | None = None


def balanced_gradients(
    common: Callable[[Mapping[str, Array], Any], PyTree],
    heads: Mapping[str, Callable[[Mapping[str, Array], PyTree, Any], TaskLoss]],
    params: Mapping[str, Array],
    part: Any = None,
    *,
    parts: PyTree | None = None,
    balancer: Balancer,
    state: Any,
    key: PRNGKeyArray,
    options: BalancingOptions = BalancingOptions(),
    regulariser: Callable[[Mapping[str, Array]], Float[Array, ""]] | None = None,
    axis: str | None = None,
) -> Balanced:
    """The gradient of one step, balanced over tasks.

    The step may be cut into micro-batches and spread over devices: losses and gradients of each task are summed over
    both before the balancer sees them, so the step is the same however it is cut. (Averages of the parts' own means
    would not be: their labels differ in number.)

    Args:
      common: (parameters below the cut, part) -> the cut.
      heads: Task -> (that task's parameters, the cut, part) -> its loss, with the denominator of the whole step.
      params: Path -> array. Labels and tables are recognised by path.
      part: What ``common`` and ``heads`` read: the rows of this device.
      parts: The same in micro-batches, stacked along a leading axis; takes the place of ``part``.
      balancer: The method.
      state: Its state.
      key: For stochastic methods; the same on all devices.
      options: Scope and head gradient.
      regulariser: All parameters -> penalty, whose gradient is added with factor 1 after balancing.
      axis: Named axis of devices to sum over; None where there is none.
    """
    below = {path: array for path, array in params.items() if below_cut(path)}
    own = {task: {path: array for path, array in params.items() if _owned(path, task)} for task in heads}
    single_pass = balancer.needs == "losses" and options.weighted_heads(balancer)
    run = _one_backward_pass if single_pass else _one_pass_a_head
    if balancer.num_batches > 1:
        run = _one_batch_a_product
    elif balancer.needs == "jacobian":
        run = _entry_by_entry
    result = run(_Model(common, heads, below, own, part, parts, axis), balancer, state, key, options)
    if regulariser is not None:
        penalty = jax.grad(regulariser)(dict(params))
        result = result._replace(gradients=jax.tree.map(jnp.add, result.gradients, penalty))
    return result


def check_scope(
    params: Mapping[str, Array], balancer: Balancer, options: BalancingOptions, micro_batches: int = 1
) -> None:
    """Raises a ConfigError where the method cannot work with the model and these options, and says which it could.

    Args:
      params: Path -> array, of those that are trained.
      balancer: The method.
      options: Its scope and the rest.
      micro_batches: Parts of a step.
    """
    name, scope = type(balancer).__name__, options.scope
    labels = [label(path) for path in params]
    has_shared, has_tables = "shared" in labels, "embedding" in labels
    private = not has_shared and not has_tables
    filled = [] if private else ["representation", *(["encoder"] if has_shared else []), "shared", "all"]
    if balancer.needs == "losses":
        if options.length != "native" or options.max_norm is not None:
            raise ConfigError(
                f"balancing.length and balancing.max_norm need gradients, and '{name}' weighs losses; expected length "
                "'native' and max_norm null. Leave them out, or clip by optimizer.clip_norm"
            )
        return
    if private:
        raise ConfigError(
            f"balancing '{name}' compares gradients of shared parameters and the model has none; expected a sharing "
            "strategy that shares. Set balancing=equal or another sharing"
        )
    if scope not in filled:
        raise ConfigError(f"balancing.scope '{scope}' holds no parameter of this model; expected one of {filled}")
    possible, reason = _possible_scopes(balancer, filled)
    if scope not in possible:
        raise ConfigError(f"balancing '{name}' {reason}; expected balancing.scope one of {possible}, got '{scope}'")
    if micro_batches > 1 and balancer.num_batches > 1:
        raise ConfigError(
            f"balancing '{name}' cuts a batch itself; expected trainer.micro_batches=1, got {micro_batches}. Change it"
        )


def _possible_scopes(balancer: Balancer, filled: list[str]) -> tuple[list[str], str]:
    """The scopes of those that hold parameters which the method can work in, and why it cannot work in the others."""
    if balancer.has_parameter_state:
        return [scope for scope in filled if scope == "encoder"], "remembers a number for each dense parameter and task"
    if balancer.needs == "jacobian":
        return [scope for scope in filled if scope in ("encoder", "shared")], "acts on entries of shared parameters"
    if balancer.num_batches > 1:
        possible = [scope for scope in filled if scope in ("encoder", "shared")]
        return possible, "multiplies gradients of different batches, which have parameters in common and no rows"
    return filled, ""


def scope_template(params: Mapping[str, Array], scope: str) -> dict[str, Array]:
    """The parameters of a scope, for :meth:`mtl_jax.balancing.Balancer.init`."""
    return {path: array for path, array in params.items() if below_cut(path) and _in_scope(label(path), scope)}


def below_cut(path: str) -> bool:
    """Whether ``common`` reads the parameter: shared ones and all tables, private ones too."""
    return not label(path).startswith("task/") or is_table(path)


def _owned(path: str, task: str) -> bool:
    return label(path) == f"task/{task}" and not below_cut(path)


@dataclasses.dataclass(frozen=True, eq=False)
class _Model:
    """The cut model, the parameters that are differentiated, and the rows of the step on this device."""

    common: Callable
    heads: Mapping[str, Callable]
    below: dict[str, Array]
    own: dict[str, dict[str, Array]]
    part: Any
    parts: PyTree | None
    axis: str | None

    def losses(self, below, own, part) -> TaskLoss:
        cut = self.common(below, part)
        return _stack({task: head(own[task], cut, part) for task, head in self.heads.items()})

    def total(self, tree: PyTree) -> PyTree:
        """The sum over devices."""
        return total(tree, self.axis)

    def sum(self, function: Callable[[Any], PyTree]) -> PyTree:
        """The sum of a function over micro-batches, one after the other, and over devices."""
        shapes = jax.eval_shape(function, jax.tree.map(lambda leaf: leaf[0], self.parts))
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

        def add(sums, part):
            return jax.tree.map(jnp.add, sums, function(part)), None

        return self.total(jax.lax.scan(add, zeros, self.parts)[0])


def task_losses(common, heads, params, part=None, *, parts=None, axis=None) -> TaskLoss:
    """The losses of all tasks without a gradient; arguments as for :func:`balanced_gradients`."""
    below = {path: array for path, array in params.items() if below_cut(path)}
    own = {task: {path: array for path, array in params.items() if _owned(path, task)} for task in heads}
    model = _Model(common, heads, below, own, part, parts, axis)
    if parts is None:
        return model.total(model.losses(below, own, part))
    return model.sum(lambda part: model.losses(below, own, part))


def _one_backward_pass(model: _Model, balancer, state, key, options) -> Balanced:
    """Weights from losses: the step is the gradient of sum_i sg(w_i) L_i."""

    def weights_of(losses):
        active = losses.denominator > 0
        weights, new_state, info = weigh(balancer, None, losses.loss, state, key, active)
        weights, info, _ = _with_length(balancer, options, weights, None, active, info)
        return weights, new_state, info | balancer.diagnostics(new_state)

    def weighted_sum(below, own, part, known=None):
        losses = model.losses(below, own, part)
        if known is None:
            of_all = model.total(jax.lax.stop_gradient(losses))
            known = (of_all, *weights_of(of_all))
        return jnp.vdot(known[1], losses.loss), known

    gradient = jax.grad(weighted_sum, argnums=(0, 1), has_aux=True)
    if model.parts is None:
        gradients, aux = gradient(model.below, model.own, model.part)
        below_gradient, own_gradient = model.total(gradients)
    else:  # the losses of all micro-batches come before the first weight: a forward pass more
        losses = model.sum(lambda part: model.losses(model.below, model.own, part))
        aux = (losses, *weights_of(losses))
        below_gradient, own_gradient = model.sum(lambda part: gradient(model.below, model.own, part, aux)[0])
    return Balanced(below_gradient | _union(own_gradient), *aux)


def _one_pass_a_head(model: _Model, balancer, state, key, options) -> Balanced:
    """Per-task gradients at the cut, weights from them or from their pull-backs, then one weighted pull.

    Over micro-batches the cut is another one each time, so what is summed is the Jacobian of the parameters.
    """
    at_cut = options.scope == "representation"
    needs_products = balancer.needs == "gramian"
    products = None
    if model.parts is None:
        losses, own_gradient, jacobian, pull = _at_cut(model, model.part)
        losses, own_gradient = model.total((losses, own_gradient))
        if needs_products and at_cut:
            products = model.total(balancer.products(jacobian))
        elif needs_products:
            rows = _pull_each(_pull_in_scope(pull, options), jacobian, options)
            products = balancer.products(model.total(rows))
    else:

        def summed(part):
            losses, own_gradient, jacobian, pull = _at_cut(model, part)
            of_cut = balancer.products(jacobian) if at_cut and needs_products else None
            return losses, own_gradient, _pull_each(pull, jacobian, options), of_cut

        losses, own_gradient, jacobian, products = model.sum(summed)
        pull = None
        if needs_products and not at_cut:
            products = balancer.products(_only_in_scope(jacobian, options))
    if needs_products and options.scope == "all":  # heads of different tasks have no parameter in common
        squares = [sum(jnp.vdot(g, g) for g in jax.tree.leaves(own_gradient[task])) for task in model.heads]
        products += jnp.diag(jnp.stack(squares))
    active = losses.denominator > 0
    weights, state, info = weigh(balancer, products, losses.loss, state, key, active)
    comparable = products is not None
    weights, info, cosines = _with_length(balancer, options, weights, products if comparable else None, active, info)
    below = _below(model, jacobian, pull, weights, options.weighted_heads(balancer))
    own_gradient = _heads(model, own_gradient, weights if options.weighted_heads(balancer) else None)
    info |= balancer.diagnostics(state)
    return Balanced(below | _union(own_gradient), losses, weights, state, info, cosines)


def _entry_by_entry(model: _Model, balancer, state, key, options) -> Balanced:
    """Per-task gradients of the parameters in the scope, their combination, and one weighted pull for the others."""
    if model.parts is None:
        losses, own_gradient, jacobian, pull = _at_cut(model, model.part)
        rows = _pull_each(_pull_in_scope(pull, options), jacobian, options)
        losses, own_gradient, rows = model.total((losses, own_gradient, rows))
    else:

        def summed(part):
            losses, own_gradient, jacobian, pull = _at_cut(model, part)
            return losses, own_gradient, _pull_each(pull, jacobian, options)

        losses, own_gradient, jacobian = model.sum(summed)
        rows, pull = _only_in_scope(jacobian, options), None
    active = losses.denominator > 0
    direction, state, info = combine(balancer, rows, losses.loss, state, key, active)
    outside = jnp.where(active, balancer.weights_outside(losses.loss, state), 0)
    of_heads = jnp.where(active, balancer.head_weights(losses.loss, state), 0)
    products, plain = gramian(rows), combine_rows(active.astype(jnp.float32), rows)
    squared_norm, squared_sum, inner = (
        functools.reduce(jnp.add, (jnp.vdot(a[path], b[path], precision="highest") for path in a))
        for a, b in ((direction, direction), (plain, plain), (direction, plain))
    )
    factor = length_factor(options, balancer, squared_norm, squared_sum, active)
    direction = {path: (factor * leaf).astype(leaf.dtype) for path, leaf in direction.items()}
    info |= told(products, active, factor * factor * squared_norm, squared_sum, factor * inner)
    info |= {"negative_weights": jnp.sum(outside < 0)} | balancer.diagnostics(state)
    weighted = options.weighted_heads(balancer)
    below = _below(model, jacobian, pull, outside, weighted) | direction
    own_gradient = _heads(model, own_gradient, of_heads if weighted else None)
    return Balanced(below | _union(own_gradient), losses, outside, state, info, _cosines(products))


def _one_batch_a_product(model: _Model, balancer, state, key, options) -> Balanced:
    """Inner products between the gradients of two batches, whose weights act on a third one, which trains the heads too."""

    def rows(part):
        losses, _, jacobian, pull = _at_cut(model, part)
        return losses, _pull_each(_pull_in_scope(pull, options), jacobian, options)

    *compared, last = (jax.tree.map(lambda leaf, n=n: leaf[n], model.parts) for n in range(balancer.num_batches))
    earlier, jacobians = jax.lax.map(rows, jax.tree.map(lambda *leaves: jnp.stack(leaves), *compared))
    losses, own_gradient, jacobian, pull = _at_cut(model, last)
    losses, own_gradient, earlier, jacobians = model.total((losses, own_gradient, earlier, jacobians))
    active = jnp.all(earlier.denominator > 0, axis=0) & (losses.denominator > 0)
    weights, state, info = weigh(balancer, balancer.products(jacobians), losses.loss, state, key, active)
    weights, info, _ = _with_length(balancer, options, weights, None, active, info)
    weighted = options.weighted_heads(balancer)
    below = _below(model, jacobian, pull, weights, weighted)
    own_gradient = _heads(model, own_gradient, weights if weighted else None)
    losses = losses._replace(
        numerator=losses.numerator + jnp.sum(earlier.numerator, axis=0),
        denominator=losses.denominator + jnp.sum(earlier.denominator, axis=0),
    )
    return Balanced(below | _union(own_gradient), losses, weights, state, info | balancer.diagnostics(state))


def _with_length(balancer, options, weights, products, active, info):
    """The weights under the options on length, what there is to tell, and the cosines of the gradients."""
    info = info | {"negative_weights": jnp.sum(weights < 0)}
    if products is None:
        return weights * length_factor(options, balancer, None, None, active).astype(weights.dtype), info, None
    squared_norm, squared_sum, inner = squared_lengths(weights, products, active)
    factor = length_factor(options, balancer, squared_norm, squared_sum, active).astype(weights.dtype)
    info |= told(products, active, factor * factor * squared_norm, squared_sum, factor * inner)
    return weights * factor, info, _cosines(products)


def _below(model: _Model, jacobian, pull, weights, weighted_heads: bool) -> dict[str, Array]:
    """Weighted gradients of what lies below the cut; of private tables, which are heads, weighted only where heads are."""

    def combined(weights):
        rows = combine_rows(weights, jacobian)
        return rows if pull is None else model.total(pull(rows))

    gradients = combined(weights)
    if not weighted_heads and any(label(path).startswith("task/") for path in model.below):
        plain = combined(jnp.ones_like(weights))
        gradients |= {path: g for path, g in plain.items() if label(path).startswith("task/")}
    return gradients


def _heads(model: _Model, own_gradient, weights) -> dict[str, dict[str, Array]]:
    """Gradients of each task's own parameters, times its weight where there are weights."""
    if weights is None:
        return own_gradient
    return {
        task: jax.tree.map(lambda g, w=weights[index]: w * g, own_gradient[task])
        for index, task in enumerate(model.heads)  # sums leave dicts sorted by name
    }


def _only_in_scope(jacobian: Mapping[str, Array], options: BalancingOptions) -> dict[str, Array]:
    return {path: rows for path, rows in jacobian.items() if _in_scope(label(path), options.scope)}


def _cosines(products: Float[Array, "task task"]) -> Float[Array, "task task"]:
    inverse = jax.lax.rsqrt(jnp.where(jnp.diagonal(products) > 0, jnp.diagonal(products), jnp.inf))
    return products * inverse[:, None] * inverse


def _at_cut(model: _Model, part):
    """Losses of one part, gradients of each task's own parameters, its Jacobian at the cut, and the way down from there."""
    leaves, pull, rebuild = _cut(lambda below: model.common(below, part), model.below)
    losses, own_gradient, rows = {}, {}, {}
    for task, head in model.heads.items():

        def loss(own, leaves, head=head):
            result = head(own, rebuild(leaves), part)
            return result.loss, result

        gradient = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        (_, losses[task]), (own_gradient[task], rows[task]) = gradient(model.own[task], leaves)
    return _stack(losses), own_gradient, jax.tree.map(lambda *row: jnp.stack(row), *rows.values()), pull


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


def _pull_in_scope(pull, options: BalancingOptions):
    """The pull-back to parameters in the scope; a Jacobian over tables is held only where they are in it."""
    return lambda cotangent: _only_in_scope(pull(cotangent), options)


def _pull_each(pull, jacobian, options: BalancingOptions):
    return jax.lax.map(pull, jacobian) if options.jacobian == "map" else jax.vmap(pull)(jacobian)


def _in_scope(kind: str, scope: str) -> bool:
    """Whether parameters below the cut with this label count; private tables are heads, and do so under ``all`` only."""
    return scope == "all" or kind == "shared" or (scope == "shared" and kind == "embedding")


def _stack(losses: Mapping[str, TaskLoss]) -> TaskLoss:
    return TaskLoss(*(jnp.stack(column) for column in zip(*losses.values(), strict=True)))


def _union(gradients: Mapping[str, dict[str, Array]]) -> dict[str, Array]:
    return {path: gradient for own in gradients.values() for path, gradient in own.items()}
