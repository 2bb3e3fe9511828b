"""MMoE: shared experts, one gate per task."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from mtl_jax.nn import Experts, Gate, stream
from mtl_jax.sharing.base import Context, Strategy


class MMoECommon(NamedTuple):
    """What the tasks read from the shared part. The gates read ``x`` too, so it belongs to the cut."""

    x: Float[Array, "batch in"]
    experts: Float[Array, "expert batch hidden"]


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

    def __init__(
        self,
        in_features: int,
        tasks: Sequence[str],
        *,
        num_experts: int = 8,
        expert_units: Sequence[int] = (512, 256),
        dropout: float = 0.2,
        rngs: nnx.Rngs,
    ):
        self.tasks = tuple(tasks)
        self.experts = Experts(in_features, expert_units, num_experts=num_experts, dropout=dropout, rngs=rngs)
        self.out_features = self.experts.out_features
        key = rngs.params()

        def gate(task: str) -> Gate:  # initialised from its name, so that it does not depend on the other tasks
            return Gate(in_features, num_experts, rngs=nnx.Rngs(params=stream(key, task)))

        self.task = nnx.Dict({task: gate(task) for task in self.tasks})

    def common(self, x: Float[Array, "batch in"], context: Context = Context()) -> MMoECommon:
        return MMoECommon(x, self.experts(x, context))

    def head(self, task: str, common: MMoECommon) -> Float[Array, "batch hidden"]:
        gate = self.task[task](common.x)
        return jnp.einsum("be,ebh->bh", gate, common.experts)
