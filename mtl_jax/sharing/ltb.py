"""LTB: layers of nodes, each of which learns from which one below it branches off."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from mtl_jax.arguments import check_count, check_counts, check_number
from mtl_jax.errors import ConfigError
from mtl_jax.nn import StackedLinear, State, dropout
from mtl_jax.nn.mlp import dropout_rate
from mtl_jax.sharing.base import Context, SharedParameters, Strategy, by_task


class LTBCommon(NamedTuple):
    """What the tasks read from the shared part: the nodes of the last level, and how they choose among them: the
    temperature (which has no rows), whether the step warms up, and the key of the draws (None in evaluation)."""

    nodes: Float[Array, "node batch hidden"]
    temperature: SharedParameters
    warm: Bool[Array, ""]
    draws: PRNGKeyArray | None


class LTB(Strategy):
    r"""Learning to branch: levels of N nodes, each of which reads one node of the level below; a tree grows out of it.

    .. math::
        v_i^1 = f_i^1(x), \qquad v_i^l = f_i^l\Bigl(\sum_j d_{ij}^l \, v_j^{l-1}\Bigr), \qquad
        z_k = \sum_j d_{kj} \, v_j^L

    f is a linear layer with ReLU. A choice d is one-hot. In training it is the argmax of :math:`\pi + g`, with Gumbel noise
    g drawn once a step for all rows, and its gradient is that of :math:`\operatorname{softmax}((\pi + g) / \tau)`; the
    temperature falls from epoch to epoch,

    .. math:: \tau = \tau_0 \, \frac{E / 20}{\sqrt{\mathrm{epoch} + 1}}

    In the first E/100 epochs everything reads the mean of the level below, :math:`d = 1/N`. Evaluation takes the argmax of
    :math:`\pi`, the first of equal ones.

    Args:
      in_features: Width of x.
      tasks: Task names.
      units: Width of the nodes, for each level.
      num_nodes: N; None: as many as tasks.
      temperature: τ_0 > 0.
      epochs: E, the epochs of the whole run.
      steps_per_epoch: Steps of training that count as an epoch here. A module does not see where epochs end; set it to the
        number of rows over the batch size.
      dropout: Rate after each node, in [0, 1).
      rngs: Initialisation; every π starts at 0.

    Raises:
      ConfigError: Numbers are out of range.

    Labels: the choice of a task, its π, is ``task/<name>``; nodes and their choices are ``shared``. The epoch is no
    parameter.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from mtl_jax.sharing import LTB
      >>> strategy = LTB(16, ("click", "buy"), units=(32, 8), rngs=nnx.Rngs(0))
      >>> {task: z.shape for task, z in strategy(jnp.ones((5, 16))).items()}
      {'click': (5, 8), 'buy': (5, 8)}
      >>> strategy.task["buy"].logits[...] = jnp.array([0.0, 1.0])
      >>> strategy.tree()["buy"]
      'node 1/level 2'

    References:
      Guo, Lee, Ulbricht, *Learning to Branch for Multi-Task Learning*, ICML 2020, with dense layers. In the warm-up, public
      code sums the nodes below, which is N times the later scale; here it is their mean.
    """

    def __init__(
        self,
        in_features: int,
        tasks: Sequence[str],
        *,
        units: Sequence[int] = (512, 256),
        num_nodes: int | None = None,
        temperature: float = 1.0,
        epochs: int = 20,
        steps_per_epoch: int = 100,
        dropout: float = 0.2,
        rngs: nnx.Rngs,
    ):
        self.tasks = tuple(tasks)
        check_counts(units, "units", empty=False)
        number = len(self.tasks) if num_nodes is None else num_nodes
        check_count(number, "num_nodes")
        check_count(epochs, "epochs")
        check_count(steps_per_epoch, "steps_per_epoch", most=2**31)
        check_number(temperature, "temperature", least=0.0)
        if temperature == 0:
            raise ConfigError("temperature is 0; expected a number > 0. Change it")
        widths = (in_features, *units)
        self.levels = nnx.List(
            [StackedLinear(number, i, o, rngs=rngs) for i, o in zip(widths[:-1], units, strict=True)]
        )
        self.choices = nnx.List([_Choice(number, number) for _ in units[1:]])
        self.task = by_task(self.tasks, lambda task, rngs: _Choice(number), rngs)
        self.epoch = State(jnp.zeros((), jnp.float32))
        self.num_nodes, self.temperature = number, temperature
        self.epochs, self.steps_per_epoch = epochs, steps_per_epoch
        self.dropout = dropout_rate(dropout)
        self.out_features = units[-1]

    def common(self, x: Float[Array, "batch in"], context: Context = Context()) -> LTBCommon:
        draws, epoch = context.draws, self.epoch[...]
        temperature = self.temperature * (self.epochs / 20) / jnp.sqrt(epoch + 1)
        warm = (epoch < self.epochs / 100) & context.train
        if context.train:
            self.epoch[...] = epoch + 1 / self.steps_per_epoch
        v = x
        for index, level in enumerate(self.levels):
            if index:
                choice = self.choices[index - 1](temperature, warm, context.stream(f"choice {index}").draws)
                v = jnp.einsum("ij,jbh->ibh", choice.astype(v.dtype), v)
            v = dropout(nnx.relu(level(v)), self.dropout, context.stream(f"level {index}"))
        return LTBCommon(v, SharedParameters(temperature), warm, draws)

    def head(self, task: str, common: LTBCommon) -> Float[Array, "batch hidden"]:
        draws = Context(train=common.draws is not None, step_rngs=common.draws).stream(task).draws
        choice = self.task[task](common.temperature.values, common.warm, draws)
        return jnp.einsum("j,jbh->bh", choice.astype(common.nodes.dtype), common.nodes)

    def tree(self) -> dict[str, str]:
        """What evaluation reads: each task and each node -> its parent; the first level's is x."""

        def argmax(choice: _Choice) -> list[int]:
            return np.argmax(np.asarray(choice.logits[...]), axis=-1).tolist()

        depth = len(self.levels)
        found = {task: f"node {argmax(self.task[task])}/level {depth}" for task in self.tasks}
        for level in range(depth, 1, -1):
            parents = argmax(self.choices[level - 2])
            found |= {f"node {i}/level {level}": f"node {j}/level {level - 1}" for i, j in enumerate(parents)}
        return found | {f"node {i}/level 1": "x" for i in range(self.num_nodes)}

    def gates(self, x, context=Context()):
        found = {
            f"node {index}/level {level}": row
            for level, choice in enumerate(self.choices, start=2)
            for index, row in enumerate(choice.one_hot())
        }
        last = len(self.levels) + 1
        return found | {f"{task}/level {last}": self.task[task].one_hot() for task in self.tasks}

    def gate_members(self):
        members = tuple(f"node {index}" for index in range(self.num_nodes))
        nodes = [f"node {i}/level {level}" for level in range(2, len(self.levels) + 1) for i in range(self.num_nodes)]
        return dict.fromkeys([*nodes, *(f"{task}/level {len(self.levels) + 1}" for task in self.tasks)], members)


class _Choice(nnx.Module):
    """π of one who chooses, or of several, and what they choose."""

    def __init__(self, *shape: int):
        self.logits = nnx.Param(jnp.zeros(shape))

    def one_hot(self) -> Float[Array, "*child parent"]:
        return _straight_through(self.logits[...], jnp.ones(()))

    def __call__(self, temperature, warm, draws: PRNGKeyArray | None) -> Float[Array, "*child parent"]:
        logits = self.logits[...]
        if draws is not None:
            logits = logits + jax.random.gumbel(draws, logits.shape).astype(logits.dtype)
        return jnp.where(warm, 1 / logits.shape[-1], _straight_through(logits, temperature))


def _straight_through(logits: Float[Array, "*child parent"], temperature) -> Float[Array, "*child parent"]:
    """The one-hot argmax, with the gradient of the softmax."""
    soft = jax.nn.softmax(logits / temperature.astype(logits.dtype), axis=-1)
    hard = jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1], dtype=logits.dtype)
    return hard + (soft - jax.lax.stop_gradient(soft))
