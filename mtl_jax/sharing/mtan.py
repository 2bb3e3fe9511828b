"""MTAN: a shared trunk, of which every task attends to what it needs."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from mtl_jax.arguments import check_counts
from mtl_jax.errors import ConfigError
from mtl_jax.nn import Linear, dropout
from mtl_jax.nn.mlp import NORMS, dropout_rate
from mtl_jax.sharing.base import Context, SharedParameters, Strategy, by_task


class MTANCommon(NamedTuple):
    """What the tasks read from the shared part: both outputs of every trunk layer, and the layers between their masks."""

    inner: list[Float[Array, "batch hidden"]]
    outer: list[Float[Array, "batch hidden"]]
    between: list[SharedParameters]


class MTAN(Strategy):
    r"""Multi-task attention network, with dense layers in place of convolutions.

    A trunk for all tasks, and a mask of each task on every level of it:

    .. math::
        u^l &= \operatorname{ReLU}(p^{l-1} W_u^l + b_u^l), \qquad p^l = \operatorname{ReLU}(u^l W_p^l + b_p^l) \\
        m_k^l &= \sigma(N(\operatorname{ReLU}(N(v_k^l W_{1,k}^l)) W_{2,k}^l)), \qquad a_k^l = m_k^l \odot p^l \\
        v_k^1 &= u^1, \qquad v_k^l = [u^l;\, \operatorname{ReLU}(a_k^{l-1} W_r^l + b_r^l)]

    with :math:`p^0 = x` and :math:`z_k = a_k^L`.

    Args:
      in_features: Width of x.
      tasks: Task names.
      units: Width of u^l and p^l, for each level.
      norm: N, ``layer`` or ``none``. (The paper's is a batch norm over images.)
      dropout: Rate after each trunk layer, in [0, 1).
      rngs: Initialisation.

    Labels: the trunk and the layers W_r between two masks are ``shared``, the masks ``task/<name>``.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from mtl_jax.sharing import MTAN
      >>> strategy = MTAN(16, ("click", "buy"), units=(32, 8), rngs=nnx.Rngs(0))
      >>> {task: z.shape for task, z in strategy(jnp.ones((5, 16))).items()}
      {'click': (5, 8), 'buy': (5, 8)}

    References:
      Liu, Johns, Davison, *End-to-End Multi-Task Learning with Attention*, CVPR 2019. The width inside a mask is that of
      p^l (ours).
    """

    def __init__(
        self,
        in_features: int,
        tasks: Sequence[str],
        *,
        units: Sequence[int] = (512, 256),
        norm: str = "layer",
        dropout: float = 0.2,
        rngs: nnx.Rngs,
    ):
        self.tasks = tuple(tasks)
        check_counts(units, "units", empty=False)
        if norm not in NORMS:
            raise ConfigError(f"norm is '{norm}'; expected one of {list(NORMS)}. Change it")
        inputs = (in_features, *units[:-1])
        self.inner = nnx.List([Linear(i, width, rngs=rngs) for i, width in zip(inputs, units, strict=True)])
        self.outer = nnx.List([Linear(width, width, rngs=rngs) for width in units])
        self.between = nnx.List([Linear(i, o, rngs=rngs) for i, o in zip(units[:-1], units[1:], strict=True)])

        def masks(task: str, rngs: nnx.Rngs) -> nnx.List:
            read = [units[0], *(2 * width for width in units[1:])]
            return nnx.List([_Mask(i, width, norm, rngs) for i, width in zip(read, units, strict=True)])

        self.task = by_task(self.tasks, masks, rngs)
        self.dropout = dropout_rate(dropout)
        self.out_features = units[-1]

    def common(self, x: Float[Array, "batch in"], context: Context = Context()) -> MTANCommon:
        inner, outer = [], []
        for index, (first, second) in enumerate(zip(self.inner, self.outer, strict=True)):
            u = dropout(nnx.relu(first(x)), self.dropout, context.stream(f"inner {index}"))
            x = dropout(nnx.relu(second(u)), self.dropout, context.stream(f"outer {index}"))
            inner.append(u)
            outer.append(x)
        between = [SharedParameters((layer.kernel[...], layer.bias[...])) for layer in self.between]
        return MTANCommon(inner, outer, between)

    def head(self, task: str, common: MTANCommon) -> Float[Array, "batch hidden"]:
        return self._levels(task, common)[-1][1]

    def _levels(self, task: str, common: MTANCommon) -> list[tuple[Array, Array]]:
        """The mask and what it leaves, for each level."""
        found: list[tuple[Array, Array]] = []
        for index, mask in enumerate(self.task[task]):
            v = common.inner[index]
            if index:
                kernel, bias = common.between[index - 1].values
                v = jnp.concatenate([v, nnx.relu(found[-1][1] @ kernel + bias)], axis=-1)
            m = mask(v)
            found.append((m, m * common.outer[index]))
        return found

    def gates(self, x, context=Context()):
        common = self.common(x)
        return {
            f"{task}/level {index + 1}": mask
            for task in self.tasks
            for index, (mask, _) in enumerate(self._levels(task, common))
        }

    def gate_members(self):
        return {
            f"{task}/level {index + 1}": tuple(f"unit {unit}" for unit in range(layer.bias.shape[0]))
            for task in self.tasks
            for index, layer in enumerate(self.outer)
        }


class _Mask(nnx.Module):
    """Two layers that end in a sigmoid; without a bias where the norm has one."""

    def __init__(self, in_features: int, width: int, norm: str, rngs: nnx.Rngs):
        normed = norm == "layer"
        self.first = Linear(in_features, width, use_bias=not normed, rngs=rngs)
        self.second = Linear(width, width, use_bias=not normed, rngs=rngs)
        self.norms = nnx.List([nnx.LayerNorm(width, epsilon=1e-5, rngs=rngs) for _ in range(2 * normed)])

    def __call__(self, v: Float[Array, "batch in"]) -> Float[Array, "batch hidden"]:
        first, second = self.norms if len(self.norms) else (lambda x: x,) * 2
        return jax.nn.sigmoid(second(self.second(nnx.relu(first(self.first(v))))))
