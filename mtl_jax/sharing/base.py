"""Strategy: the contract of every sharing strategy."""

from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from mtl_jax.nn import Context

__all__ = ["Context", "Strategy"]


class Strategy(nnx.Module):
    """How tasks share. A strategy is constructed as ``Strategy(in_features, tasks, *, ..., rngs)``.

    It is two functions. :meth:`common` computes the *cut*: a pytree through which every path from shared parameters
    and tables to a loss passes. :meth:`head` computes one task's representation from the cut. ``common`` reads no
    parameter of a task, ``head`` none of another task; then the gradients of all tasks cost one backward pass per head
    and one through the shared part. Leaves of the cut that are not floating point (a dropout key for the heads) are
    constants of the step.

    Labels are structural: what lies under an attribute ``task[<name>]`` is that task's, the rest is shared.

    Attributes:
      tasks: Task names.
      out_features: Width of every task's representation.
      private_tables: Whether every task has its own set of tables; x is then ``[batch, task, in]``.
    """

    tasks: tuple[str, ...]
    out_features: int
    private_tables: bool = False

    def common(self, x: Float[Array, "batch *task in"], context: Context = Context()) -> Any:
        """The cut of this batch."""
        raise TypeError(f"{type(self).__name__} has no method 'common'; a strategy needs 'common' and 'head'")

    def head(self, task: str, common: Any) -> Float[Array, "batch hidden"]:
        """The representation of one task, from the cut."""
        raise TypeError(f"{type(self).__name__} has no method 'head'; a strategy needs 'common' and 'head'")

    def regulariser(self) -> Float[Array, ""] | float:
        """A penalty on the parameters, added to the objective with factor 1 after balancing."""
        return 0.0

    def __call__(
        self, x: Float[Array, "batch *task in"], context: Context = Context()
    ) -> dict[str, Float[Array, "batch hidden"]]:
        """The representations of all tasks."""
        common = self.common(x, context)
        return {task: self.head(task, common) for task in self.tasks}
