"""ResFlow: a network a task, and residual connections from each layer of the task before."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from mtl_jax.arguments import check_counts
from mtl_jax.errors import ConfigError
from mtl_jax.nn import BatchNorm, Linear, dropout, stream
from mtl_jax.nn.mlp import dropout_rate
from mtl_jax.sharing.base import Context, Kept, Strategy
from mtl_jax.sharing.links import LogitResidual
from mtl_jax.sharing.order import check_order

NORMS = ("batch", "layer", "none")


class ResFlowCommon(NamedTuple):
    """What the tasks read from the shared part: x, the representations of all tasks but the last, the lower layers of the
    last but one, and the context of the heads' layers."""

    x: Float[Array, "batch in"]
    steps: dict[str, Float[Array, "batch hidden"]]
    below: list[Float[Array, "batch _"]]
    kept: Kept


class ResFlow(Strategy):
    r"""Residual learning along an order of tasks: each layer of a task adds to the same layer of the task before.

    .. math::
        h_k^l = f_k^l(r_k^{l-1}), \qquad r_k^l = h_k^l + r_{k-1}^l, \qquad
        f = \operatorname{norm} \circ \operatorname{PReLU} \circ \operatorname{Linear}

    with :math:`r_k^0 = x`, :math:`r_0^l = 0` and :math:`z_k = r_k^L`. PReLU has one learned slope a layer.

    The residual of the logits acts behind the towers; the strategy brings it as its link
    (:class:`~mtl_jax.sharing.LogitResidual`), for binary tasks.

    Args:
      in_features: Width of x.
      tasks: Task names.
      order: The tasks from the first step to the last; None: as they are listed.
      units: Layer widths of every task's network.
      norm: ``batch``, ``layer`` or ``none``.
      features: Whether layers add to those of the task before; False leaves a network a task.
      logits: Whether the logits are added up along the order too; False: no link.
      dropout: Rate after each f, in [0, 1).
      rngs: Initialisation; slopes start at 0.25.

    Raises:
      ConfigError: The order is not one of the tasks, or the norm is unknown.

    Labels: the last task's network is ``task/<name>``, the others are ``shared``. Without ``features`` each is its task's
    own, as far as no link adds logits up.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from mtl_jax.sharing import ResFlow
      >>> strategy = ResFlow(16, ("buy", "click"), order=["click", "buy"], units=(32, 8), rngs=nnx.Rngs(0))
      >>> {task: z.shape for task, z in strategy(jnp.ones((5, 16))).items()}
      {'buy': (5, 8), 'click': (5, 8)}

    References:
      Fu, Liu, Zhao, Cheng, Sun, Ji, Liu, *Residual Multi-Task Learner for Applied Ranking*, KDD 2024, arXiv 2411.09705. The
      paper weighs positive labels in its losses, which is an option of the tasks.
    """

    def __init__(
        self,
        in_features: int,
        tasks: Sequence[str],
        *,
        order: Sequence[str] | None = None,
        units: Sequence[int] = (512, 256),
        norm: str = "batch",
        features: bool = True,
        logits: bool = True,
        dropout: float = 0.2,
        rngs: nnx.Rngs,
    ):
        self.tasks = tuple(tasks)
        self.order = check_order(order, self.tasks)
        check_counts(units, "units", empty=False)
        if norm not in NORMS:
            raise ConfigError(f"norm is '{norm}'; expected one of {list(NORMS)}. Change it")
        self.features, self.logits, self.out_features = features, logits, units[-1]
        key, widths = rngs.params(), (in_features, *units)

        def network(task: str) -> nnx.List:
            own = nnx.Rngs(params=stream(key, task))
            return nnx.List([_Layer(i, o, norm, dropout, own) for i, o in zip(widths[:-1], units, strict=True)])

        self.inner_tasks = self.order[:-1] if features else ()
        self.inner = nnx.List([network(task) for task in self.inner_tasks])
        self.task = nnx.Dict({task: network(task) for task in self.tasks if task not in self.inner_tasks})

    def link(self):
        return functools.partial(LogitResidual, order=self.order) if self.logits else None

    def common(self, x: Float[Array, "batch in"], context: Context = Context()) -> ResFlowCommon:
        kept, steps, layers = Kept.of(context), {}, []
        for task, network in zip(self.inner_tasks, self.inner, strict=True):
            layers = _flow(network, x, layers, kept.context(task))
            steps[task] = layers[-1]
        return ResFlowCommon(x, steps, layers[:-1], kept)

    def head(self, task: str, common: ResFlowCommon) -> Float[Array, "batch hidden"]:
        if task in common.steps:
            return common.steps[task]
        before = [*common.below, common.steps[self.order[-2]]] if common.steps else []
        return _flow(self.task[task], common.x, before, common.kept.context(task))[-1]


class _Layer(nnx.Module):
    """f: linear, PReLU, norm, dropout."""

    def __init__(self, in_features: int, width: int, norm: str, dropout: float, rngs: nnx.Rngs):
        self.linear, self.slope = Linear(in_features, width, rngs=rngs), nnx.Param(jnp.full((), 0.25))
        self.batch_norm = BatchNorm(width) if norm == "batch" else None
        self.layer_norm = nnx.LayerNorm(width, epsilon=1e-5, rngs=rngs) if norm == "layer" else None
        self.dropout = dropout_rate(dropout)

    def __call__(self, r: Float[Array, "batch in"], context: Context) -> Float[Array, "batch out"]:
        h = self.linear(r)
        h = jnp.where(h >= 0, h, self.slope[...] * h)
        if self.batch_norm is not None:
            h = self.batch_norm(h, context)
        if self.layer_norm is not None:
            h = self.layer_norm(h)
        return dropout(h, self.dropout, context)


def _flow(network: nnx.List, x: Array, before: list[Array], context: Context) -> list[Array]:
    """All r of a task, given those of the task before (none for the first)."""
    found, r = [], x
    for index, layer in enumerate(network):
        r = layer(r, context.stream(f"layer {index}"))
        r = r + before[index] if before else r
        found.append(r)
    return found
