"""AdaTTSp: AdaTT without a shared module."""

from collections.abc import Callable, Mapping, Sequence

from flax import nnx

from mtl_jax.nn import Gate
from mtl_jax.sharing.adatt import AdaTT


class AdaTTSp(AdaTT):
    """Adaptive task-to-task fusion between the experts of the tasks alone: :class:`mtl_jax.sharing.AdaTT` with
    ``num_shared=0``.

    Args:
      in_features: Width of x.
      tasks: Task names.
      levels: Layer widths of an expert (ReLU after each), for each level.
      num_specific: Experts of a task, >= 1, or a mapping from tasks to numbers.
      native_residual: Whether a task adds its own experts once more; essential in the paper, False for ablation.
      dropout: Rate after each expert layer, in [0, 1).
      gate: ``(in_features, num_members, *, rngs) -> module``.
      rngs: Initialisation.

    Labels: as in AdaTT.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from mtl_jax.sharing import AdaTTSp
      >>> strategy = AdaTTSp(16, ("click", "buy"), levels=((32,), (8,)), rngs=nnx.Rngs(0))
      >>> {task: z.shape for task, z in strategy(jnp.ones((5, 16))).items()}
      {'click': (5, 8), 'buy': (5, 8)}

    References:
      Li, Zhang, Liu et al., *AdaTT: Adaptive Task-to-Task Fusion Network for Multitask Learning in Recommendations*,
      KDD 2023.
    """

    def __init__(
        self,
        in_features: int,
        tasks: Sequence[str],
        *,
        levels: Sequence[Sequence[int]] = ((512,), (256,)),
        num_specific: int | Mapping[str, int] = 1,
        native_residual: bool = True,
        dropout: float = 0.2,
        gate: Callable[..., nnx.Module] = Gate,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            in_features,
            tasks,
            levels=levels,
            num_specific=num_specific,
            num_shared=0,
            native_residual=native_residual,
            dropout=dropout,
            gate=gate,
            rngs=rngs,
        )
