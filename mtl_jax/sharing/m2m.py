"""M2M: layers whose weights are generated from the domain."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from mtl_jax.arguments import check_count, check_counts, check_number
from mtl_jax.nn import MLP, Experts, Linear, mix
from mtl_jax.nn.domain_linear import by_row, domain_linear, domains_of
from mtl_jax.sharing.base import Context, SharedParameters, Strategy, by_task
from mtl_jax.sharing.star import domain_embedding


class M2MCommon(NamedTuple):
    """What the tasks read from the shared part.

    Attributes:
      experts: Their outputs f_e(x).
      asked: What the attention makes of these, before a task is added.
      scenario: s.
      meta: The shared layers that every task applies to features of its own.
    """

    experts: Float[Array, "expert batch hidden"]
    asked: Float[Array, "expert batch attention"]
    scenario: Float[Array, "batch scenario"]
    meta: SharedParameters


class M2M(Strategy):
    r"""Multi-scenario multi-task meta learning: the domain generates the layers that join experts and tasks.

    With s an MLP of the domain's embedding, t_k an MLP of the task's, both ending in a ReLU, and φ a leaky ReLU:

    .. math::
        \operatorname{Meta}(v; s) &= v\, W(s) + b(s), \qquad W(s) = s A + a, \quad b(s) = s C + c \\
        \alpha_k &= \operatorname{softmax}_e\, \nu \cdot \varphi(\operatorname{Meta}_{att}([f_e(x);\, t_k]; s)), \qquad
        r_k = \sum_e \alpha_{k,e} f_e(x) \\
        z_k &= \varphi(\operatorname{Meta}_{tow}(r_k; s) + r_k)

    Args:
      in_features: Width of x.
      tasks: Task names.
      num_domains: M.
      num_experts: E.
      expert_units: Layer widths of every expert f_e (ReLU after each); the last one is H, the width of z_k.
      embedding_features: Width of a domain's embedding.
      domain_units: Layer widths of the MLP that makes s.
      task_features: Width of a task's embedding.
      task_units: Layer widths of the MLP that makes t_k, before a last one of H.
      slope: Of φ below 0.
      dropout: Rate after each expert layer, in [0, 1).
      rngs: Initialisation. Generated weights start close to a, which is Glorot-uniform (ours).

    Raises:
      ConfigError: ``context.domain`` is None.

    Labels: the embedding of a task is ``task/<name>``, all else ``shared``.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from mtl_jax.sharing import Context, M2M
      >>> strategy = M2M(16, ("click", "buy"), num_domains=3, expert_units=(32, 8), rngs=nnx.Rngs(0))
      >>> outputs = strategy(jnp.ones((5, 16)), Context(domain=jnp.array([0, 1, 2, 0, 1])))
      >>> {task: z.shape for task, z in outputs.items()}
      {'click': (5, 8), 'buy': (5, 8)}

    References:
      Zhang, Liao, Liu, Xu, Zheng, *Leaving No One Behind: A Multi-Scenario Multi-Task Meta Learning Approach for Advertiser
      Modeling*, WSDM 2022, arXiv 2201.06814. Its transformers over sequences are a matter of ``history`` here. Public code
      sends rows through one, which then attend to the others of their batch, and takes the domain for the task.
    """

    widths = ("expert_units", "domain_units", "task_units")

    def __init__(
        self,
        in_features: int,
        tasks: Sequence[str],
        *,
        num_domains: int,
        num_experts: int = 4,
        expert_units: Sequence[int] = (16,),
        embedding_features: int = 16,
        domain_units: Sequence[int] = (16,),
        task_features: int = 16,
        task_units: Sequence[int] = (),
        slope: float = 0.1,
        dropout: float = 0.2,
        rngs: nnx.Rngs,
    ):
        self.tasks = tuple(tasks)
        check_count(num_domains, "num_domains")
        check_count(task_features, "task_features")
        check_counts(domain_units, "domain_units")
        check_counts(task_units, "task_units")
        check_number(slope, "slope", least=0.0)
        self.experts = Experts(in_features, expert_units, num_experts=num_experts, dropout=dropout, rngs=rngs)
        hidden = self.experts.out_features
        self.embedding = domain_embedding(num_domains, embedding_features, rngs=rngs)
        self.scenario = MLP(embedding_features, domain_units, rngs=rngs)
        of_scenario = self.scenario.out_features
        self.of_experts = _MetaUnit(of_scenario, hidden, 2 * hidden, rngs=rngs)
        self.meta = _Meta(of_scenario, task_features, task_units, hidden, rngs=rngs)
        init = nnx.initializers.normal(task_features**-0.5)
        self.task = by_task(
            self.tasks,
            lambda task, rngs: nnx.Dict({"embedding": nnx.Param(init(rngs.params(), (task_features,)))}),
            rngs,
        )
        self.out_features, self.slope = hidden, slope

    def common(self, x: Float[Array, "batch in"], context: Context = Context()) -> M2MCommon:
        domain = domains_of(context)
        experts = self.experts(x, context.stream("experts"))
        s = self.scenario(self.embedding[...])
        rows = experts.reshape(-1, self.out_features)
        asked = domain_linear(rows, *self.of_experts.generate(s), jnp.tile(domain, len(experts)))
        asked = asked.reshape(*experts.shape[:2], -1)
        return M2MCommon(experts, asked, by_row(s, domain), SharedParameters(nnx.state(self.meta)))

    def head(self, task: str, common: M2MCommon) -> Float[Array, "batch hidden"]:
        r = mix(self._attention(task, common), common.experts)
        return nnx.leaky_relu(self._meta(common).tower(r, common.scenario) + r, self.slope)

    def _attention(self, task: str, common: M2MCommon) -> Float[Array, "batch expert"]:
        """What a task takes from which expert."""
        meta = self._meta(common)
        t = meta.view(self.task[task]["embedding"][...])
        hidden = nnx.leaky_relu(common.asked + meta.of_task(t, common.scenario), self.slope)
        return jax.nn.softmax(meta.nu(hidden)[..., 0].T, axis=-1)

    def _meta(self, common: M2MCommon) -> "_Meta":
        return nnx.merge(nnx.graphdef(self.meta), common.meta.values)

    def gates(self, x, context=Context()):
        common = self.common(x, context._replace(train=False))
        return {f"{task}/attention": self._attention(task, common) for task in self.tasks}

    def gate_members(self):
        members = tuple(f"expert {e}" for e in range(self.experts.num_experts))
        return dict.fromkeys((f"{task}/attention" for task in self.tasks), members)


class _Meta(nnx.Module):
    """The shared layers that read what is a task's: its embedding, and its mixture of experts."""

    def __init__(self, of_scenario, task_features, task_units, hidden, rngs):
        self.view = MLP(task_features, (*task_units, hidden), rngs=rngs)
        self.of_task = _MetaUnit(of_scenario, hidden, 2 * hidden, use_bias=False, rngs=rngs)
        self.nu = Linear(2 * hidden, 1, use_bias=False, rngs=rngs)
        self.tower = _MetaUnit(of_scenario, hidden, hidden, rngs=rngs)


class _MetaUnit(nnx.Module):
    """A layer whose weights are a linear function of s. The attention on a pair has two, one for each half of the pair."""

    def __init__(self, of_scenario: int, in_features: int, out_features: int, *, use_bias: bool = True, rngs: nnx.Rngs):
        init = nnx.initializers.glorot_uniform()  # of s too: it counts into the fans
        self.kernel = nnx.Param(init(rngs.params(), (of_scenario, in_features, out_features)))
        self.kernel_bias = nnx.Param(init(rngs.params(), (in_features, out_features)))
        self.bias = Linear(of_scenario, out_features, rngs=rngs) if use_bias else None

    def generate(self, s: Float[Array, "n scenario"]) -> tuple[Float[Array, "n in out"], Float[Array, "n out"]]:
        """W(s) and b(s)."""
        return jnp.einsum("ns,sio->nio", s, self.kernel[...]) + self.kernel_bias[...], self.bias(s)

    def __call__(self, v: Float[Array, "*batch in"], s: Float[Array, "batch scenario"]) -> Float[Array, "batch out"]:
        """For a v of each row, or one for all. No row is given a kernel of its own: products with v or s come first."""
        if v.ndim == 1:
            generated = s @ jnp.einsum("i,sio->so", v, self.kernel[...])
        else:
            generated = jnp.einsum("bsi,sio->bo", s[:, :, None] * v[:, None], self.kernel[...])
        y = generated + v @ self.kernel_bias[...]
        return y if self.bias is None else y + self.bias(s)
