"""MMoE: shared experts, one gate per task."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from mtl_jax.nn import Experts, Gate, mix
from mtl_jax.sharing.base import Context, Strategy, by_task, head_context


class MMoECommon(NamedTuple):
    """What the tasks read from the shared part. The gates read ``x`` too, so it belongs to the cut."""

    x: Float[Array, "batch in"]
    experts: Float[Array, "expert batch hidden"]
    key: PRNGKeyArray | None


class MMoE(Strategy):
    r"""Multi-gate mixture of experts.

    Task k mixes E shared experts with a gate of its own:

    .. math::
        z_k = \sum_{e=1}^{E} \operatorname{softmax}(x W_k)_e \, f_e(x)

    Args:
      in_features: Width of ``x``.
      tasks: Task names, in any order.
      num_experts: E.
      expert_units: Layer widths of every expert f_e (ReLU after each); the last one is the width of z_k.
      dropout: Rate after each expert layer, in [0, 1).
      gate: ``(in_features, num_members, *, rngs) -> module``, once per task; with ``functools.partial(Gate, ...)`` it has
        hidden layers, a bias, a temperature, a norm or dropout.
      rngs: Initialisation; needs the stream ``params``.

    Labels: the experts are ``shared``, each gate is ``task/<name>``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> from mtl_jax.sharing import MMoE
      >>> strategy = MMoE(16, ("click", "buy"), num_experts=4, expert_units=(32, 8), rngs=nnx.Rngs(0))
      >>> {task: z.shape for task, z in strategy(jnp.ones((5, 16))).items()}
      {'click': (5, 8), 'buy': (5, 8)}

    References:
      Ma, Zhao, Yi, Chen, Hong, Chi, *Modeling Task Relationships in Multi-task Learning with Multi-gate
      Mixture-of-Experts*, KDD 2018. The gate is the paper's: one linear layer without bias, no normalisation and no
      dropout inside the softmax (some libraries have both, and their numbers differ).
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
        self.out_features = self.experts.out_features
        self.task = by_task(self.tasks, lambda task, rngs: gate(in_features, num_experts, rngs=rngs), rngs)

    def common(self, x: Float[Array, "batch in"], context: Context = Context()) -> MMoECommon:
        return MMoECommon(x, self.experts(x, context), context.rngs if context.train else None)

    def head(self, task: str, common: MMoECommon) -> Float[Array, "batch hidden"]:
        return mix(self.task[task](common.x, head_context(common.key, task)), common.experts)

    def gates(self, x, context=Context()):
        return {f"{task}/gate": self.task[task](x) for task in self.tasks}

    def gate_members(self):
        return dict.fromkeys(
            (f"{task}/gate" for task in self.tasks), tuple(f"expert {e}" for e in range(self.experts.num_experts))
        )
