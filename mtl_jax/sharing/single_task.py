"""SingleTask: no sharing, the reference of every multi-task claim."""

from collections.abc import Sequence
from typing import NamedTuple

from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from mtl_jax.nn import MLP
from mtl_jax.sharing.base import Context, Strategy, by_task, head_context


class SingleTaskCommon(NamedTuple):
    """The input, and the key of the tasks' dropout (None in evaluation)."""

    x: Float[Array, "batch *task in"]
    key: PRNGKeyArray | None


class SingleTask(Strategy):
    r"""One network a task, :math:`z_k = f_k(x_k)`.

    Args:
      in_features: Width of each task's input.
      tasks: Task names.
      units: Layer widths of every f_k.
      dropout: Rate after each layer, in [0, 1).
      share_embeddings: Whether the tasks read one set of tables; by default each has its own, and then nothing at all
        is shared: the tasks train side by side as if in separate runs.
      rngs: Initialisation.

    Labels: everything is ``task/<name>``; with private tables, they too.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from mtl_jax.sharing import SingleTask
      >>> strategy = SingleTask(16, ("click", "buy"), units=(32, 8), rngs=nnx.Rngs(0))
      >>> {task: z.shape for task, z in strategy(jnp.ones((5, 2, 16))).items()}
      {'click': (5, 8), 'buy': (5, 8)}
    """

    def __init__(
        self,
        in_features: int,
        tasks: Sequence[str],
        *,
        units: Sequence[int] = (512, 256),
        dropout: float = 0.2,
        share_embeddings: bool = False,
        rngs: nnx.Rngs,
    ):
        self.tasks = tuple(tasks)
        self.private_tables = not share_embeddings
        self.task = by_task(self.tasks, lambda task, rngs: MLP(in_features, units, dropout=dropout, rngs=rngs), rngs)
        self.out_features = self.task[self.tasks[0]].out_features

    def common(self, x: Float[Array, "batch *task in"], context: Context = Context()) -> SingleTaskCommon:
        return SingleTaskCommon(x, context.rngs if context.train else None)

    def head(self, task: str, common: SingleTaskCommon) -> Float[Array, "batch hidden"]:
        x = common.x[:, self.tasks.index(task)] if self.private_tables else common.x
        return self.task[task](x, head_context(common.key, task))
