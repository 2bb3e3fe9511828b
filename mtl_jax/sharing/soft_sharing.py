"""SoftSharing: a network a task, whose parameters are pulled towards each other."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from mtl_jax.arguments import check_number
from mtl_jax.sharing.single_task import SingleTask


class SoftSharing(SingleTask):
    r"""Networks of one shape, :math:`z_k = f_k(x)`, on shared tables, with a penalty on the distance between them:

    .. math::
        R = \alpha \sum_{j<k} \lVert \theta_j - \theta_k \rVert^2
          = \alpha K \sum_k \lVert \theta_k - \bar\theta \rVert^2

    over corresponding arrays of the networks; towers and tables stay out of it.

    Args:
      in_features: Width of x.
      tasks: Task names.
      units: Layer widths of every f_k (ReLU after each).
      dropout: Rate after each layer, in [0, 1).
      strength: α >= 0. The paper tunes it; the default is ours.
      rngs: Initialisation.

    Labels: f_k is ``task/<name>``. The penalty couples the networks, outside of balancing.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from mtl_jax.sharing import SoftSharing
      >>> strategy = SoftSharing(16, ("click", "buy"), units=(32, 8), rngs=nnx.Rngs(0))
      >>> {task: z.shape for task, z in strategy(jnp.ones((5, 16))).items()}
      {'click': (5, 8), 'buy': (5, 8)}

    References:
      Duong, Cohn, Bird, Cook, *Low Resource Dependency Parsing: Cross-lingual Parameter Sharing in a Neural Network
      Parser*, ACL 2015; as a baseline in Ma et al., KDD 2018 (MMoE). The sum of squares, not the norm: its gradient at
      equal networks is 0 and not undefined.
    """

    def __init__(
        self,
        in_features: int,
        tasks: Sequence[str],
        *,
        units: Sequence[int] = (512, 256),
        dropout: float = 0.2,
        strength: float = 1e-3,
        rngs: nnx.Rngs,
    ):
        super().__init__(in_features, tasks, units=units, dropout=dropout, share_embeddings=True, rngs=rngs)
        check_number(strength, "strength", least=0.0)
        self.strength = strength

    def regulariser(self) -> Float[Array, ""]:
        networks = [nnx.to_pure_dict(nnx.state(self.task[task], nnx.Param)) for task in self.tasks]
        stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays).astype(jnp.float32), *networks)
        apart = [jnp.sum((array - array.mean(axis=0)) ** 2) for array in jax.tree.leaves(stacked)]
        return self.strength * len(self.tasks) * sum(apart)
