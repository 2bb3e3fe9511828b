"""AdaptDHM: rows find their cluster, whose weights multiply the shared ones."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from mtl_jax.arguments import check_count, check_number
from mtl_jax.nn.state import State
from mtl_jax.sharing.base import Context, Strategy
from mtl_jax.sharing.star import StarNetwork


class AdaptDHM(Strategy):
    r"""Adaptive distribution hierarchical model: clusters of rows take the place of given domains.

    Centres :math:`c_j` of norm 1 move in training, and rows go to the cluster of the largest membership:

    .. math::
        r &= \operatorname{softmax}(x C^\top), \qquad
        C \leftarrow \operatorname{unit}(\beta C + (1 - \beta)\, r^\top x) \quad \text{(repeated)} \\
        h^l &= \operatorname{ReLU}(h^{l-1} (W^l \odot W_j^l) + b^l + b_j^l), \qquad
        j = \operatorname{arg\,max} r, \quad h^0 = x, \quad z_k = h^L

    j follows from the memberships of the last repetition. Sums are over the rows of all devices, weighted by
    ``context.weight``. Evaluation compares with the stored centres and leaves them. No gradient passes through the routing.
    At the start :math:`W_j = 1` and :math:`b_j = 0`.

    Args:
      in_features: Width of x.
      tasks: Task names.
      num_clusters: C.
      units: Layer widths (ReLU after each).
      beta: Share of the old centre in the new one, in [0, 1].
      repeats: How often memberships and centres are computed in a step.
      dropout: Rate after each layer, in [0, 1).
      rngs: Initialisation; centres are uniform on the sphere.

    Labels: all parameters are ``shared``. The centres are no parameters; they are saved with the model.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from mtl_jax.sharing import AdaptDHM
      >>> strategy = AdaptDHM(16, ("click", "buy"), num_clusters=3, units=(32, 8), rngs=nnx.Rngs(0))
      >>> {task: z.shape for task, z in strategy(jnp.ones((5, 16))).items()}
      {'click': (5, 8), 'buy': (5, 8)}

    References:
      Li, Zheng, Liu, Lu, Wu, Hu, *AdaptDHM: Adaptive Distribution Hierarchical Model for Multi-Domain CTR
      Prediction*, arXiv 2211.12105, 2022. Public code does not save the centres, and has biases of clusters that nothing
      reads.
    """

    def __init__(
        self,
        in_features: int,
        tasks: Sequence[str],
        *,
        num_clusters: int = 3,
        units: Sequence[int] = (256, 128, 64),
        beta: float = 0.9,
        repeats: int = 3,
        dropout: float = 0.2,
        rngs: nnx.Rngs,
    ):
        self.tasks = tuple(tasks)
        check_count(num_clusters, "num_clusters")
        check_count(repeats, "repeats")
        check_number(beta, "beta", least=0.0, most=1.0)
        self.network = StarNetwork(in_features, units, num_clusters, dropout=dropout, rngs=rngs)
        drawn = jax.random.normal(rngs.params(), (num_clusters, in_features))
        self.centres = State(drawn / jnp.linalg.norm(drawn, axis=1, keepdims=True))
        self.beta, self.repeats = beta, repeats
        self.out_features = self.network.out_features

    def common(self, x: Float[Array, "batch in"], context: Context = Context()) -> Float[Array, "batch hidden"]:
        return self.network(x, self._clusters(x, context), context)

    def _clusters(self, x: Float[Array, "batch in"], context: Context) -> Int[Array, " batch"]:
        x = lax.stop_gradient(x.astype(jnp.promote_types(x.dtype, jnp.float32)))
        centres = self.centres[...].astype(x.dtype)
        scores = _scores(x, centres)
        if context.train:
            weight = jnp.ones(len(x), x.dtype) if context.weight is None else lax.stop_gradient(context.weight)
            for repeat in range(self.repeats):
                scores = _scores(x, centres) if repeat else scores
                membership = jax.nn.softmax(scores, axis=-1) * weight.astype(x.dtype)[:, None]
                pull = jnp.einsum("bc,bd->cd", membership, x, precision=lax.Precision.HIGHEST)
                pull = pull if context.axis is None else lax.psum(pull, context.axis)
                target = self.beta * centres + (1 - self.beta) * pull
                length = jnp.linalg.norm(target, axis=1, keepdims=True)
                centres = jnp.where(length > 0, target / jnp.where(length > 0, length, 1), centres)
            self.centres[...] = centres.astype(self.centres.dtype)
        return jnp.argmax(scores, axis=-1)

    def head(self, task: str, common: Float[Array, "batch hidden"]) -> Float[Array, "batch hidden"]:
        return common

    def gates(self, x, context=Context()):
        clusters = self._clusters(x, context._replace(train=False))
        return {"all/cluster": jax.nn.one_hot(clusters, len(self.centres[...]))}

    def gate_members(self):
        return {"all/cluster": tuple(f"cluster {index}" for index in range(self.centres.shape[0]))}


def _scores(x: Float[Array, "batch in"], centres: Float[Array, "cluster in"]) -> Float[Array, "batch cluster"]:
    """Similarities with the centres, precise enough that a row finds the same cluster on every device."""
    return jnp.einsum("bd,cd->bc", x, centres, precision=lax.Precision.HIGHEST)
