"""PPNet: a network a task, each of whose layers is gated by who and what the row is about."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from mtl_jax.arguments import check_count, check_counts
from mtl_jax.errors import ConfigError
from mtl_jax.nn import Linear, dropout
from mtl_jax.nn.gate_nu import GateNU
from mtl_jax.nn.mlp import dropout_rate
from mtl_jax.sharing.base import Context, Strategy, by_task, head_context


class PPNetCommon(NamedTuple):
    """The input and the prior, which are all that tasks share, and the key of their dropout (None in evaluation)."""

    x: Float[Array, "batch in"]
    prior: Float[Array, "batch prior"]
    key: PRNGKeyArray | None


class PPNet(Strategy):
    r"""Parameter personalisation: a network a task, with a gate on the units of every layer.

    .. math::
        h_k^0 = x, \qquad h_k^l = \operatorname{ReLU}(h_k^{l-1} W_k^l + b_k^l) \odot
        \operatorname{GateNU}_k^l([p;\, \operatorname{sg}(x)]), \qquad z_k = h_k^L

    with the prior p, embeddings of the user, the item and the like. The gates train the prior's tables, and not those of x;
    the networks train the latter. Every factor starts at 1 (for γ = 2).

    Args:
      in_features: Width of x.
      tasks: Task names.
      prior_features: Width of p.
      units: Layer widths of every network; the last one is the width of z_k.
      gamma: Upper bound of the factors.
      dropout: Rate after each layer, in [0, 1).
      rngs: Initialisation.

    Raises:
      ConfigError: ``context.prior`` is None.

    Labels: everything is ``task/<name>``.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from mtl_jax.sharing import Context, PPNet
      >>> strategy = PPNet(16, ("click", "buy"), prior_features=4, units=(32, 8), rngs=nnx.Rngs(0))
      >>> outputs = strategy(jnp.ones((5, 16)), Context(prior=jnp.ones((5, 4))))
      >>> {task: z.shape for task, z in outputs.items()}
      {'click': (5, 8), 'buy': (5, 8)}

    References:
      Chang et al., *PEPNet: Parameter and Embedding Personalized Network for Infusing with Personalized Prior Information*,
      KDD 2023, arXiv 2302.01115. In some public code the networks read what the gates read, without a gradient; then the
      tables of x are never trained.
    """

    def __init__(
        self,
        in_features: int,
        tasks: Sequence[str],
        *,
        prior_features: int,
        units: Sequence[int] = (128, 64, 32),
        gamma: float = 2.0,
        dropout: float = 0.2,
        rngs: nnx.Rngs,
    ):
        self.tasks = tuple(tasks)
        check_count(prior_features, "prior_features")
        check_counts(units, "units", empty=False)

        def network(task: str, rngs: nnx.Rngs) -> _Network:
            return _Network(in_features, prior_features, units, gamma, dropout, rngs)

        self.task = by_task(self.tasks, network, rngs)
        self.out_features = units[-1]
        self.units = tuple(units)

    def common(self, x: Float[Array, "batch in"], context: Context = Context()) -> PPNetCommon:
        return PPNetCommon(x, _prior(context), context.rngs if context.train else None)

    def head(self, task: str, common: PPNetCommon) -> Float[Array, "batch hidden"]:
        return self.task[task](common.x, common.prior, head_context(common.key, task))

    def gates(self, x, context=Context()):
        prior = _prior(context)
        return {
            f"{task}/layer {index + 1}": factors
            for task in self.tasks
            for index, factors in enumerate(self.task[task].factors(x, prior))
        }

    def gate_members(self):
        return {
            f"{task}/layer {index + 1}": tuple(f"unit {unit}" for unit in range(width))
            for task in self.tasks
            for index, width in enumerate(self.units)
        }


class _Network(nnx.Module):
    """The layers of one task and their gates."""

    def __init__(self, in_features, prior_features, units, gamma, dropout, rngs):
        inputs, known = (in_features, *units[:-1]), prior_features + in_features
        self.layers = nnx.List([Linear(i, o, rngs=rngs) for i, o in zip(inputs, units, strict=True)])
        self.gates = nnx.List([GateNU(known, width, gamma=gamma, rngs=rngs) for width in units])
        self.dropout = dropout_rate(dropout)

    def __call__(self, x, prior, context: Context) -> Float[Array, "batch hidden"]:
        h = x
        for index, (layer, factors) in enumerate(zip(self.layers, self.factors(x, prior), strict=True)):
            h = dropout(nnx.relu(layer(h)) * factors, self.dropout, context.stream(f"layer {index}"))
        return h

    def factors(self, x, prior) -> list[Float[Array, "batch hidden"]]:
        """Of the units of every layer."""
        known = jnp.concatenate([prior, jax.lax.stop_gradient(x)], axis=-1)
        return [gate(known) for gate in self.gates]


def _prior(context: Context) -> Float[Array, "batch prior"]:
    if context.prior is None:
        raise ConfigError(
            "context.prior is None; expected embeddings of the user, the item and the like for every row. Name the "
            "features that make it, or pass Context(prior=...)"
        )
    return context.prior
