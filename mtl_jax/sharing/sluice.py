"""Sluice: networks of two subspaces a task, mixed after every layer, with a learned depth for each task."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from mtl_jax.arguments import check_count, check_number
from mtl_jax.errors import ConfigError
from mtl_jax.nn import StackedLinear, dropout
from mtl_jax.nn.mlp import dropout_rate
from mtl_jax.sharing.base import Context, Strategy, by_task
from mtl_jax.sharing.cross_stitch import stitches


class SluiceCommon(NamedTuple):
    """What the tasks read from the shared part.

    Attributes:
      streams: x_k of every level but the last one.
      last: h of the last level, before it is mixed, subspace by subspace.
    """

    streams: list[Float[Array, "task batch hidden"]]
    last: Float[Array, "subspace batch half"]


class Sluice(Strategy):
    r"""Sluice networks: cross-stitch between subspaces, and skip connections from every level.

    Each layer of task k has two subspaces, and all 2K of them are mixed:

    .. math::
        h_{k,s}^l &= \operatorname{ReLU}(x_k^{l-1} W_{k,s}^l + b_{k,s}^l), \qquad
        \tilde h_i^l = \sum_j \alpha_{ij}^l h_j^l, \qquad x_k^l = [\tilde h_{k,1}^l;\, \tilde h_{k,2}^l] \\
        z_k &= \sum_l \beta_{k,l} \, x_k^l, \qquad
        R = c \sum_{k,l} \lVert (W_{k,1}^l)^\top W_{k,2}^l \rVert_F^2

    Args:
      in_features: Width of x.
      tasks: Task names.
      width: H, even, the same in all layers because they are added.
      num_layers: L.
      own: First value of the diagonal of α, in [0, 1]; the others of a row share the rest. Ours, like the first β = 1/L.
      orthogonality: c >= 0; the default is ours.
      dropout: Rate after each layer, in [0, 1).
      rngs: Initialisation.

    Raises:
      ConfigError: The width is odd.

    Labels: β_k and the rows of the last α for task k are ``task/<name>``, all else is ``shared``.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from mtl_jax.sharing import Sluice
      >>> strategy = Sluice(16, ("click", "buy"), width=8, rngs=nnx.Rngs(0))
      >>> {task: z.shape for task, z in strategy(jnp.ones((5, 16))).items()}
      {'click': (5, 8), 'buy': (5, 8)}

    References:
      Ruder, Bingel, Augenstein, Søgaard, *Latent Multi-task Architecture Learning*, AAAI 2019.
    """

    widths = ("width",)

    def __init__(
        self,
        in_features: int,
        tasks: Sequence[str],
        *,
        width: int = 256,
        num_layers: int = 2,
        own: float = 0.9,
        orthogonality: float = 1e-3,
        dropout: float = 0.2,
        rngs: nnx.Rngs,
    ):
        self.tasks = tuple(tasks)
        check_count(width, "width")
        check_count(num_layers, "num_layers")
        check_number(own, "own", least=0.0, most=1.0)
        check_number(orthogonality, "orthogonality", least=0.0)
        if width % 2:
            raise ConfigError(f"width is {width}; expected an even number, for two subspaces. Change it")
        number = len(self.tasks)
        inputs = (in_features, *[width] * (num_layers - 1))
        self.layers = nnx.List([StackedLinear(number, features, width, rngs=rngs) for features in inputs])
        alpha = stitches(2 * number, own)
        self.alpha = nnx.List([nnx.Param(jnp.array(alpha)) for _ in range(num_layers - 1)])

        def mixture(task: str, rngs: nnx.Rngs) -> nnx.Dict:
            start = 2 * self.tasks.index(task)
            return nnx.Dict(
                alpha=nnx.Param(alpha[start : start + 2]), beta=nnx.Param(jnp.full(num_layers, 1 / num_layers))
            )

        self.task = by_task(self.tasks, mixture, rngs)
        self.orthogonality = orthogonality
        self.dropout = dropout_rate(dropout)
        self.out_features = width

    def common(self, x: Float[Array, "batch in"], context: Context = Context()) -> SluiceCommon:
        streams = []
        for index, layer in enumerate(self.layers):
            x = dropout(nnx.relu(layer(x)), self.dropout, context.stream(f"layer {index}"))
            halves = jnp.stack(jnp.split(x, 2, axis=-1), axis=1)  # task, subspace, batch, half
            halves = halves.reshape(-1, *halves.shape[2:])
            if index < len(self.alpha):
                mixed = jnp.einsum("ij,jbh->ibh", self.alpha[index][...], halves)
                x = jnp.concatenate([mixed[::2], mixed[1::2]], axis=-1)
                streams.append(x)
        return SluiceCommon(streams, halves)

    def head(self, task: str, common: SluiceCommon) -> Float[Array, "batch hidden"]:
        own, index = self.task[task], self.tasks.index(task)
        mixed = jnp.einsum("ij,jbh->ibh", own.alpha[...], common.last)
        levels = [*(stream[index] for stream in common.streams), jnp.concatenate([mixed[0], mixed[1]], axis=-1)]
        return sum(own.beta[...][level] * x for level, x in enumerate(levels))

    def regulariser(self) -> Float[Array, ""]:
        total = 0.0
        for layer in self.layers:
            one, two = jnp.split(layer.kernel[...].astype(jnp.float32), 2, axis=-1)
            total += jnp.sum(jnp.einsum("kio,kip->kop", one, two, precision="highest") ** 2)
        return self.orthogonality * total

    def gates(self, x, context=Context()):
        found = {}
        for k, task in enumerate(self.tasks):
            matrices = [*(alpha[...][2 * k : 2 * k + 2] for alpha in self.alpha), self.task[task].alpha[...]]
            for index, rows in enumerate(matrices):
                found |= {f"{task}/layer {index + 1}, subspace {s + 1}": rows[s] for s in range(2)}
            found[f"{task}/levels"] = self.task[task].beta[...]
        return found

    def gate_members(self):
        subspaces = tuple(f"{task} {s}" for task in self.tasks for s in (1, 2))
        layers = range(1, len(self.layers) + 1)
        found = {}
        for task in self.tasks:
            found |= {f"{task}/layer {index}, subspace {s}": subspaces for index in layers for s in (1, 2)}
            found[f"{task}/levels"] = tuple(f"level {index}" for index in layers)
        return found
