"""CrossStitch: a network a task, mixed after every layer by a learned matrix."""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from mtl_jax.arguments import check_counts, check_number
from mtl_jax.nn import StackedLinear, dropout
from mtl_jax.nn.mlp import dropout_rate
from mtl_jax.sharing.base import Context, Strategy, by_task


class CrossStitch(Strategy):
    r"""Cross-stitch networks.

    .. math::
        h_k^l = \operatorname{ReLU}(x_k^{l-1} W_k^l + b_k^l), \qquad x_k^l = \sum_j A^l_{kj} \, h_j^l

    with :math:`x_k^0 = x` and :math:`z_k = x_k^L`.

    Args:
      in_features: Width of x.
      tasks: Task names.
      units: Layer widths of every task's network, at least one.
      own: First value of A_kk, in [0, 1]; the others of a row share the rest.
      per_unit: Whether A has one coefficient for each unit, and not one for all of a layer.
      dropout: Rate after each layer, in [0, 1).
      rngs: Initialisation.

    Labels: row k of the last matrix is ``task/<name>``, all else is ``shared``. The paper trains the matrices 100 to 1000
    times as fast as the networks: ``Optimizer(rate_scale={"stitch": 100.0})``.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from mtl_jax.sharing import CrossStitch
      >>> strategy = CrossStitch(16, ("click", "buy"), units=(32, 8), rngs=nnx.Rngs(0))
      >>> {task: z.shape for task, z in strategy(jnp.ones((5, 16))).items()}
      {'click': (5, 8), 'buy': (5, 8)}

    References:
      Misra, Shrivastava, Gupta, Hebert, *Cross-stitch Networks for Multi-task Learning*, CVPR 2016. A matrix of ones at the
      start, as in public code, makes activations K times too large.
    """

    def __init__(
        self,
        in_features: int,
        tasks: Sequence[str],
        *,
        units: Sequence[int] = (512, 256),
        own: float = 0.9,
        per_unit: bool = False,
        dropout: float = 0.2,
        rngs: nnx.Rngs,
    ):
        self.tasks = tuple(tasks)
        check_counts(units, "units", empty=False)
        check_number(own, "own", least=0.0, most=1.0)
        number, widths = len(self.tasks), (in_features, *units)
        self.layers = nnx.List(
            [StackedLinear(number, i, o, rngs=rngs) for i, o in zip(widths[:-1], widths[1:], strict=True)]
        )

        def coefficients(width: int) -> Float[Array, "task task *unit"]:
            matrix = stitches(number, own)
            return jnp.broadcast_to(matrix[..., None], (number, number, width)) if per_unit else matrix

        self.stitch = nnx.List([nnx.Param(coefficients(width)) for width in units[:-1]])
        self.task = by_task(
            self.tasks,
            lambda task, rngs: nnx.Dict(stitch=nnx.Param(coefficients(units[-1])[self.tasks.index(task)])),
            rngs,
        )
        self.dropout = dropout_rate(dropout)
        self.out_features = units[-1]

    def common(self, x: Float[Array, "batch in"], context: Context = Context()) -> Float[Array, "task batch hidden"]:
        for index, layer in enumerate(self.layers):
            if index:
                x = jnp.einsum(self._equation("kj", "k"), self.stitch[index - 1][...], x)
            x = dropout(nnx.relu(layer(x)), self.dropout, context.stream(f"layer {index}"))
        return x

    def head(self, task: str, common: Float[Array, "task batch hidden"]) -> Float[Array, "batch hidden"]:
        return jnp.einsum(self._equation("j", ""), self.task[task].stitch[...], common)

    def _equation(self, stitches: str, rows: str) -> str:
        unit = "h" if self.task[self.tasks[0]].stitch.ndim == 2 else ""
        return f"{stitches}{unit},jbh->{rows}bh"

    def gates(self, x, context=Context()):
        rows = {task: [matrix[...][k] for matrix in self.stitch] for k, task in enumerate(self.tasks)}
        for task, found in rows.items():
            found.append(self.task[task].stitch[...])
        return {
            f"{task}/layer {index + 1}": row.mean(axis=1) if row.ndim == 2 else row
            for task, found in rows.items()
            for index, row in enumerate(found)
        }

    def gate_members(self):
        return {f"{task}/layer {index + 1}": self.tasks for task in self.tasks for index in range(len(self.layers))}


def stitches(number: int, own: float) -> Float[Array, "row row"]:
    """A matrix with ``own`` on the diagonal, whose rows add up to 1; with one row, 1."""
    if number == 1:
        return jnp.ones((1, 1))
    rest = (1 - own) / (number - 1)
    return jnp.full((number, number), rest) + (own - rest) * jnp.eye(number)
