"""AdaSparse: units of a shared network that each domain weakens, strengthens or turns off."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from mtl_jax.arguments import check_count, check_number, shown
from mtl_jax.errors import ConfigError
from mtl_jax.nn import MLP, Linear
from mtl_jax.nn.domain_linear import by_row, domains_of
from mtl_jax.nn.state import State
from mtl_jax.sharing.base import Context, Strategy
from mtl_jax.sharing.star import domain_embedding

MODES = ("fusion", "scaling", "binarisation")


class AdaSparse(Strategy):
    r"""A shared MLP whose input and whose layers' outputs are pruned by domain.

    A pruner without bias weighs every unit, from the embedding e of the row's domain and the units themselves:

    .. math::
        h \leftarrow h \odot \pi(v), \qquad v = \beta\, \sigma(\alpha\, [e; h] W), \qquad
        \pi(v) = \begin{cases} v & v \ge \epsilon \\ 0 & \text{else} \end{cases}

    That is the mode ``fusion``. In ``scaling`` :math:`\pi(v) = v` with :math:`\alpha = 1`. In ``binarisation``
    :math:`\beta` plays no part, and :math:`\pi` is 1 where :math:`\sigma(\alpha\, [e; h] W) \ge \epsilon` and 0 elsewhere,
    with the gradient of the sigmoid. A unit below :math:`\epsilon` has no gradient in ``fusion``, by design.

    :math:`\alpha` starts at 1 and grows by ``growth`` after each step of training: units are pushed to the ends. It is
    saved with the model and does not move in evaluation.

    Args:
      in_features: Width of x.
      tasks: Task names.
      num_domains: M.
      units: Layer widths of the MLP (ReLU after each).
      mode: ``fusion``, ``scaling`` or ``binarisation``.
      beta: Largest weight of a unit.
      threshold: :math:`\epsilon`.
      growth: Of :math:`\alpha` in a step.
      embedding_features: Width of the domain's embedding.
      dropout: Rate after each layer, before its pruner, in [0, 1).
      rngs: Initialisation.

    Raises:
      ConfigError: The mode is unknown, or ``context.domain`` is None.

    Labels: all parameters are ``shared``, for a domain is no task. :math:`\alpha` is no parameter.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from mtl_jax.nn import Context
      >>> from mtl_jax.sharing import AdaSparse
      >>> strategy = AdaSparse(16, ("click", "buy"), num_domains=3, units=(32, 8), rngs=nnx.Rngs(0))
      >>> context = Context(domain=jnp.array([0, 2, 1, 1, 0]))
      >>> {task: z.shape for task, z in strategy(jnp.ones((5, 16)), context).items()}
      {'click': (5, 8), 'buy': (5, 8)}

    References:
      Yang, Peng, Wei, Liu, Wang, Zheng, *AdaSparse: Learning Adaptively Sparse Structures for Multi-Domain Click-Through
      Rate Prediction*, CIKM 2022, arXiv 2206.13108. Without the paper's regulariser of the share of units that are off.
      Public code turns units to -1 instead of off, lets :math:`\alpha` grow in evaluation and does not save it.
    """

    def __init__(
        self,
        in_features: int,
        tasks: Sequence[str],
        *,
        num_domains: int,
        units: Sequence[int] = (512, 256),
        mode: str = "fusion",
        beta: float = 2.0,
        threshold: float = 0.01,
        growth: float = 1e-4,
        embedding_features: int = 16,
        dropout: float = 0.2,
        rngs: nnx.Rngs,
    ):
        self.tasks = tuple(tasks)
        check_count(num_domains, "num_domains")
        check_number(beta, "beta", least=0.0)
        check_number(threshold, "threshold", least=0.0)
        check_number(growth, "growth", least=0.0)
        if mode not in MODES:
            raise ConfigError(f"mode is {shown(mode)}; expected one of {list(MODES)}. Change it")
        self.embedding = domain_embedding(num_domains, embedding_features, rngs=rngs)
        self.network = MLP(in_features, units, dropout=dropout, rngs=rngs)
        self.pruners = nnx.List(
            [Linear(embedding_features + width, width, use_bias=False, rngs=rngs) for width in (in_features, *units)]
        )
        self.alpha = State(jnp.ones(())) if mode != "scaling" else None
        self.mode, self.beta, self.threshold, self.growth = mode, beta, threshold, growth
        self.out_features = self.network.out_features

    def common(self, x: Float[Array, "batch in"], context: Context = Context()) -> Float[Array, "batch hidden"]:
        return self._pruned(x, context)[0]

    def _pruned(
        self, x: Float[Array, "batch in"], context: Context
    ) -> tuple[Float[Array, "batch hidden"], list[Float[Array, "batch _"]]]:
        """The representation, and the weights of the units of the input and of every layer."""
        embedding = by_row(self.embedding[...], domains_of(context))
        h, weights = x.astype(embedding.dtype), []
        for index, pruner in enumerate(self.pruners):
            if index:
                h = self.network.entry(index - 1, h, context)
            weights.append(self._weights(pruner(jnp.concatenate([embedding, h], axis=-1))))
            h = h * weights[-1]
        if context.train and self.alpha is not None:
            self.alpha[...] = self.alpha[...] + self.growth
        return h, weights

    def _weights(self, scores: Float[Array, "batch unit"]) -> Float[Array, "batch unit"]:
        """Computed in float32 at least: alpha grows by less than narrower types resolve."""
        kind, scores = scores.dtype, scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
        share = jax.nn.sigmoid(scores if self.alpha is None else self.alpha[...] * scores)
        if self.mode == "binarisation":
            weights = (share >= self.threshold) + (share - lax.stop_gradient(share))
        else:
            weights = self.beta * share
            weights = weights if self.mode == "scaling" else jnp.where(weights >= self.threshold, weights, 0.0)
        return weights.astype(kind)

    def head(self, task: str, common: Float[Array, "batch hidden"]) -> Float[Array, "batch hidden"]:
        return common

    def gates(self, x, context=Context()):
        weights = self._pruned(x, context._replace(train=False))[1]
        return {f"all/level {index}": weight for index, weight in enumerate(weights)}

    def gate_members(self):
        return {
            f"all/level {index}": tuple(f"unit {unit}" for unit in range(pruner.kernel.shape[1]))
            for index, pruner in enumerate(self.pruners)
        }
