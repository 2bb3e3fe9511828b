"""DSelectK: shared experts, of which every task selects at most k, by gates with a derivative."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from mtl_jax.arguments import check_count, check_number
from mtl_jax.errors import ConfigError
from mtl_jax.nn import Experts, mix
from mtl_jax.sharing.base import Context, Strategy, by_task


class DSelectKCommon(NamedTuple):
    """What the tasks read from the shared part."""

    x: Float[Array, "batch in"]
    experts: Float[Array, "expert batch hidden"]


class DSelectK(Strategy):
    r"""Mixture of experts with a sparse gate for each task.

    A gate mixes s selectors, each of which encodes one expert in binary:

    .. math::
        q^k(x) &= \sum_{i=1}^{s} \operatorname{softmax}(x U + c)_i \; r\bigl(S(x V_i + d_i)\bigr), \qquad
        r(y)_e = \prod_{t} y_t^{\mathrm{bit}_t(e)} (1 - y_t)^{1 - \mathrm{bit}_t(e)} \\
        z_k &= \sum_e q^k_e(x) \, f_e(x)

    with a smooth step S that is exactly 0 below -γ/2 and exactly 1 above γ/2, so a selector ends with one expert. Its
    regulariser is, for every task, λ times the mean entropy of r over rows and selectors, plus the mean of
    :math:`1/\sum_{e<E} r_e` where E is no power of two, which keeps selectors away from codes without an expert.

    Args:
      in_features: Width of x.
      tasks: Task names.
      num_experts: E.
      expert_units: Layer widths of every expert f_e (ReLU after each).
      num_selected: s, the largest number of experts that a task ends with.
      gamma: γ > 0.
      entropy: λ >= 0.
      per_example: Whether a gate looks at x; else it is the same for all rows (biases c and d alone).
      dropout: Rate after each expert layer, in [0, 1).
      rngs: Initialisation.

    Labels: experts are ``shared``, gates ``task/<name>``.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from mtl_jax.sharing import DSelectK
      >>> strategy = DSelectK(16, ("click", "buy"), num_experts=4, expert_units=(32, 8), rngs=nnx.Rngs(0))
      >>> {task: z.shape for task, z in strategy(jnp.ones((5, 16))).items()}
      {'click': (5, 8), 'buy': (5, 8)}

    References:
      Hazimeh, Zhao, Chowdhery, Sathiamoorthy, Chen, Mazumder, Hong, Chi, *DSelect-k: Differentiable Selection in the
      Mixture of Experts with Applications to Multi-Task Learning*, NeurIPS 2021.
    """

    widths = ("expert_units",)

    def __init__(
        self,
        in_features: int,
        tasks: Sequence[str],
        *,
        num_experts: int = 8,
        expert_units: Sequence[int] = (512, 256),
        num_selected: int = 2,
        gamma: float = 1.0,
        entropy: float = 1e-6,
        per_example: bool = True,
        dropout: float = 0.2,
        rngs: nnx.Rngs,
    ):
        self.tasks = tuple(tasks)
        check_number(entropy, "entropy", least=0.0)
        self.experts = Experts(in_features, expert_units, num_experts=num_experts, dropout=dropout, rngs=rngs)
        inputs = in_features if per_example else 0
        self.task = by_task(
            self.tasks, lambda task, rngs: SparseGate(inputs, num_experts, num_selected, gamma=gamma, rngs=rngs), rngs
        )
        self.entropy = entropy
        self.out_features = self.experts.out_features

    def common(self, x: Float[Array, "batch in"], context: Context = Context()) -> DSelectKCommon:
        return DSelectKCommon(x, self.experts(x, context))

    def head(self, task: str, common: DSelectKCommon) -> Float[Array, "batch hidden"]:
        return mix(self.task[task](common.x), common.experts)

    def row_regulariser(self, common: DSelectKCommon) -> Float[Array, " batch"]:
        penalties = [self.task[task].penalty(common.x, self.entropy) for task in self.tasks]
        return jnp.sum(jnp.stack(penalties), axis=0)

    def gates(self, x, context=Context()):
        return {f"{task}/gate": self.task[task](x) for task in self.tasks}

    def gate_members(self):
        return dict.fromkeys(
            (f"{task}/gate" for task in self.tasks), tuple(f"expert {e}" for e in range(self.experts.num_experts))
        )


class SparseGate(nnx.Module):
    """The gate of one task.

    Args:
      in_features: Width of x; 0 makes a gate that does not look at it.
      num_members: E.
      num_selected: s.
      gamma: γ > 0.
      rngs: Initialisation: codes uniform within γ/100 of 0, where the smooth step has its full slope.
    """

    def __init__(self, in_features: int, num_members: int, num_selected: int, *, gamma: float, rngs: nnx.Rngs):
        check_count(num_selected, "num_selected")
        check_number(gamma, "gamma", least=0.0)
        if gamma == 0:
            raise ConfigError("gamma is 0; expected a number > 0. Change it")
        bits = math.ceil(math.log2(num_members)) if num_members > 1 else 0

        def uniform(bound: float, *shape: int) -> nnx.Param:
            return nnx.Param(jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound))

        self.selector = uniform(0.05, in_features, num_selected) if in_features else None
        self.selector_bias = uniform(0.05, num_selected)
        self.code = uniform(gamma / 100, num_selected, in_features, bits) if in_features else None
        self.code_bias = uniform(gamma / 100, num_selected, bits)
        self.gamma, self.num_members = gamma, num_members

    def __call__(self, x: Float[Array, "batch in"]) -> Float[Array, "batch expert"]:
        scores = self.selector_bias[...]
        if self.selector is not None:
            scores = x.astype(self.selector.dtype) @ self.selector[...] + scores
        selected = self.codes(x)[..., : self.num_members]
        weights = jnp.einsum("...s,...se->...e", jax.nn.softmax(scores, axis=-1), selected)
        return jnp.broadcast_to(weights, (x.shape[0], self.num_members))

    def codes(self, x: Float[Array, "batch in"]) -> Float[Array, "*batch selector code"]:
        """r of every selector, over all 2^bits codes; without a batch axis where the gate does not look at x."""
        t = self.code_bias[...]
        if self.code is not None:
            t = jnp.einsum("bi,sit->bst", x.astype(self.code.dtype), self.code[...]) + t
        y = smooth_step(t, self.gamma)
        codes = np.arange(2 ** y.shape[-1])[:, None] >> np.arange(y.shape[-1]) & 1
        factors = jnp.where(codes, y[..., None, :], 1 - y[..., None, :])
        return jnp.prod(factors, axis=-1)

    def penalty(self, x: Float[Array, "batch in"], entropy: float) -> Float[Array, " batch"]:
        """The regulariser of each row."""
        codes = self.codes(x).astype(jnp.float32)
        r = codes[..., : self.num_members]
        safe = jnp.where(r > 0, r, 1)  # the derivative of r log r has no limit at 0, where the gate has none left
        total = entropy * jnp.mean(-jnp.sum(safe * jnp.log(safe), axis=-1), axis=-1)
        if codes.shape[-1] > self.num_members:
            total = total + jnp.mean(1 / jnp.sum(r, axis=-1), axis=-1)
        return jnp.broadcast_to(total, x.shape[:1])


def smooth_step(t: Float[Array, "*shape"], gamma: float) -> Float[Array, "*shape"]:
    """0 up to -γ/2, 1 from γ/2 on, and a cubic in between with a continuous derivative."""
    t = jnp.clip(t, -gamma / 2, gamma / 2)
    return -2 * t**3 / gamma**3 + 3 * t / (2 * gamma) + 0.5
