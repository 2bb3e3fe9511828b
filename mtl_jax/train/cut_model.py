"""A model as it is differentiated: cut in two, with the rows of one step, summed over parts and devices."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from mtl_jax.model import ADAPTER, is_table, label, of_encoder
from mtl_jax.sharing import SharedParameters
from mtl_jax.train.objective import TaskLoss
from mtl_jax.train.parallel import total

KINDS = ("rows", "parameters", "constants")


class CutLeaves(NamedTuple):
    """The floating-point leaves of a cut: what has rows, and parameters that heads apply to features of their own."""

    rows: list[Array]
    parameters: list[Array]


@dataclasses.dataclass(frozen=True, eq=False)
class CutModel:
    """``common`` goes from shared parameters and tables to the cut, one ``head`` a task from the cut to its loss.

    Attributes:
      common: (parameters below the cut, part) -> the cut.
      heads: Task -> (that task's parameters, the cut, part) -> its loss, with the denominator of the whole step.
      below: Path -> array, of what ``common`` reads and is differentiated.
      own: Task -> path -> array, of what its head reads.
      part: The rows of this device.
      parts: The same in micro-batches, or the batches of a method of several, stacked along a leading axis; else None.
      sample: Rows that gradients are compared on, where these are not those of ``part``.
      axis: Named axis of devices to sum over.
    """

    common: Callable[[Mapping[str, Array], Any], PyTree]
    heads: Mapping[str, Callable[[Mapping[str, Array], PyTree, Any], TaskLoss]]
    below: dict[str, Array]
    own: dict[str, dict[str, Array]]
    part: Any
    parts: PyTree | None
    sample: Any
    axis: str | None

    @classmethod
    def of(
        cls, common, heads, params: Mapping[str, Array], part=None, *, parts=None, sample=None, axis=None
    ) -> "CutModel":
        """The model with parameters path -> array, recognised by their paths."""
        below = {path: array for path, array in params.items() if below_cut(path)}
        own = {task: {path: array for path, array in params.items() if _owned(path, task)} for task in heads}
        return cls(common, heads, below, own, part, parts, sample, axis)

    @property
    def params(self) -> tuple[dict[str, Array], dict[str, dict[str, Array]]]:
        """All that is differentiated: below the cut, and each task's own."""
        return self.below, self.own

    def losses(self, below: Mapping[str, Array], own: Mapping[str, Mapping[str, Array]], part: Any) -> TaskLoss:
        """Of all tasks in one part, with a task axis."""
        cut = self.common(below, part)
        return stacked({task: head(own[task], cut, part) for task, head in self.heads.items()})

    def total(self, tree: PyTree) -> PyTree:
        """The sum over devices."""
        return total(tree, self.axis)

    def sum(self, function: Callable[[Any], PyTree]) -> PyTree:
        """The sum of a function over micro-batches, one after the other, and over devices."""
        if self.parts is None:
            return self.total(function(self.part))
        shapes = jax.eval_shape(function, self.batch(0))
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

        def add(sums, part):
            return jax.tree.map(jnp.add, sums, function(part)), None

        return self.total(jax.lax.scan(add, zeros, self.parts)[0])

    def batch(self, number: int) -> Any:
        """One of the ``parts``."""
        return jax.tree.map(lambda leaf: leaf[number], self.parts)

    def leaves(self, part: Any) -> CutLeaves:
        """What the Jacobian at the cut is one of."""
        return _cut(lambda below: self.common(below, part), self.below)[0]

    def at_cut(self, part: Any) -> tuple[TaskLoss, dict[str, dict[str, Array]], CutLeaves, Callable]:
        """Losses of a part, gradients of each task's own parameters, the Jacobian at the cut, and the way down from there.

        One backward pass per head over its own graph; the way down is the pull-back of ``common``.
        """
        leaves, pull, rebuild = _cut(lambda below: self.common(below, part), self.below)
        losses, own_gradient, rows = {}, {}, {}
        for task, head in self.heads.items():

            def loss(own, leaves, head=head):
                result = head(own, rebuild(leaves), part)
                return result.loss, result

            gradient = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
            (_, losses[task]), (own_gradient[task], rows[task]) = gradient(self.own[task], leaves)
        return stacked(losses), own_gradient, jax.tree.map(lambda *row: jnp.stack(row), *rows.values()), pull


def parts_side_by_side(model: CutModel) -> CutModel:
    """The model of a whole batch whose cut has the parts as its first axis, whatever the layout of the cut is.

    Numerators and denominators of its losses are those of each part.
    """
    if model.parts is None:
        return parts_side_by_side(dataclasses.replace(model, parts=jax.tree.map(lambda leaf: leaf[None], model.part)))

    def of_parts(head):
        def loss(own, cut, parts):
            losses = jax.vmap(head, in_axes=(None, 0, 0))(own, cut, parts)
            return losses._replace(loss=losses.loss.sum())

        return loss

    return dataclasses.replace(
        model,
        common=jax.vmap(model.common, in_axes=(None, 0)),
        heads={task: of_parts(head) for task, head in model.heads.items()},
        part=model.parts,
        parts=None,
    )


def below_cut(path: str) -> bool:
    """Whether ``common`` reads the parameter: shared ones, and all tables and encoders, private ones too."""
    return not label(path).startswith("task/") or is_table(path) or of_encoder(path)


def in_scope(path: str, scope: str) -> bool:
    """Whether a parameter below the cut belongs to the scope; private tables are heads, and do so under ``all`` only."""
    kind = label(path)
    return scope == "all" or kind in ("shared", ADAPTER) or (scope == "shared" and kind == "embedding")


def only_in_scope(tree: Mapping[str, Array], scope: str) -> dict[str, Array]:
    """The entries of parameters in the scope."""
    return {path: array for path, array in tree.items() if in_scope(path, scope)}


def stacked(losses: Mapping[str, TaskLoss]) -> TaskLoss:
    """The losses of all tasks along a task axis."""
    return TaskLoss(*(jnp.stack(column) for column in zip(*losses.values(), strict=True)))


def union(gradients: Mapping[str, Mapping[str, Array]]) -> dict[str, Array]:
    """Path -> gradient, of all tasks' own parameters."""
    return {path: gradient for own in gradients.values() for path, gradient in own.items()}


def _owned(path: str, task: str) -> bool:
    return label(path) == f"task/{task}" and not below_cut(path)


def _cut(common, below) -> tuple[CutLeaves, Callable, Callable]:
    """The floating-point leaves of the cut, their pull-back, and the way from leaves to the cut."""

    def floating(below):
        cut = common(below)
        leaves, structure = jax.tree.flatten(cut)
        kinds = [
            ("rows" if has_rows else "parameters") if jnp.issubdtype(leaf.dtype, jnp.inexact) else "constants"
            for leaf, has_rows in zip(leaves, _have_rows(cut), strict=True)
        ]
        layout.append((structure, kinds))
        of_kind = {name: [leaf for leaf, kind in zip(leaves, kinds, strict=True) if kind == name] for name in KINDS}
        constants = of_kind.pop("constants")
        return CutLeaves(**of_kind), constants

    layout: list = []
    leaves, pull, constants = jax.vjp(floating, below, has_aux=True)
    structure, kinds = layout[-1]

    def rebuild(leaves):
        of_kind = {name: iter(values) for name, values in (leaves._asdict() | {"constants": constants}).items()}
        return jax.tree.unflatten(structure, [next(of_kind[kind]) for kind in kinds])

    return leaves, lambda cotangent: pull(cotangent)[0], rebuild


def _have_rows(cut: PyTree) -> list[bool]:
    """Of every leaf, whether it has the rows of the batch."""

    def is_parameters(node):
        return isinstance(node, SharedParameters)

    def mark(node):
        return jax.tree.map(lambda _: False, node) if is_parameters(node) else True

    return jax.tree.leaves(jax.tree.map(mark, cut, is_leaf=is_parameters))
