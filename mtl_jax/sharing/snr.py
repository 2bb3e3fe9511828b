"""SNRTrans and SNRAver: sub-networks whose connections are switched on or off by learned gates."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from mtl_jax.arguments import check_count, check_counts, check_number
from mtl_jax.errors import ConfigError
from mtl_jax.nn import Linear, dropout
from mtl_jax.nn.mlp import dropout_rate
from mtl_jax.sharing.base import Context, Strategy, by_task

TEMPERATURE, LOWER, UPPER = 0.9, -0.1, 1.1
"""Temperature and ends of the stretched interval of the hard-concrete distribution."""


class SNRCommon(NamedTuple):
    """What the tasks read from the shared part: the sub-networks of the last shared level, the key of the dropout in the
    heads and that of their gates (None in evaluation)."""

    nodes: Float[Array, "node batch hidden"]
    key: PRNGKeyArray | None
    draws: PRNGKeyArray | None


class _SNR(Strategy):
    """Both kinds; ``transforms`` tells them apart."""

    transforms: bool

    def __init__(
        self,
        in_features: int,
        tasks: Sequence[str],
        *,
        num_nodes: Sequence[int] = (4, 4),
        units: Sequence[int] = (512, 256, 256),
        penalty: float = 1e-4,
        log_alpha: float = 2.0,
        dropout: float = 0.2,
        rngs: nnx.Rngs,
    ):
        self.tasks = tuple(tasks)
        check_counts(num_nodes, "num_nodes", empty=False)
        check_counts(units, "units", empty=False)
        check_number(penalty, "penalty", least=0.0)
        check_number(log_alpha, "log_alpha")
        if len(units) != len(num_nodes) + 1:
            raise ConfigError(
                f"units is {list(units)} with num_nodes {list(num_nodes)}; expected a width for each shared level and one "
                "for the tasks' level. Change one"
            )
        if not self.transforms and len(set(units)) > 1:
            raise ConfigError(
                f"units is {list(units)}; expected equal widths, because SNRAver adds outputs without a transformation. "
                "Change it, or take SNRTrans"
            )
        for number in num_nodes:
            check_count(number, "num_nodes")

        def node(level: int, rngs: nnx.Rngs) -> _Node:
            transforms = self.transforms
            return _Node(num_nodes[level - 1], units[level - 1], units[level], transforms, log_alpha, dropout, rngs)

        self.first = nnx.List([Linear(in_features, units[0], rngs=rngs) for _ in range(num_nodes[0])])
        self.levels = nnx.List(
            [nnx.List([node(level, rngs) for _ in range(num_nodes[level])]) for level in range(1, len(num_nodes))]
        )
        self.task = by_task(self.tasks, lambda task, rngs: node(len(num_nodes), rngs), rngs)
        self.penalty = penalty
        self.dropout = dropout_rate(dropout)
        self.out_features = units[-1]

    def common(self, x: Float[Array, "batch in"], context: Context = Context()) -> SNRCommon:
        nodes = jnp.stack(
            [
                dropout(nnx.relu(node(x)), self.dropout, context.stream(f"node 0/{index}"))
                for index, node in enumerate(self.first)
            ]
        )
        for number, level in enumerate(self.levels, start=1):
            nodes = jnp.stack([node(nodes, context.stream(f"node {number}/{i}")) for i, node in enumerate(level)])
        return SNRCommon(nodes, context.rngs if context.train else None, context.draws)

    def head(self, task: str, common: SNRCommon) -> Float[Array, "batch hidden"]:
        context = Context(train=common.draws is not None, rngs=common.key, step_rngs=common.draws)
        return self.task[task](common.nodes, context.stream(task))

    def _nodes(self) -> list["_Node"]:
        return [*(node for level in self.levels for node in level), *(self.task[task] for task in self.tasks)]

    def regulariser(self) -> Float[Array, ""]:
        """λ times the expected number of open connections."""
        shift = TEMPERATURE * math.log(-LOWER / UPPER)
        log_alphas = [node.log_alpha[...].astype(jnp.float32) for node in self._nodes()]
        return self.penalty * sum(jnp.sum(jax.nn.sigmoid(log_alpha - shift)) for log_alpha in log_alphas)

    def gates(self, x, context=Context()):
        found = {
            f"node {index}/level {number}": hard_concrete(node.log_alpha[...], None)
            for number, level in enumerate(self.levels, start=2)
            for index, node in enumerate(level)
        }
        last = len(self.levels) + 2
        return found | {
            f"{task}/level {last}": hard_concrete(self.task[task].log_alpha[...], None) for task in self.tasks
        }

    def gate_members(self):
        def members(node: _Node) -> tuple[str, ...]:
            return tuple(f"node {index}" for index in range(node.log_alpha.shape[0]))

        found = {
            f"node {index}/level {number}": members(node)
            for number, level in enumerate(self.levels, start=2)
            for index, node in enumerate(level)
        }
        return found | {f"{task}/level {len(self.levels) + 2}": members(self.task[task]) for task in self.tasks}


class _Node(nnx.Module):
    """One sub-network: gated connections from those below, their sum, and a layer."""

    def __init__(self, num_below, in_features, out_features, transforms, log_alpha, dropout, rngs):
        self.log_alpha = nnx.Param(jnp.full(num_below, log_alpha))
        self.transforms = nnx.List(
            [Linear(in_features, in_features, use_bias=False, rngs=rngs) for _ in range(num_below * transforms)]
        )
        self.layer = Linear(in_features, out_features, rngs=rngs)
        self.dropout = dropout_rate(dropout)

    def __call__(self, below: Float[Array, "node batch in"], context: Context) -> Float[Array, "batch out"]:
        gates = hard_concrete(self.log_alpha[...], context.stream("gates").draws)
        if len(self.transforms):
            below = [transform(below[index]) for index, transform in enumerate(self.transforms)]
        total = sum(gates[index] * one for index, one in enumerate(below))
        return dropout(nnx.relu(self.layer(total)), self.dropout, context)


def hard_concrete(log_alpha: Float[Array, " gate"], key: PRNGKeyArray | None) -> Float[Array, " gate"]:
    r"""Gates in [0, 1] that are 0 or 1 with positive probability; without a key, their deterministic form.

    .. math::
        s = \sigma((\log u - \log(1 - u) + \log\alpha) / \beta), \qquad
        z = \min(1, \max(0, s (\zeta - \gamma) + \gamma))

    References:
      Louizos, Welling, Kingma, *Learning Sparse Neural Networks through L0 Regularization*, ICLR 2018.
    """
    if key is None:
        s = jax.nn.sigmoid(log_alpha)
    else:
        noise = jax.random.logistic(key, log_alpha.shape).astype(log_alpha.dtype)
        s = jax.nn.sigmoid((noise + log_alpha) / TEMPERATURE)
    return jnp.clip(s * (UPPER - LOWER) + LOWER, 0.0, 1.0)


class SNRTrans(_SNR):
    r"""Sub-network routing with a transformation on every connection.

    Levels of sub-networks, the first on x, the last with one for each task:

    .. math::
        v_i^{l+1} = f_i\Bigl(\sum_j z_{ij} \, v_j^l W_{ij}\Bigr), \qquad
        R = \lambda \sum_{ij} \sigma\bigl(\log\alpha_{ij} - \beta \log(-\gamma/\zeta)\bigr)

    with gates z of the hard-concrete distribution (:func:`mtl_jax.sharing.snr.hard_concrete`), drawn once a step for all
    rows in training, and deterministic in evaluation. R is λ times the expected number of open connections.

    Args:
      in_features: Width of x.
      tasks: Task names.
      num_nodes: Sub-networks of each shared level; the first level has no gates.
      units: Width of a sub-network (one layer with ReLU), for each shared level and for the tasks'.
      penalty: λ >= 0.
      log_alpha: First value of log α; 2 opens a connection to .96. The default is ours.
      dropout: Rate after each sub-network, in [0, 1).
      rngs: Initialisation.

    Raises:
      ConfigError: Widths and levels do not fit.

    Labels: the last sub-network of a task, its gates and its W are ``task/<name>``, the rest is ``shared``.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from mtl_jax.sharing import SNRTrans
      >>> strategy = SNRTrans(16, ("click", "buy"), num_nodes=(3, 3), units=(32, 16, 8), rngs=nnx.Rngs(0))
      >>> {task: z.shape for task, z in strategy(jnp.ones((5, 16))).items()}
      {'click': (5, 8), 'buy': (5, 8)}

    References:
      Ma, Zhao, Chen, Li, Hong, Chi, *SNR: Sub-Network Routing for Flexible Parameter Sharing in Multi-Task Learning in
      E-Commerce by Exploiting Task Relationships*, AAAI 2019. ζ = 1.1 as in the hard-concrete paper.
    """

    transforms = True


class SNRAver(_SNR):
    r"""Sub-network routing that adds the gated outputs as they are: :math:`v_i^{l+1} = f_i(\sum_j z_{ij} v_j^l)`.

    Args:
      in_features: Width of x.
      tasks: Task names.
      num_nodes: Sub-networks of each shared level; the first level has no gates.
      units: Width of a sub-network (one layer with ReLU), for each shared level and for the tasks'; all equal.
      penalty: λ >= 0, as in SNRTrans.
      log_alpha: First value of log α.
      dropout: Rate after each sub-network, in [0, 1).
      rngs: Initialisation.

    Raises:
      ConfigError: Widths and levels do not fit.

    Labels: as in SNRTrans.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from mtl_jax.sharing import SNRAver
      >>> strategy = SNRAver(16, ("click", "buy"), num_nodes=(3, 3), units=(8, 8, 8), rngs=nnx.Rngs(0))
      >>> {task: z.shape for task, z in strategy(jnp.ones((5, 16))).items()}
      {'click': (5, 8), 'buy': (5, 8)}

    References:
      Ma, Zhao, Chen, Li, Hong, Chi, *SNR: Sub-Network Routing for Flexible Parameter Sharing in Multi-Task Learning in
      E-Commerce by Exploiting Task Relationships*, AAAI 2019.
    """

    transforms = False

    def __init__(
        self,
        in_features: int,
        tasks: Sequence[str],
        *,
        num_nodes: Sequence[int] = (4, 4),
        units: Sequence[int] = (256, 256, 256),
        penalty: float = 1e-4,
        log_alpha: float = 2.0,
        dropout: float = 0.2,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            in_features,
            tasks,
            num_nodes=num_nodes,
            units=units,
            penalty=penalty,
            log_alpha=log_alpha,
            dropout=dropout,
            rngs=rngs,
        )
