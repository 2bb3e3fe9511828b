"""CGC: shared experts and each task's own, one gate per task."""

from collections.abc import Callable, Mapping, Sequence

from flax import nnx

from mtl_jax.nn import Gate
from mtl_jax.sharing.ple import PLE


class CGC(PLE):
    r"""Customized gate control: PLE with a single level.

    .. math::
        z_k = g_k(x) \cdot [E_k(x);\, E_s(x)]

    Args:
      in_features: Width of x.
      tasks: Task names.
      expert_units: Layer widths of every expert (ReLU after each); the last one is the width of z_k.
      num_specific: Experts of a task, or a mapping from tasks to numbers; 0 gives MMoE.
      num_shared: Shared experts; 0 shares nothing but the input.
      dropout: Rate after each expert layer, in [0, 1).
      gate: ``(in_features, num_members, *, rngs) -> module``, once per task.
      rngs: Initialisation.

    Labels: a task's experts and gate are ``task/<name>``, the others ``shared``.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from mtl_jax.sharing import CGC
      >>> strategy = CGC(16, ("click", "buy"), expert_units=(32, 8), num_shared=2, rngs=nnx.Rngs(0))
      >>> {task: z.shape for task, z in strategy(jnp.ones((5, 16))).items()}
      {'click': (5, 8), 'buy': (5, 8)}

    References:
      Tang, Liu, Zhao, Gong, *Progressive Layered Extraction (PLE): A Novel Multi-Task Learning Model for Personalized
      Recommendations*, RecSys 2020. Public code means different things by "number of experts": the sum, half of it for
      either kind, or a list; here there are two numbers.
    """

    widths = ("expert_units",)

    def __init__(
        self,
        in_features: int,
        tasks: Sequence[str],
        *,
        expert_units: Sequence[int] = (512, 256),
        num_specific: int | Mapping[str, int] = 1,
        num_shared: int = 1,
        dropout: float = 0.2,
        gate: Callable[..., nnx.Module] = Gate,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            in_features,
            tasks,
            levels=(expert_units,),
            num_specific=num_specific,
            num_shared=num_shared,
            dropout=dropout,
            gate=gate,
            rngs=rngs,
        )
