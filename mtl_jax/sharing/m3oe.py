"""M3oE: experts of all, of every domain and of every task, behind a layer with a partition a domain."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from mtl_jax.arguments import check_count
from mtl_jax.nn import MLP, Experts, mix
from mtl_jax.nn.domain_linear import domain_linear, domains_of
from mtl_jax.sharing.base import Context, SharedParameters, Strategy, by_task
from mtl_jax.sharing.star import StarLinear


class M3oECommon(NamedTuple):
    """What the tasks read from the shared part.

    Attributes:
      u: What gates read, and no gradient passes through.
      shared: Outputs of the shared experts.
      of_domain: What the experts of the domains add, the same for every task.
      of_tasks: Outputs of the experts of the tasks.
      scalars: a_t and b_t, before the sigmoid.
      domain: Domain ids.
    """

    u: Float[Array, "batch hidden"]
    shared: Float[Array, "expert batch out"]
    of_domain: Float[Array, "batch out"]
    of_tasks: Float[Array, "task batch out"]
    scalars: SharedParameters
    domain: Int[Array, " batch"]


class M3oE(Strategy):
    r"""Multi-domain multi-task mixture of experts.

    A layer whose weights are a common part times one of the domain m, and a detour around it:

    .. math::
        u = \psi(x\,(W \odot W_m) + b + b_m) + \psi'(x)

    with ψ and ψ' linear, layer norm, ReLU. Three groups of experts read u: S_e are shared, D_j is that of domain j, T_j
    that of task j. What belongs to others counts too, with the weight that its own leaves:

    .. math::
        z_k = g_{k,m}(\operatorname{sg}(u)) \cdot S(u)
        + a_d \Big[b_d D_m + \tfrac{1-b_d}{M-1} \sum_{j \ne m} D_j\Big]
        + a_t \Big[b_t T_k + \tfrac{1-b_t}{K-1} \sum_{j \ne k} T_j\Big]

    where a and b are sigmoids of scalars that start at 1. With one domain, or one task, there are no others.

    Args:
      in_features: Width of x.
      tasks: Task names.
      num_domains: M.
      num_experts: E.
      star_units: Width of the layer with W.
      hidden_units: Width of u.
      expert_units: Layer widths of every expert (ReLU after each); the last one is the width of z_k.
      dropout: Rate after each expert layer, in [0, 1).
      rngs: Initialisation; W_m starts at 1.

    Raises:
      ConfigError: ``context.domain`` is None.

    Labels: the gates are ``task/<name>``. The experts of tasks are ``shared``, because every task reads them all.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from mtl_jax.sharing import Context, M3oE
      >>> strategy = M3oE(16, ("click", "buy"), num_domains=3, expert_units=(32, 8), rngs=nnx.Rngs(0))
      >>> outputs = strategy(jnp.ones((5, 16)), Context(domain=jnp.array([0, 1, 2, 0, 1])))
      >>> {task: z.shape for task, z in outputs.items()}
      {'click': (5, 8), 'buy': (5, 8)}

    References:
      Zhang et al., *M3oE: Multi-Domain Multi-Task Mixture-of-Experts Recommendation Framework*, SIGIR 2024, arXiv
      2404.18465. The scalars are ordinary parameters; the paper's search on two levels is not there. Public code divides by
      a temperature that decays in every forward pass, evaluation too; a port of it leaves out the experts of the tasks.
    """

    widths = ("star_units", "hidden_units", "expert_units")

    def __init__(
        self,
        in_features: int,
        tasks: Sequence[str],
        *,
        num_domains: int,
        num_experts: int = 4,
        star_units: int = 512,
        hidden_units: int = 256,
        expert_units: Sequence[int] = (512, 256),
        dropout: float = 0.2,
        rngs: nnx.Rngs,
    ):
        self.tasks = tuple(tasks)
        check_count(num_domains, "num_domains")
        check_count(star_units, "star_units")
        check_count(hidden_units, "hidden_units")
        self.star = StarLinear(in_features, star_units, num_domains, rngs=rngs)
        self.psi = MLP(star_units, (hidden_units,), norm="layer", rngs=rngs)
        self.detour = MLP(in_features, (hidden_units,), norm="layer", rngs=rngs)

        def bank(number: int) -> Experts:
            return Experts(hidden_units, expert_units, num_experts=number, dropout=dropout, rngs=rngs)

        self.shared, self.of_domains, self.of_tasks = bank(num_experts), bank(num_domains), bank(len(self.tasks))
        self.a_d, self.a_t, self.b_d, self.b_t = (nnx.Param(jnp.ones(())) for _ in range(4))
        self.task = by_task(
            self.tasks, lambda task, rngs: _DomainGate(num_domains, hidden_units, num_experts, rngs=rngs), rngs
        )
        self.out_features = self.shared.out_features

    def common(self, x: Float[Array, "batch in"], context: Context = Context()) -> M3oECommon:
        domain = domains_of(context)
        u = self.psi(self.star(x, domain)) + self.detour(x)
        own = jax.nn.one_hot(domain, self.of_domains.num_experts, dtype=u.dtype)
        weights = _weights(own, self.a_d[...], self.b_d[...])
        return M3oECommon(
            u,
            self.shared(u, context.stream("shared")),
            mix(weights, self.of_domains(u, context.stream("domains"))),
            self.of_tasks(u, context.stream("tasks")),
            SharedParameters((self.a_t[...], self.b_t[...])),
            domain,
        )

    def head(self, task: str, common: M3oECommon) -> Float[Array, "batch out"]:
        gate = self.task[task](jax.lax.stop_gradient(common.u), common.domain)
        own = jax.nn.one_hot(self.tasks.index(task), len(self.tasks), dtype=common.u.dtype)
        of_tasks = jnp.einsum("k,kbh->bh", _weights(own, *common.scalars.values), common.of_tasks)
        return mix(gate, common.shared) + common.of_domain + of_tasks

    def gates(self, x, context=Context()):
        common = self.common(x, context._replace(train=False))
        return {f"{task}/gate": self.task[task](common.u, common.domain) for task in self.tasks}

    def gate_members(self):
        members = tuple(f"expert {e}" for e in range(self.shared.num_experts))
        return dict.fromkeys((f"{task}/gate" for task in self.tasks), members)


def _weights(own: Float[Array, "*batch n"], a: Float[Array, ""], b: Float[Array, ""]) -> Float[Array, "*batch n"]:
    """a times b for the own expert, and a times an equal share of 1 - b for each of the others."""
    a, b = jax.nn.sigmoid(a), jax.nn.sigmoid(b)
    others = max(own.shape[-1] - 1, 1)
    return a * (b * own + (1 - b) / others * (1 - own))


class _DomainGate(nnx.Module):
    """A softmax gate for every domain, linear and without bias."""

    def __init__(self, num_domains: int, in_features: int, num_members: int, *, rngs: nnx.Rngs):
        init = nnx.initializers.glorot_uniform(batch_axis=(0,))
        self.kernel = nnx.Param(init(rngs.params(), (num_domains, in_features, num_members)))

    def __call__(self, u: Float[Array, "batch in"], domain: Int[Array, " batch"]) -> Float[Array, "batch member"]:
        return jax.nn.softmax(domain_linear(u, self.kernel[...], None, domain), axis=-1)
