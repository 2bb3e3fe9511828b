"""HAMUR: a network of the row's domain, with adapters whose weights follow from the row."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from mtl_jax.arguments import check_count, check_counts, shown
from mtl_jax.errors import ConfigError
from mtl_jax.nn import MLP, Linear
from mtl_jax.nn.domain_linear import DomainLinear, domains_of
from mtl_jax.nn.mlp import dropout as drop
from mtl_jax.nn.mlp import dropout_rate
from mtl_jax.nn.partitioned_norm import PartitionedNorm
from mtl_jax.sharing.base import Context, Strategy


class HAMUR(Strategy):
    r"""Hyper adapters for multi-domain recommendation.

    Every domain m has an MLP of its own. After chosen layers stands an adapter, whose weights a shared network makes from
    the row:

    .. math::
        I(x) &= \operatorname{reshape}(\operatorname{MLP}_{\mathrm{hyper}}(x) A + a) \in \mathbb{R}^{k \times k} \\
        o &= \sigma(h\, U_1 I(x) V_1 + b_1)\, U_2 I(x) V_2 + b_2 \\
        h &\leftarrow \operatorname{PN}_m(o) + h

    with partitioned normalisation PN (:class:`mtl_jax.nn.partitioned_norm.PartitionedNorm`). The adapters' weights are
    never formed: a row is multiplied by U, by its I and by V in turn. :math:`z_k` is h after the last layer.

    Args:
      in_features: Width of x.
      tasks: Task names.
      num_domains: M.
      units: Layer widths of every domain's MLP (ReLU after each).
      adapter_layers: The layers, counted from 0, after which an adapter stands; None: all.
      adapter_width: Hidden units of an adapter.
      rank: k.
      hyper_units: Layer widths of MLP_hyper (ReLU after each).
      dropout: Rate after each layer of the domains' MLPs, before the adapter, in [0, 1).
      rngs: Initialisation; U and V are Glorot-uniform.

    Raises:
      ConfigError: An adapter is to stand after a layer that is not there, or ``context.domain`` is None.

    Labels: all parameters are ``shared``, for a domain is no task. The moments are no parameters.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from mtl_jax.nn import Context
      >>> from mtl_jax.sharing import HAMUR
      >>> strategy = HAMUR(16, ("click", "buy"), num_domains=3, units=(32, 8), rank=4, rngs=nnx.Rngs(0))
      >>> context = Context(domain=jnp.array([0, 2, 1, 1, 0]))
      >>> {task: z.shape for task, z in strategy(jnp.ones((5, 16)), context).items()}
      {'click': (5, 8), 'buy': (5, 8)}

    References:
      Li, Yan, Zhao, Wang, Chen, Guo, Tang, *HAMUR: Hyper Adapter for Multi-Domain Recommendation*, CIKM 2023,
      arXiv 2309.06217. Public code starts U and V from ones, so that adapters begin with rank one, and normalises by
      moments of the batch in evaluation too.
    """

    widths = ("units", "adapter_width", "hyper_units")

    def __init__(
        self,
        in_features: int,
        tasks: Sequence[str],
        *,
        num_domains: int,
        units: Sequence[int] = (256, 128),
        adapter_layers: Sequence[int] | None = None,
        adapter_width: int = 32,
        rank: int = 35,
        hyper_units: Sequence[int] = (64,),
        dropout: float = 0.2,
        rngs: nnx.Rngs,
    ):
        self.tasks = tuple(tasks)
        check_counts(units, "units", empty=False)
        check_count(adapter_width, "adapter_width")
        check_count(rank, "rank")
        chosen = range(len(units)) if adapter_layers is None else adapter_layers
        if len({*chosen}) != len(chosen) or not {*chosen} <= {*range(len(units))}:
            raise ConfigError(
                f"adapter_layers is {shown(adapter_layers)}; expected different layers from 0 to {len(units) - 1}. "
                "Change it"
            )
        widths = (in_features, *units)
        self.layers = nnx.List(
            [DomainLinear(num_domains, i, o, rngs=rngs) for i, o in zip(widths[:-1], widths[1:], strict=True)]
        )
        self.adapter_layers = tuple(sorted(chosen))
        self.adapters = nnx.List(
            [_Adapter(units[index], adapter_width, rank, num_domains, rngs) for index in self.adapter_layers]
        )
        self.hyper = MLP(in_features, hyper_units, rngs=rngs) if self.adapter_layers else None
        self.instance = Linear(self.hyper.out_features, rank**2, rngs=rngs) if self.adapter_layers else None
        self.dropout, self.rank = dropout_rate(dropout), rank
        self.out_features = units[-1]

    def common(self, x: Float[Array, "batch in"], context: Context = Context()) -> Float[Array, "batch hidden"]:
        domain, instance = domains_of(context), None
        if self.adapter_layers:
            instance = self.instance(self.hyper(x)).reshape(-1, self.rank, self.rank)
        for index, layer in enumerate(self.layers):
            x = drop(nnx.relu(layer(x, domain)), self.dropout, context.stream(f"layer {index}"))
            if index in self.adapter_layers:
                x = x + self.adapters[self.adapter_layers.index(index)](x, instance, context)
        return x

    def head(self, task: str, common: Float[Array, "batch hidden"]) -> Float[Array, "batch hidden"]:
        return common


class _Adapter(nnx.Module):
    """What is added to a layer's output."""

    def __init__(self, features, width, rank, num_domains, rngs):
        init = nnx.initializers.glorot_uniform()

        def drawn(*shape):
            return nnx.Param(init(rngs.params(), shape))

        self.into, self.narrow, self.narrow_bias = (
            drawn(features, rank),
            drawn(rank, width),
            nnx.Param(jnp.zeros(width)),
        )
        self.back, self.wide, self.wide_bias = drawn(width, rank), drawn(rank, features), nnx.Param(jnp.zeros(features))
        self.norm = PartitionedNorm(features, num_domains, rngs=rngs)

    def __call__(
        self, h: Float[Array, "batch features"], instance: Float[Array, "batch rank rank"], context: Context
    ) -> Float[Array, "batch features"]:
        hidden = jax.nn.sigmoid(_through(h, self.into, instance, self.narrow) + self.narrow_bias[...])
        return self.norm(_through(hidden, self.back, instance, self.wide) + self.wide_bias[...], context)


def _through(h, first: nnx.Param, instance, second: nnx.Param) -> Float[Array, "batch out"]:
    return jnp.einsum("bi,bij->bj", h @ first[...], instance) @ second[...]
