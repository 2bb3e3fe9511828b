"""EPNet: a gate of the domain on the input, in front of any strategy."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from mtl_jax.arguments import check_count, parameters_of
from mtl_jax.errors import ConfigError
from mtl_jax.nn.domain_linear import by_row, domains_of
from mtl_jax.nn.gate_nu import GateNU
from mtl_jax.sharing.base import Context, Strategy
from mtl_jax.sharing.mmoe import MMoE
from mtl_jax.sharing.star import domain_embedding


class EPNet(Strategy):
    r"""Embedding personalisation: the domain strengthens or weakens every unit of the input, and a strategy reads the rest.

    .. math::
        x' = x \odot \operatorname{GateNU}([e_m;\, \operatorname{sg}(x)]), \qquad z = \operatorname{inner}(x')

    with e_m an embedding of the row's domain m. No gradient passes through what the gate sees of x, so tables are trained
    by what is made of x' alone; at the start x' = x. PEPNet is this in front of :class:`mtl_jax.sharing.PPNet`.

    Args:
      in_features: Width of x.
      tasks: Task names.
      num_domains: M.
      inner: ``(in_features, tasks, *, rngs) -> Strategy``; one that takes ``num_domains`` or ``prior_features`` is given
        them.
      prior_features: Width of ``context.prior``, where the inner strategy reads it.
      embedding_features: Width of e_m.
      gamma: Upper bound of the factors; they start at the half of it.
      dropout: Rate of the inner strategy; None leaves what it sets itself. The gate has none.
      rngs: Initialisation.

    Raises:
      ConfigError: The inner strategy has private tables, whose inputs are several; it needs a prior and there is none; or
        ``context.domain`` is None.

    Labels: the gate and the domains' embeddings are ``shared``; parameters of the inner strategy keep their labels.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from mtl_jax.sharing import Context, EPNet, SharedBottom
      >>> strategy = EPNet(16, ("click", "buy"), num_domains=3, inner=SharedBottom, rngs=nnx.Rngs(0))
      >>> outputs = strategy(jnp.ones((5, 16)), Context(domain=jnp.array([0, 1, 2, 0, 1])))
      >>> {task: z.shape for task, z in outputs.items()}
      {'click': (5, 256), 'buy': (5, 256)}

    References:
      Chang et al., *PEPNet: Parameter and Embedding Personalized Network for Infusing with Personalized Prior Information*,
      KDD 2023, arXiv 2302.01115.
    """

    widths = ("inner",)

    def __init__(
        self,
        in_features: int,
        tasks: Sequence[str],
        *,
        num_domains: int,
        inner: Callable[..., Strategy] = MMoE,
        prior_features: int | None = None,
        embedding_features: int = 16,
        gamma: float = 2.0,
        dropout: float | None = None,
        rngs: nnx.Rngs,
    ):
        check_count(num_domains, "num_domains")
        self.embedding = domain_embedding(num_domains, embedding_features, rngs=rngs)
        self.gate = GateNU(embedding_features + in_features, in_features, gamma=gamma, rngs=rngs)
        offered = {"num_domains": num_domains, "prior_features": prior_features or None, "dropout": dropout}
        self.inner = inner(in_features, tasks, **_taken(inner, offered), rngs=rngs)
        if self.inner.private_tables:
            raise ConfigError(
                f"inner is '{type(self.inner).__name__}' with tables of its own for every task; expected a strategy that "
                "reads one input. Share its tables, or choose another"
            )
        self.tasks, self.out_features = self.inner.tasks, self.inner.out_features

    def common(self, x: Float[Array, "batch in"], context: Context = Context()) -> Any:
        return self.inner.common(self.gated(x, context), context.stream("inner"))

    def head(self, task: str, common: Any) -> Float[Array, "batch hidden"]:
        return self.inner.head(task, common)

    def gated(self, x: Float[Array, "batch in"], context: Context) -> Float[Array, "batch in"]:
        """The input of the inner strategy."""
        embedding = by_row(self.embedding[...], domains_of(context))
        x = x.astype(embedding.dtype)
        return x * self.gate(jnp.concatenate([embedding, jax.lax.stop_gradient(x)], axis=-1))

    def link(self):
        return self.inner.link()

    def regulariser(self):
        return self.inner.regulariser()

    def row_regulariser(self, common):
        return self.inner.row_regulariser(common)

    def gates(self, x, context=Context()):
        return self.inner.gates(self.gated(x, context), context.stream("inner"))

    def gate_members(self):
        return self.inner.gate_members()


def _taken(inner: Callable[..., Strategy], offered: dict[str, Any]) -> dict[str, Any]:
    """What of the offered arguments the constructor takes."""
    parameters = parameters_of(inner)
    asked = parameters.get("prior_features")
    if asked is not None and asked.default is inspect.Parameter.empty and offered["prior_features"] is None:
        name = getattr(getattr(inner, "func", inner), "__name__", "inner")
        raise ConfigError(
            f"there is no prior, and '{name}' reads one; expected prior_features, its width. Name the features that make it"
        )
    kind = inner
    while isinstance(kind, functools.partial):  # a rate that is given here takes the place of one that is bound
        kind = kind.func
    return {name: value for name, value in offered.items() if name in parameters_of(kind) and value is not None}
