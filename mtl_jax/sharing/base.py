"""Strategy: the contract of every sharing strategy, and what several of them need."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from mtl_jax.nn import Context, stream

__all__ = ["Context", "Kept", "SharedParameters", "Strategy", "by_task", "head_context"]


class Strategy(nnx.Module):
    """How tasks share. A strategy is constructed as ``Strategy(in_features, tasks, *, ..., rngs)``.

    It is two functions. :meth:`common` computes the *cut*: a pytree through which every path from shared parameters
    and tables to a loss passes. :meth:`head` computes one task's representation from the cut. ``common`` reads no
    parameter of a task, ``head`` none of another task and no shared one; then the gradients of all tasks cost one
    backward pass per head and one through the shared part. Leaves of the cut that are not floating point (a dropout key
    for the heads) are constants of the step. Shared parameters that heads apply to features of their own are handed on
    in the cut (:class:`SharedParameters`).

    A strategy whose constructor takes ``num_domains`` is given the number of the data's domains, and reads
    ``context.domain``; one that takes ``prior_features`` is given the width of ``context.prior``, the embeddings of the
    user and of the item. What training changes without a gradient (running moments, centres) is
    :class:`mtl_jax.nn.State`.

    Labels are structural: what lies under an attribute ``task[<name>]`` is that task's, the rest is shared. A parameter is
    a task's own exactly if no other task's output depends on it; "task-specific" parts of a paper often are not.

    Attributes:
      tasks: Task names.
      out_features: Width of every task's representation.
      private_tables: Whether every task has its own set of tables; x is then ``[batch, task, in]``.
      shared_tables: Whether there is a shared set beside the private ones; it is then the last of x.
      reads_all_tables: Whether all tasks train the private tables of each, which then count as shared.
      widths: Names of the constructor's arguments that are widths of layers, of experts and networks, which
        :func:`mtl_jax.sharing.match_parameters` scales.
    """

    tasks: tuple[str, ...]
    out_features: int
    private_tables: bool = False
    shared_tables: bool = False
    reads_all_tables: bool = False
    widths: tuple[str, ...] = ("units",)

    def common(self, x: Float[Array, "batch *task in"], context: Context = Context()) -> Any:
        """The cut of this batch."""
        raise TypeError(f"{type(self).__name__} has no method 'common'; a strategy needs 'common' and 'head'")

    def head(self, task: str, common: Any) -> Float[Array, "batch hidden"]:
        """The representation of one task, from the cut."""
        raise TypeError(f"{type(self).__name__} has no method 'head'; a strategy needs 'common' and 'head'")

    def link(self) -> Callable[..., nnx.Module] | None:
        """The link that belongs to the method, ``tasks -> Link``; it takes the place of none. None: it has none."""
        return None

    def regulariser(self) -> Float[Array, ""] | float:
        """A penalty on the parameters, added to the objective with factor 1 after balancing."""
        return 0.0

    def row_regulariser(self, common: Any) -> Float[Array, " batch"] | None:
        """A penalty on each row, whose weighted mean over the batch is added likewise. None: there is none."""
        return None

    def gates(self, x: Float[Array, "batch *task in"], context: Context = Context()) -> dict[str, Float[Array, "..."]]:
        """What tasks take from where, for whoever looks on: gate -> weights of its members, in evaluation.

        A gate that looks at its input has a leading batch axis; one that does not (a row of a cross-stitch matrix, a mask)
        is a vector. Names begin with the task's, then a slash and the level. Strategies without gates have none.
        """
        return {}

    def gate_members(self) -> dict[str, tuple[str, ...]]:
        """Gate -> names of what it weighs, for every gate of :meth:`gates`."""
        return {}

    def __call__(
        self, x: Float[Array, "batch *task in"], context: Context = Context()
    ) -> dict[str, Float[Array, "batch hidden"]]:
        """The representations of all tasks."""
        common = self.common(x, context)
        return {task: self.head(task, common) for task in self.tasks}


class SharedParameters(NamedTuple):
    """Shared parameters as a part of the cut, for heads that apply them to features of their own.

    Gradients of the tasks pass through them as through any leaf. They have no rows, so gradients that are compared at
    the cut (scope ``representation``) leave them out.

    Attributes:
      values: The arrays.
    """

    values: PyTree[Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Kept:
    """What of the context heads need that normalise by moments of the batch, as a part of the cut.

    Attributes:
      key: Of this step and device; None in evaluation.
      weight: Row weights, or None.
      domain: Domain ids, or None.
      train: As in the context.
      axis: As in the context.
    """

    key: PRNGKeyArray | None
    weight: Float[Array, " batch"] | None
    domain: Int[Array, " batch"] | None
    train: bool = dataclasses.field(metadata={"static": True})
    axis: str | None = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, context: Context) -> "Kept":
        weight = None if context.weight is None else jax.lax.stop_gradient(context.weight)
        return cls(context.rngs, weight, context.domain, context.train, context.axis)

    def context(self, name: str) -> Context:
        """The context of the layers of that name."""
        kept = {"train": self.train, "axis": self.axis, "weight": self.weight, "domain": self.domain}
        return Context(rngs=self.key, **kept).stream(name)


def by_task(tasks: Sequence[str], make: Callable[[str, nnx.Rngs], nnx.Module], rngs: nnx.Rngs) -> nnx.Dict:
    """One module a task, each initialised from the task's name, so that it does not depend on which others there are."""
    key = rngs.params()
    return nnx.Dict({task: make(task, nnx.Rngs(params=stream(key, task))) for task in tasks})


def head_context(key: PRNGKeyArray | None, task: str) -> Context:
    """The context of a task's own layers, from the key that the cut holds for them (None in evaluation)."""
    return Context(train=key is not None, rngs=key).stream(task)
