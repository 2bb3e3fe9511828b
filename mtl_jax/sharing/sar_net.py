"""SAR-Net: shared experts and experts of the row's domain, behind a transform of the input by domain."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from mtl_jax.arguments import check_count
from mtl_jax.errors import ConfigError
from mtl_jax.nn import MLP, BatchNorm, StackedLinear, mix
from mtl_jax.nn.domain_linear import DomainLinear, by_row, domain_linear, domains_of
from mtl_jax.sharing.base import Context, Strategy


class SARNet(Strategy):
    r"""Scenario-aware ranking network, for inputs without sequences.

    The row's domain m scales and shifts the input, gates, and adds experts of its own to the shared ones:

    .. math::
        u &= x \odot w_m + c_m \\
        z_k &= \operatorname{MLP}\Big( \operatorname{softmax}(u G_m) \cdot
               [E_{s,1}(\hat u); \dots; E_{s,m_s}(\hat u);\, E_{m,1}(\hat u); \dots; E_{m,m_d}(\hat u)] \Big)

    Experts E are linear layers of :math:`\hat u`, which is u after batch normalisation. At the start :math:`w_m = 1` and
    :math:`c_m = 0`.

    Args:
      in_features: Width of x.
      tasks: Task names.
      num_domains: M.
      num_shared: Experts that all domains share, m_s.
      num_specific: Experts of each domain, m_d.
      expert_width: Outputs of an expert.
      units: Layer widths of the MLP (ReLU after each) on the mixture; empty gives the mixture.
      dropout: Rate after each layer of the MLP, in [0, 1).
      rngs: Initialisation.

    Raises:
      ConfigError: There is no expert at all, or ``context.domain`` is None.

    Labels: all parameters are ``shared``, for a domain is no task. The moments are no parameters.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from mtl_jax.nn import Context
      >>> from mtl_jax.sharing import SARNet
      >>> strategy = SARNet(16, ("click", "buy"), num_domains=3, num_shared=2, units=(8,), rngs=nnx.Rngs(0))
      >>> context = Context(domain=jnp.array([0, 2, 1, 1, 0]))
      >>> {task: z.shape for task, z in strategy(jnp.ones((5, 16)), context).items()}
      {'click': (5, 8), 'buy': (5, 8)}
      >>> strategy.gate_members()["all/gate"]
      ('shared 0', 'shared 1', 'own 0', 'own 1')

    References:
      Shen, Tao, Zhang, Wen, Chen, Lu, *SAR-Net: A Scenario-Aware Ranking Network for Personalized Fair Recommendation in
      Hundreds of Travel Scenarios*, CIKM 2021, arXiv 2110.06475. The gate is one of each domain, as in the paper; public
      code has one gate for all. The paper's attention over sequences is an encoder's business, its correction for manual
      traffic that of row weights.
    """

    widths = ("expert_width", "units")

    def __init__(
        self,
        in_features: int,
        tasks: Sequence[str],
        *,
        num_domains: int,
        num_shared: int = 8,
        num_specific: int = 2,
        expert_width: int = 16,
        units: Sequence[int] = (32, 32),
        dropout: float = 0.2,
        rngs: nnx.Rngs,
    ):
        self.tasks = tuple(tasks)
        check_count(num_domains, "num_domains")
        check_count(num_shared, "num_shared", least=0)
        check_count(num_specific, "num_specific", least=0)
        check_count(expert_width, "expert_width")
        if num_shared == num_specific == 0:
            raise ConfigError("num_shared and num_specific are both 0; expected at least one expert. Change one")
        self.scale = nnx.Param(jnp.ones((num_domains, in_features)))
        self.shift = nnx.Param(jnp.zeros((num_domains, in_features)))
        self.norm = BatchNorm(in_features, rngs=rngs)

        def bank(number: int) -> StackedLinear | None:
            return StackedLinear(number, in_features, expert_width, rngs=rngs) if number else None

        self.shared, self.specific = bank(num_shared), bank(num_domains * num_specific)  # of a domain side by side
        self.gate = DomainLinear(num_domains, in_features, num_shared + num_specific, use_bias=False, rngs=rngs)
        self.network = MLP(expert_width, units, dropout=dropout, rngs=rngs)
        self.num_shared, self.num_specific = num_shared, num_specific
        self.out_features = self.network.out_features

    def common(self, x: Float[Array, "batch in"], context: Context = Context()) -> Float[Array, "batch hidden"]:
        domain = domains_of(context)
        u = self._transformed(x, domain)
        normed, banks = self.norm(u, context), []
        if self.shared is not None:
            banks.append(self.shared(normed))
        if self.specific is not None:
            banks.append(self._specific(normed, domain))
        return self.network(mix(self._weights(u, domain), *banks), context)

    def _transformed(self, x: Float[Array, "batch in"], domain: Int[Array, " batch"]) -> Float[Array, "batch in"]:
        return x.astype(self.scale.dtype) * by_row(self.scale[...], domain) + by_row(self.shift[...], domain)

    def _weights(self, u: Float[Array, "batch in"], domain: Int[Array, " batch"]) -> Float[Array, "batch expert"]:
        return jax.nn.softmax(self.gate(u, domain), axis=-1)

    def _specific(self, u: Float[Array, "batch in"], domain: Int[Array, " batch"]) -> Float[Array, "expert batch out"]:
        """The experts of each row's domain, as one layer of the domain with their outputs side by side."""
        kernel, bias, number = self.specific.kernel[...], self.specific.bias[...], self.num_specific
        kernel = kernel.reshape(-1, number, *kernel.shape[1:]).swapaxes(1, 2)
        kernel = kernel.reshape(*kernel.shape[:2], -1)
        outputs = domain_linear(u, kernel, bias.reshape(len(kernel), -1), domain)
        return outputs.reshape(len(u), number, -1).swapaxes(0, 1)

    def head(self, task: str, common: Float[Array, "batch hidden"]) -> Float[Array, "batch hidden"]:
        return common

    def gates(self, x, context=Context()):
        domain = domains_of(context)
        return {"all/gate": self._weights(self._transformed(x, domain), domain)}

    def gate_members(self):
        shared, own = (
            tuple(f"{kind} {index}" for index in range(number))
            for kind, number in (("shared", self.num_shared), ("own", self.num_specific))
        )
        return {"all/gate": shared + own}
