"""OMoE: shared experts, one gate for all tasks."""

from collections.abc import Callable, Sequence

from flax import nnx
from jaxtyping import Array, Float

from mtl_jax.nn import Experts, Gate, mix
from mtl_jax.sharing.base import Context, Strategy


class OMoE(Strategy):
    r"""One-gate mixture of experts: every task reads the same mixture.

    .. math::
        z_k = \sum_{e=1}^{E} \operatorname{softmax}(x W)_e \, f_e(x) \quad \text{for all } k

    Args:
      in_features: Width of x.
      tasks: Task names.
      num_experts: E.
      expert_units: Layer widths of every expert f_e (ReLU after each); the last one is the width of z.
      dropout: Rate after each expert layer, in [0, 1).
      gate: ``(in_features, num_members, *, rngs) -> module``.
      rngs: Initialisation.

    Labels: gate and experts are ``shared``.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from mtl_jax.sharing import OMoE
      >>> strategy = OMoE(16, ("click", "buy"), num_experts=4, expert_units=(32, 8), rngs=nnx.Rngs(0))
      >>> {task: z.shape for task, z in strategy(jnp.ones((5, 16))).items()}
      {'click': (5, 8), 'buy': (5, 8)}

    References:
      The baseline in Ma, Zhao, Yi, Chen, Hong, Chi, *Modeling Task Relationships in Multi-task Learning with Multi-gate
      Mixture-of-Experts*, KDD 2018.
    """

    widths = ("expert_units",)

    def __init__(
        self,
        in_features: int,
        tasks: Sequence[str],
        *,
        num_experts: int = 8,
        expert_units: Sequence[int] = (512, 256),
        dropout: float = 0.2,
        gate: Callable[..., nnx.Module] = Gate,
        rngs: nnx.Rngs,
    ):
        self.tasks = tuple(tasks)
        self.experts = Experts(in_features, expert_units, num_experts=num_experts, dropout=dropout, rngs=rngs)
        self.gate = gate(in_features, num_experts, rngs=rngs)
        self.out_features = self.experts.out_features

    def common(self, x: Float[Array, "batch in"], context: Context = Context()) -> Float[Array, "batch hidden"]:
        return mix(self.gate(x, context.stream("gate")), self.experts(x, context))

    def head(self, task: str, common: Float[Array, "batch hidden"]) -> Float[Array, "batch hidden"]:
        return common

    def gates(self, x, context=Context()):
        return {"all/gate": self.gate(x)}

    def gate_members(self):
        return {"all/gate": tuple(f"expert {index}" for index in range(self.experts.num_experts))}
