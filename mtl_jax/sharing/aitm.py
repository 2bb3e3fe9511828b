"""AITM: a network a task, and attention to what the task before it has to say."""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from mtl_jax.arguments import check_counts, check_number, shown
from mtl_jax.errors import ConfigError
from mtl_jax.nn import MLP, Linear, stream
from mtl_jax.sharing.base import Context, SharedParameters, Strategy, head_context
from mtl_jax.sharing.links import FallingChances
from mtl_jax.sharing.order import check_order

Kernels = tuple[Float[Array, "hidden hidden"], Float[Array, "hidden hidden"], Float[Array, "hidden hidden"]]


class AITMCommon(NamedTuple):
    """What the tasks read from the shared part: x, the representations of all tasks but the last, the attention that all
    steps have in common (None where each has its own), and the key of the heads."""

    x: Float[Array, "batch in"]
    steps: dict[str, Float[Array, "batch hidden"]]
    attention: SharedParameters | None
    key: PRNGKeyArray | None


class AITM(Strategy):
    r"""Adaptive information transfer: in an order of tasks, each one weighs its own network against the task before.

    .. math::
        q_t &= f_t(x), \qquad z_1 = q_1, \qquad p_{t-1} = \operatorname{ReLU}(z_{t-1} W^{(t)} + b^{(t)}) \\
        z_t &= \sum_{u \in \{q_t,\, p_{t-1}\}} w_u \; u W_1, \qquad
        w_u = \operatorname{softmax}_u \frac{\langle u W_2,\, u W_3 \rangle}{\sqrt{H}}

    where H is the width of z. The paper's penalty on chances that rise from one step to the next acts behind the towers;
    the strategy brings it as its link (:class:`~mtl_jax.sharing.FallingChances`), for binary tasks.

    Args:
      in_features: Width of x.
      tasks: Task names.
      order: The tasks from the first step to the last; None: as they are listed.
      units: Layer widths of every f_t (ReLU after each); the last one is H.
      share_attention: Whether all steps have one W_1, W_2, W_3, as in the paper; else each has its own.
      detach_previous: Whether gradients stop at z_{t-1}.
      calibration: Factor >= 0 of the penalty on rising chances; 0: no link.
      dropout: Rate after each layer of f_t, in [0, 1): one number, or one a layer.
      rngs: Initialisation.

    Raises:
      ConfigError: The order is not one of the tasks, or there are not as many rates as layers.

    Labels: f_t, W^(t) and b^(t) are ``task/<name>`` for the last task and ``shared`` for the others; W_1, W_2, W_3 are
    ``shared``, but of the last task where only it reads them (its own ones, or of two tasks). With ``detach_previous``
    everything is its task's own, except an attention that several steps have in common.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from mtl_jax.sharing import AITM
      >>> order = ["click", "buy"]
      >>> strategy = AITM(16, ("buy", "click"), order=order, units=(32, 8), dropout=0.0, rngs=nnx.Rngs(0))
      >>> {task: z.shape for task, z in strategy(jnp.ones((5, 16))).items()}
      {'buy': (5, 8), 'click': (5, 8)}

    References:
      Xi, Chen, Yan, Zhang, Zhu, Zhuang, Chen, *Modeling the Sequential Dependence among Audience Multi-step Conversions
      with Multi-task Learning in Targeted Display Advertising*, KDD 2021, arXiv 2105.08489. EasyRec stops the gradient at
      z_{t-1}; several libraries leave the penalty out.
    """

    def __init__(
        self,
        in_features: int,
        tasks: Sequence[str],
        *,
        order: Sequence[str] | None = None,
        units: Sequence[int] = (128, 64, 32),
        share_attention: bool = True,
        detach_previous: bool = False,
        calibration: float = 0.6,
        dropout: float | Sequence[float] = (0.1, 0.3, 0.3),
        rngs: nnx.Rngs,
    ):
        self.tasks = tuple(tasks)
        self.order = check_order(order, self.tasks)
        check_counts(units, "units", empty=False)
        check_number(calibration, "calibration", least=0.0)
        rates = tuple(dropout) if isinstance(dropout, list | tuple) else (dropout,) * len(units)
        if len(rates) != len(units):
            raise ConfigError(
                f"dropout is {shown(dropout)} and units {list(units)}; expected one rate, or one for each layer. Change one"
            )
        self.calibration, self.detach_previous, self.out_features = calibration, detach_previous, units[-1]
        common = share_attention and len(self.tasks) > 2
        self.attention = _Attention(units[-1], rngs) if common else None
        key = rngs.params()

        def step(task: str) -> _Step:
            first = task == self.order[0]
            return _Step(
                in_features, units, rates, not first, not first and not common, nnx.Rngs(params=stream(key, task))
            )

        self.inner_tasks = () if detach_previous else self.order[:-1]
        self.inner = nnx.List([step(task) for task in self.inner_tasks])
        self.task = nnx.Dict({task: step(task) for task in self.tasks if task not in self.inner_tasks})

    def common(self, x: Float[Array, "batch in"], context: Context = Context()) -> AITMCommon:
        attention = None if self.attention is None else SharedParameters(self.attention.kernels())
        common = AITMCommon(x, {}, attention, context.rngs if context.train else None)
        for task in self.order[:-1]:
            z, _ = self._step(task, common)
            common.steps[task] = jax.lax.stop_gradient(z) if self.detach_previous else z
        return common

    def head(self, task: str, common: AITMCommon) -> Float[Array, "batch hidden"]:
        return self._step(task, common)[0] if task in self.task else common.steps[task]

    def _step(self, task: str, common: AITMCommon) -> tuple[Array, Array | None]:
        """The representation of a task from that of the task before, and the two weights."""
        step = self.task[task] if task in self.task else self.inner[self.inner_tasks.index(task)]
        position = self.order.index(task)
        before = common.steps[self.order[position - 1]] if position else None
        kernels = None if common.attention is None else common.attention.values
        return step(common.x, before, kernels, head_context(common.key, task))

    def link(self):
        return (
            functools.partial(FallingChances, order=self.order, weight=self.calibration) if self.calibration else None
        )

    def gates(self, x, context=Context()):
        common = self.common(x)
        return {f"{task}/transfer": self._step(task, common)[1] for task in self.order[1:]}

    def gate_members(self):
        return {
            f"{task}/transfer": ("own network", f"from {before}")
            for before, task in zip(self.order[:-1], self.order[1:], strict=True)
        }


class _Step(nnx.Module):
    """One task: its network, the layer that carries over what comes before, and its attention where it has one."""

    def __init__(self, in_features, units, rates, transfers, attends, rngs):
        widths = (in_features, *units)
        self.network = nnx.List(
            [MLP(i, (o,), dropout=rate, rngs=rngs) for i, o, rate in zip(widths[:-1], units, rates, strict=True)]
        )
        self.transfer = Linear(units[-1], units[-1], rngs=rngs) if transfers else None
        self.attention = _Attention(units[-1], rngs) if attends else None

    def __call__(self, x, before, kernels: Kernels | None, context: Context) -> tuple[Array, Array | None]:
        q = x
        for index, layer in enumerate(self.network):
            q = layer(q, context.stream(f"network/{index}"))
        if self.transfer is None:
            return q, None
        value, query, key = self.attention.kernels() if self.attention is not None else kernels
        both = jnp.stack([q, nnx.relu(self.transfer(before))])
        scores = jnp.sum((both @ query) * (both @ key), axis=-1) / math.sqrt(q.shape[-1])
        weights = jax.nn.softmax(scores, axis=0)
        return jnp.einsum("ub,ubh->bh", weights, both @ value), weights.T


class _Attention(nnx.Module):
    """The maps W_1 (value), W_2 (query) and W_3 (key), without bias."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.value, self.query, self.key = (Linear(width, width, use_bias=False, rngs=rngs) for _ in range(3))

    def kernels(self) -> Kernels:
        return self.value.kernel[...], self.query.kernel[...], self.key.kernel[...]
