"""Balanced gradients of a model that is cut in two (see :mod:`mtl_jax.train.cut_model`).

Gradients of all tasks at the cut take one backward pass per head over its own graph; what lies below the
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

from mtl_jax.arguments import check_count
from mtl_jax.balancing import Balancer
from mtl_jax.balancing.base import combine, null_rows, weigh
from mtl_jax.balancing.rows import combine_rows, gramian, num_rows
from mtl_jax.errors import ConfigError
from mtl_jax.model import label
from mtl_jax.train.cut_model import CutLeaves, CutModel, below_cut, in_scope, only_in_scope, parts_side_by_side, union
from mtl_jax.train.direction import length_factor, squared_lengths, told
from mtl_jax.train.objective import TaskLoss

SCOPES = ("representation", "encoder", "shared", "all")
HEAD_GRADIENTS = ("auto", "plain", "weighted")
JACOBIANS = ("map", "vmap")
SCALES = ("paper", "sum", "mean")
LENGTHS = ("native", "sum_norm", "unit")
UNROLLED = 8
"""Up to so many tasks a loop over them is written out: a program of a loop costs up to a fifth of a small step."""


@dataclasses.dataclass(frozen=True)
class BalancingOptions:
    """What applies to any balancer.

    Attributes:
      scope: Where a Gramian is taken: ``representation`` (the cut), ``encoder`` (shared parameters without tables),
        ``shared`` (with the tables) or ``all`` (with the heads). The weights then act on all shared parameters.
      head_gradient: What a task's own parameters receive: its gradient (``plain``), its gradient times its weight
        (``weighted``), or what the method's definition implies (``auto``).
      jacobian: How per-task parameter gradients are computed: one task after the other (``map``: memory of one backward
        pass at a time, faster on CPU) or together (``vmap``).
      scale: Whether the length of the direction is that of the method's paper, or for methods whose length is that of a
        sum or of a mean of the gradients, the other one (``sum``, ``mean``).
      length: ``native``; or the direction is given the length of the plain sum (``sum_norm``), or 1 (``unit``), to
        compare directions apart from lengths. For methods that see the gradients.
      max_norm: Longest direction, > 0; longer ones are shortened. None: any. For methods that see the gradients.
      update_every: Steps from one comparison of the gradients to the next; the weights stay in between, and a step costs
        one backward pass (see :func:`mtl_jax.balancing.reuse.reuse`). For methods from the Gramian.
      row_stride: Gradients are compared on every n-th row of the batch, and the weights that come of it act on all rows. A
        task without a label among them is absent. For methods from the Gramian.
    """

    scope: str = "encoder"
    head_gradient: str = "auto"
    jacobian: str = "map"
    scale: str = "paper"
    length: str = "native"
    max_norm: float | None = None
    update_every: int = 1
    row_stride: int = 1

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
        check_count(self.update_every, "balancing.update_every")
        check_count(self.row_stride, "balancing.row_stride")

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
    sample: Any = None,
    balancer: Balancer,
    state: Any,
    key: PRNGKeyArray,
    options: BalancingOptions = BalancingOptions(),
    regulariser: Callable[[Mapping[str, Array]], Float[Array, ""]] | None = None,
    row_regulariser: Callable[[Mapping[str, Array], Any], Float[Array, ""]] | None = None,
    learning_rate: Callable[[str], Any] | None = None,
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
      sample: Rows that gradients are compared on, where these are not those of ``part``.
      balancer: The method.
      state: Its state.
      key: For stochastic methods; the same on all devices.
      options: Scope and head gradient.
      regulariser: All parameters -> penalty, whose gradient is added with factor 1 after balancing.
      row_regulariser: (all parameters, part) -> that part's share of a penalty on rows, added likewise.
      learning_rate: Path -> the optimizer's rate in this step, for methods that look along it.
      axis: Named axis of devices to sum over; None where there is none.
    """
    model = CutModel.of(common, heads, params, part, parts=parts, sample=sample, axis=axis)
    if balancer.owns_step:
        result = balancer.gradients(model, state, key, options, learning_rate)
    else:
        result = _way(balancer, options)(model, balancer, state, key, options)
    if regulariser is not None:
        penalty = jax.grad(regulariser)(dict(params))
        result = result._replace(gradients=jax.tree.map(jnp.add, result.gradients, penalty))
    if row_regulariser is not None:
        penalty = model.sum(lambda part: jax.grad(row_regulariser)(dict(params), part))
        result = result._replace(gradients=jax.tree.map(jnp.add, result.gradients, penalty))
    return result


def _way(balancer: Balancer, options: BalancingOptions) -> Callable[..., Balanced]:
    """How the gradients come about that the method is given."""
    if balancer.num_batches > 1:
        return _one_batch_a_product
    if balancer.needs == "jacobian":
        return _unit_by_unit if options.scope == "representation" else _entry_by_entry
    single_pass = balancer.needs == "losses" and options.weighted_heads(balancer)
    return _one_backward_pass if single_pass else _one_pass_a_head


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
    if options.row_stride > 1:
        one_batch = balancer.needs == "gramian" and balancer.num_batches == 1 and not balancer.owns_step
        if not one_batch or micro_batches > 1:
            where = f"trainer.micro_batches={micro_batches}" if one_batch else f"balancing '{name}'"
            raise ConfigError(
                f"balancing.row_stride is {options.row_stride} with {where}; expected a method that compares the "
                "gradients of one batch, and no micro-batches. Set it to 1"
            )
    has_shared = any(in_scope(path, "encoder") for path in params)
    has_tables = any(label(path) == "embedding" for path in params)
    private = not has_shared and not has_tables
    filled = [] if private else ["representation", *(["encoder"] if has_shared else []), "shared", "all"]
    if balancer.needs == "losses":
        if options.length != "native" or options.max_norm is not None:
            raise ConfigError(
                f"balancing.length and balancing.max_norm need gradients, and '{name}' weighs losses; expected length "
                "'native' and max_norm null. Leave them out, or clip by optimizer.clip_norm"
            )
        if balancer.scopes is None:
            _check_parts(balancer, micro_batches)
            return
    if private:
        raise ConfigError(
            f"balancing '{name}' looks at shared parameters and the model has none; expected a sharing "
            "strategy that shares. Set balancing=equal or another sharing"
        )
    if scope not in filled:
        raise ConfigError(f"balancing.scope '{scope}' holds no parameter of this model; expected one of {filled}")
    possible, reason = _possible_scopes(balancer, filled)
    if scope not in possible:
        raise ConfigError(f"balancing '{name}' {reason}; expected balancing.scope one of {possible}, got '{scope}'")
    _check_parts(balancer, micro_batches, by_rows=acts_on_units(balancer, options))


def acts_on_units(balancer: Balancer, options: BalancingOptions) -> bool:
    """Whether the method tells the rows of a batch from the units of the cut."""
    return balancer.by_unit and options.scope == "representation"


def _check_parts(balancer: Balancer, micro_batches: int, by_rows: bool = False) -> None:
    name = type(balancer).__name__
    if micro_batches > 1 and (by_rows or balancer.num_batches * balancer.num_parts > 1):
        raise ConfigError(
            f"balancing '{name}' cuts a batch itself; expected trainer.micro_batches=1, got {micro_batches}. Change it"
        )


def _possible_scopes(balancer: Balancer, filled: list[str]) -> tuple[list[str], str]:
    """The scopes of those that hold parameters which the method can work in, and why it cannot work in the others."""
    if balancer.has_parameter_state:
        return [scope for scope in filled if scope == "encoder"], "remembers a number for each dense parameter and task"
    if balancer.scopes:
        return [scope for scope in filled if scope in balancer.scopes], "is defined for some scopes only"
    if balancer.needs == "jacobian":
        possible = ("representation", "encoder", "shared") if balancer.by_unit else ("encoder", "shared")
        return [scope for scope in filled if scope in possible], "acts on entries of shared parameters"
    if balancer.num_batches > 1:
        possible = [scope for scope in filled if scope in ("encoder", "shared")]
        return possible, "multiplies gradients of different batches, which have parameters in common and no rows"
    return filled, ""


def scope_template(params: Mapping[str, Array], scope: str) -> dict[str, Array]:
    """The parameters of a scope, for :meth:`mtl_jax.balancing.Balancer.init`."""
    return {path: array for path, array in params.items() if below_cut(path) and in_scope(path, scope)}


def task_losses(common, heads, params, part=None, *, parts=None, axis=None) -> TaskLoss:
    """The losses of all tasks without a gradient; arguments as for :func:`balanced_gradients`."""
    model = CutModel.of(common, heads, params, part, parts=parts, axis=axis)
    return model.sum(lambda part: model.losses(model.below, model.own, part))


def _one_backward_pass(model: CutModel, balancer, state, key, options) -> Balanced:
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
    return Balanced(below_gradient | union(own_gradient), *aux)


def _one_pass_a_head(model: CutModel, balancer, state, key, options) -> Balanced:
    """Per-task gradients at the cut, weights from them or from their pull-backs; then the weighted sum of what is known of
    the parameters, and one weighted pull for the rest.

    Over micro-batches the cut is another one each time, so what is summed is the Jacobian of the parameters.
    """
    at_cut = options.scope == "representation"
    needs_products = balancer.needs == "gramian"
    products, rows = None, None
    if model.parts is None:
        losses, own, jacobian, pull = model.at_cut(model.part)
        losses, own = model.total((losses, own))
        kept = balancer.kept(state) if needs_products else None

        def compare():
            of_heads, of_cut, down = own, jacobian, pull
            if model.sample is not None:
                _, of_heads, of_cut, down = model.at_cut(model.sample)
                of_heads = model.total(of_heads)
            if at_cut:
                return model.total(balancer.products(of_cut.rows)), None
            rows = model.total(_pull_each(_pull_in_scope(down, options), of_cut, options))
            return balancer.products(rows) + _of_heads(model, of_heads, options), rows

        if kept is not None:
            products = _where_due(lambda: compare()[0], kept)
        elif needs_products:
            products, rows = compare()
            rows = rows if model.sample is None else None  # of other data
    else:

        def summed(part):
            losses, own, jacobian, pull = model.at_cut(part)
            of_cut = balancer.products(jacobian.rows) if at_cut and needs_products else None
            return losses, own, _pull_each(pull, jacobian, options), of_cut

        losses, own, jacobian, products = model.sum(summed)
        pull = None
        if needs_products and not at_cut:
            products = balancer.products(only_in_scope(jacobian, options.scope)) + _of_heads(model, own, options)
    return by_weights(model, TaskGradients(losses, own, jacobian, pull, rows), products, balancer, state, key, options)


def _of_heads(model: CutModel, own, options) -> Array | float:
    """What the heads add to the products; those of different tasks have no parameter in common."""
    if options.scope != "all":
        return 0.0
    return jnp.diag(jnp.stack([sum(jnp.vdot(g, g) for g in jax.tree.leaves(own[task])) for task in model.heads]))


def _where_due(compare: Callable[[], Array], kept: tuple[Array, Array]) -> Array:
    """New products where they are due, else those that were kept."""
    due, products = kept
    return jax.lax.cond(due, compare, lambda: products.astype(jax.eval_shape(compare).dtype))


def _entry_by_entry(model: CutModel, balancer, state, key, options) -> Balanced:
    """Per-task gradients of the parameters in the scope, their combination, and one weighted pull for the others."""
    if model.parts is None:
        losses, own, jacobian, pull = model.at_cut(model.part)
        rows = _pull_each(_pull_in_scope(pull, options), jacobian, options)
        losses, own, rows = model.total((losses, own, rows))
    else:

        def summed(part):
            losses, own, jacobian, pull = model.at_cut(part)
            return losses, own, _pull_each(pull, jacobian, options)

        losses, own, jacobian = model.sum(summed)
        rows, pull = only_in_scope(jacobian, options.scope), None
    return by_entries(model, TaskGradients(losses, own, jacobian, pull, rows), rows, balancer, state, key, options)


def _unit_by_unit(model: CutModel, balancer, state, key, options) -> Balanced:
    """One factor for each task and unit of the cut, for all rows of the batch, and one pull of the sum.

    Every row is a part of its own, which tells rows from units whatever the layout of the cut is.
    """
    rows = parts_side_by_side(model)
    labels, own, jacobian, pull = rows.at_cut(rows.part)
    losses = labels._replace(numerator=labels.numerator.sum(axis=1), denominator=labels.denominator.sum(axis=1))
    leaves = zip(rows.leaves(rows.part).rows, jacobian.rows, strict=True)
    signed = [jnp.sum(jnp.sign(z) * g, axis=1) for z, g in leaves]
    losses, own, signed, products = model.total((losses, own, signed, gramian(jacobian.rows)))
    active = losses.denominator > 0
    finite = jnp.all(jnp.isfinite(products)) & jnp.all(jnp.isfinite(losses.loss))
    null = null_rows(balancer, jnp.diagonal(products), active)
    active &= ~null
    factors = balancer.unit_factors(signed, key, active=active)
    direction = [jnp.sum(factor[:, None] * leaf, axis=0) for factor, leaf in zip(factors, jacobian.rows, strict=True)]
    plain = combine_rows(active.astype(jnp.float32), jacobian.rows)
    squared_norm, squared_sum, inner = model.total(
        [sum(map(jnp.vdot, a, b)) for a, b in ((direction, direction), (plain, plain), (direction, plain))]
    )
    factor = length_factor(options, balancer, squared_norm, squared_sum, active)
    outside = active.astype(losses.loss.dtype)
    info = {"null_rows": jnp.sum(null), "nonfinite": ~finite, "negative_weights": jnp.sum(outside < 0)}
    info |= told(products, active, factor * factor * squared_norm, squared_sum, factor * inner)
    found = TaskGradients(losses, own, jacobian, pull)
    below, own = weighted_sum(model, found, outside, outside if options.weighted_heads(balancer) else None)
    parameters = combine_rows(outside, jacobian).parameters  # they have no units of the cut
    pulled = model.total(pull(CutLeaves([(factor * leaf).astype(leaf.dtype) for leaf in direction], parameters)))
    below |= {path: g for path, g in pulled.items() if not label(path).startswith("task/")}
    return Balanced(below | union(own), losses, outside, state, info, _cosines(products))


class TaskGradients(NamedTuple):
    """Losses and gradients of the tasks before they are balanced.

    Attributes:
      losses: Of all tasks.
      own: Task -> path -> gradient, of each task's own parameters.
      jacobian: Per-task gradients at the cut, or of the parameters below it.
      pull: From the cut down to the parameters; None where the Jacobian is already theirs, summed over devices.
      rows: Path -> per-task gradients, summed over devices, of parameters for which they are known already: a sum of
        these spares a part of the way down, or all of it.
    """

    losses: TaskLoss
    own: dict[str, dict[str, Array]]
    jacobian: PyTree[Float[Array, "task ..."]]
    pull: Callable[[PyTree], dict[str, Array]] | None = None
    rows: dict[str, Float[Array, "task ..."]] | None = None


def task_gradients(model: CutModel, part: Any) -> TaskGradients:
    """Of all devices, in the rows of one part."""
    losses, own, jacobian, pull = model.at_cut(part)
    return TaskGradients(*model.total((losses, own)), jacobian, pull)


def by_weights(
    model: CutModel,
    found: TaskGradients,
    products: Float[Array, "..."] | None,
    balancer: Balancer,
    state: Any,
    key: PRNGKeyArray | None,
    options: BalancingOptions,
) -> Balanced:
    """The step of a method with weights, from its ``products`` where it needs them."""
    losses, weighted = found.losses, options.weighted_heads(balancer)
    active = losses.denominator > 0
    weights, state, info = weigh(balancer, products, losses.loss, state, key, active)
    weights, info, cosines = _with_length(balancer, options, weights, products, active, info)
    of_heads = jnp.where(active, balancer.head_weights(weights, losses.loss, state), 0)
    below, own = weighted_sum(model, found, weights, of_heads if weighted else None)
    return Balanced(below | union(own), losses, weights, state, info | balancer.diagnostics(state), cosines)


def by_entries(
    model: CutModel,
    found: TaskGradients,
    rows: Mapping[str, Float[Array, "task ..."]],
    balancer: Balancer,
    state: Any,
    key: PRNGKeyArray | None,
    options: BalancingOptions,
) -> Balanced:
    """The step of a method that combines the ``rows`` of the parameters in the scope entry by entry."""
    losses, weighted = found.losses, options.weighted_heads(balancer)
    active = losses.denominator > 0
    direction, state, info = combine(balancer, rows, losses.loss, state, key, active)
    outside = jnp.where(active, balancer.weights_outside(losses.loss, state), 0)
    of_heads = jnp.where(active, balancer.head_weights(outside, losses.loss, state), 0)
    products, plain = gramian(rows), combine_rows(active.astype(jnp.float32), rows)
    squared_norm, squared_sum, inner = (
        functools.reduce(jnp.add, (jnp.vdot(a[path], b[path], precision="highest") for path in a))
        for a, b in ((direction, direction), (plain, plain), (direction, plain))
    )
    factor = length_factor(options, balancer, squared_norm, squared_sum, active)
    direction = {path: (factor * leaf).astype(leaf.dtype) for path, leaf in direction.items()}
    info |= told(products, active, factor * factor * squared_norm, squared_sum, factor * inner)
    info |= {"negative_weights": jnp.sum(outside < 0)} | balancer.diagnostics(state)
    below, own = weighted_sum(model, found, outside, of_heads if weighted else None)
    return Balanced(below | direction | union(own), losses, outside, state, info, _cosines(products))


def _one_batch_a_product(model: CutModel, balancer, state, key, options) -> Balanced:
    """Inner products between the gradients of two batches, whose weights act on a third one, which trains the heads too."""

    def rows(part):
        losses, _, jacobian, pull = model.at_cut(part)
        return losses, _pull_each(_pull_in_scope(pull, options), jacobian, options)

    *compared, last = map(model.batch, range(balancer.num_batches))
    earlier, jacobians = jax.lax.map(rows, jax.tree.map(lambda *leaves: jnp.stack(leaves), *compared))
    losses, own, jacobian, pull = model.at_cut(last)
    losses, own, earlier, jacobians = model.total((losses, own, earlier, jacobians))
    active = jnp.all(earlier.denominator > 0, axis=0) & (losses.denominator > 0)
    weights, state, info = weigh(balancer, balancer.products(jacobians), losses.loss, state, key, active)
    weights, info, _ = _with_length(balancer, options, weights, None, active, info)
    weighted = options.weighted_heads(balancer)
    found = TaskGradients(losses, own, jacobian, pull)
    below, own = weighted_sum(model, found, weights, weights if weighted else None)
    losses = losses._replace(
        numerator=losses.numerator + jnp.sum(earlier.numerator, axis=0),
        denominator=losses.denominator + jnp.sum(earlier.denominator, axis=0),
    )
    return Balanced(below | union(own), losses, weights, state, info | balancer.diagnostics(state))


def _with_length(balancer, options, weights, products, active, info):
    """The weights under the options on length, what there is to tell, and the cosines of the gradients."""
    info = info | {"negative_weights": jnp.sum(weights < 0)}
    if products is None:
        return weights * length_factor(options, balancer, None, None, active).astype(weights.dtype), info, None
    squared_norm, squared_sum, inner = squared_lengths(weights, products, active)
    factor = length_factor(options, balancer, squared_norm, squared_sum, active).astype(weights.dtype)
    info |= told(products, active, factor * factor * squared_norm, squared_sum, factor * inner)
    return weights * factor, info, _cosines(products)


def weighted_sum(
    model: CutModel,
    found: TaskGradients,
    weights: Float[Array, " task"],
    of_heads: Float[Array, " task"] | None,
) -> tuple[dict[str, Array], dict[str, dict[str, Array]]]:
    """sum_i w_i g_i below the cut, and the gradient of each task's own parameters.

    Args:
      model: The model.
      found: What its tasks have for gradients.
      weights: w.
      of_heads: What gradients of a task's own parameters are multiplied by. None: nothing, nor are those of its tables.
    """

    def combined(weights):
        if found.pull is None:
            return combine_rows(weights, found.jacobian)
        pulled = found.pull(combine_rows(weights, found.jacobian))
        if not found.rows:
            return model.total(pulled)
        unknown = {path: gradient for path, gradient in pulled.items() if path not in found.rows}
        return model.total(unknown) | combine_rows(weights, found.rows)

    below, own = combined(weights), found.own
    if of_heads is not None:
        own = {
            task: jax.tree.map(lambda g, w=of_heads[index]: w * g, own[task])
            for index, task in enumerate(model.heads)  # sums leave dicts sorted by name
        }
    elif any(label(path).startswith("task/") for path in model.below):
        plain = combined(jnp.ones_like(weights))
        below |= {path: g for path, g in plain.items() if label(path).startswith("task/")}
    return below, own


def _cosines(products: Float[Array, "task task"]) -> Float[Array, "task task"]:
    inverse = jax.lax.rsqrt(jnp.where(jnp.diagonal(products) > 0, jnp.diagonal(products), jnp.inf))
    return products * inverse[:, None] * inverse


def _pull_in_scope(pull, options: BalancingOptions):
    """The pull-back to parameters in the scope; a Jacobian over tables is held only where they are in it."""
    return lambda cotangent: only_in_scope(pull(cotangent), options.scope)


def _pull_each(pull, jacobian, options: BalancingOptions):
    if options.jacobian == "vmap":
        return jax.vmap(pull)(jacobian)
    num_tasks = num_rows(jacobian)
    if num_tasks > UNROLLED:
        return jax.lax.map(pull, jacobian)
    rows = [pull(jax.tree.map(lambda leaf, task=task: leaf[task], jacobian)) for task in range(num_tasks)]
    return jax.tree.map(lambda *row: jnp.stack(row), *rows)
