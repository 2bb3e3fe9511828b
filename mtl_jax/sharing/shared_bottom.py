"""SharedBottom: one network for all tasks."""

from collections.abc import Sequence

from flax import nnx
from jaxtyping import Array, Float

from mtl_jax.nn import MLP
from mtl_jax.sharing.base import Context, Strategy


class SharedBottom(Strategy):
    r"""Hard parameter sharing, :math:`z_k = f(x)` for every task k.

    Args:
      in_features: Width of x.
      tasks: Task names.
      units: Layer widths of f (ReLU after each); empty gives z = x.
      dropout: Rate after each layer, in [0, 1).
      rngs: Initialisation.

    Labels: f is ``shared``.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from mtl_jax.sharing import SharedBottom
      >>> strategy = SharedBottom(16, ("click", "buy"), units=(32, 8), rngs=nnx.Rngs(0))
      >>> {task: z.shape for task, z in strategy(jnp.ones((5, 16))).items()}
      {'click': (5, 8), 'buy': (5, 8)}

    References:
      Caruana, *Multitask Learning*, Machine Learning, 1997.
    """

    def __init__(
        self,
        in_features: int,
        tasks: Sequence[str],
        *,
        units: Sequence[int] = (512, 256),
        dropout: float = 0.2,
        rngs: nnx.Rngs,
    ):
        self.tasks = tuple(tasks)
        self.bottom = MLP(in_features, units, dropout=dropout, rngs=rngs)
        self.out_features = self.bottom.out_features

    def common(self, x: Float[Array, "batch in"], context: Context = Context()) -> Float[Array, "batch hidden"]:
        return self.bottom(x, context)

    def head(self, task: str, common: Float[Array, "batch hidden"]) -> Float[Array, "batch hidden"]:
        return common
