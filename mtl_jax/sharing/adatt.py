"""AdaTT: experts of tasks, fused from task to task, each with a residual of the task's own."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from mtl_jax.arguments import check_count
from mtl_jax.errors import ConfigError
from mtl_jax.nn import Experts, Gate, mix
from mtl_jax.sharing.base import Context, Strategy, by_task, head_context
from mtl_jax.sharing.ple import specific_counts


class AdaTTCommon(NamedTuple):
    """What the tasks read from the shared part: the streams that their last gates look at (one, x, where there is a single
    level), the outputs of the last level's experts, and the key of the heads."""

    streams: list[Float[Array, "batch in"]]
    experts: Float[Array, "expert batch hidden"]
    key: PRNGKeyArray | None


class AdaTT(Strategy):
    r"""Adaptive task-to-task fusion network.

    At level j every task fuses the experts of all tasks and the shared ones, and adds its own once more:

    .. math::
        x_k^j = g_k^j(x_k^{j-1}) \cdot [E_1^j(x_1^{j-1});\, \dots;\, E_K^j(x_K^{j-1});\, E_s^j(x_s^{j-1})]
            + \sum_i v_{k,i}^j \, E_{k,i}^j(x_k^{j-1})

    with :math:`x_k^0 = x_s^0 = x` and :math:`z_k = x_k^L`. The shared module fuses in the same way, except in the last
    level. v is 1 if every module has one expert, else learned.

    Args:
      in_features: Width of x.
      tasks: Task names.
      levels: Layer widths of an expert (ReLU after each), for each level.
      num_specific: Experts of a task, >= 1, or a mapping from tasks to numbers.
      num_shared: Experts of the shared module; 0 is AdaTT-sp.
      native_residual: Whether v is there; essential in the paper, False for ablation.
      dropout: Rate after each expert layer, in [0, 1).
      gate: ``(in_features, num_members, *, rngs) -> module``.
      rngs: Initialisation.

    Labels: a task's gate and v of the last level are ``task/<name>``, all else, all experts too, is ``shared``.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from mtl_jax.sharing import AdaTT
      >>> strategy = AdaTT(16, ("click", "buy"), levels=((32,), (8,)), rngs=nnx.Rngs(0))
      >>> {task: z.shape for task, z in strategy(jnp.ones((5, 16))).items()}
      {'click': (5, 8), 'buy': (5, 8)}

    References:
      Li, Zhang, Liu et al., *AdaTT: Adaptive Task-to-Task Fusion Network for Multitask Learning in Recommendations*,
      KDD 2023.
    """

    widths = ("levels",)

    def __init__(
        self,
        in_features: int,
        tasks: Sequence[str],
        *,
        levels: Sequence[Sequence[int]] = ((512,), (256,)),
        num_specific: int | Mapping[str, int] = 1,
        num_shared: int = 1,
        native_residual: bool = True,
        dropout: float = 0.2,
        gate: Callable[..., nnx.Module] = Gate,
        rngs: nnx.Rngs,
    ):
        self.tasks = tuple(tasks)
        check_count(num_shared, "num_shared", least=0)
        if not levels:
            raise ConfigError("levels is empty; expected at least one level. Add one")
        self.numbers = (*specific_counts(num_specific, self.tasks), *([num_shared] if num_shared else []))
        if 0 in self.numbers:
            raise ConfigError("num_specific is 0 for a task; expected at least one expert. Change it")
        self.num_levels, self.native_residual = len(levels), native_residual
        self.experts, gates, residuals = nnx.List([]), [], []
        learned = native_residual and max(self.numbers) > 1
        for units in levels:
            bank = Experts(in_features, units, num_experts=sum(self.numbers), dropout=dropout, rngs=rngs)
            self.experts.append(bank)
            if len(self.experts) < len(levels):
                gates.append(nnx.List([gate(in_features, sum(self.numbers), rngs=rngs) for _ in self.numbers]))
                if learned:
                    residuals.append(nnx.List([nnx.Param(_residual(number, rngs)) for number in self.numbers]))
                in_features = bank.out_features
        self.gate_levels, self.residuals = nnx.List(gates), nnx.List(residuals)

        def last(task: str, rngs: nnx.Rngs) -> nnx.Dict:
            parts = {"gate": gate(in_features, sum(self.numbers), rngs=rngs)}
            if learned:
                parts["residual"] = nnx.Param(_residual(self.numbers[self.tasks.index(task)], rngs))
            return nnx.Dict(parts)

        self.task = by_task(self.tasks, last, rngs)
        self.out_features = levels[-1][-1]

    def common(self, x: Float[Array, "batch in"], context: Context = Context()) -> AdaTTCommon:
        streams, outputs, _ = self._levels(x, context)
        return AdaTTCommon(streams, outputs, context.rngs if context.train else None)

    def _levels(self, x, context: Context) -> tuple[list[Array], Array, list[list[Array]]]:
        """The last streams, the outputs of the last experts, and the weights of the gates below, level by level."""
        streams, found = [x], []
        for index, experts in enumerate(self.experts):
            inner = context.stream(f"level {index}")
            read = (
                x
                if index == 0
                else jnp.stack([s for s, n in zip(streams, self.numbers, strict=True) for _ in range(n)])
            )
            outputs = experts(read, inner)
            if index == self.num_levels - 1:
                return streams[: len(self.tasks)], outputs, found
            fused, weights = [], []
            for module in range(len(self.numbers)):
                gate = self.gate_levels[index][module]
                weights.append(gate(streams[0 if index == 0 else module], inner.stream(f"gate {module}")))
                learned = self.residuals[index][module][...] if len(self.residuals) else None
                fused.append(self._fused(module, weights[-1], outputs, learned))
            streams = fused
            found.append(weights)

    def _fused(self, module: int, weights, outputs, learned) -> Float[Array, "batch hidden"]:
        mixed = mix(weights, outputs)
        if not self.native_residual:
            return mixed
        start = sum(self.numbers[:module])
        own = outputs[start : start + self.numbers[module]]
        return mixed + (own.sum(axis=0) if learned is None else jnp.einsum("e,ebh->bh", learned, own))

    def _last_gate(self, task: str, common: AdaTTCommon) -> Float[Array, "batch expert"]:
        index = self.tasks.index(task)
        x = common.streams[0 if self.num_levels == 1 else index]
        return self.task[task].gate(x, head_context(common.key, task))

    def head(self, task: str, common: AdaTTCommon) -> Float[Array, "batch hidden"]:
        own = self.task[task]
        learned = own.residual[...] if "residual" in own else None
        return self._fused(self.tasks.index(task), self._last_gate(task, common), common.experts, learned)

    def gates(self, x, context=Context()):
        streams, outputs, found = self._levels(x, Context())
        names = (*self.tasks, "shared")
        weights = {
            f"{name}/level {index + 1}": one
            for index, level in enumerate(found)
            for name, one in zip(names, level, strict=False)
        }
        common = AdaTTCommon(streams, outputs, None)
        return weights | {f"{task}/level {self.num_levels}": self._last_gate(task, common) for task in self.tasks}

    def gate_members(self):
        names = (*self.tasks, "shared")
        members = tuple(f"{name} {i}" for name, n in zip(names, self.numbers, strict=False) for i in range(n))
        below = [(name, index) for index in range(self.num_levels - 1) for name in names[: len(self.numbers)]]
        last = [(task, self.num_levels - 1) for task in self.tasks]
        return {f"{name}/level {index + 1}": members for name, index in below + last}


def _residual(number: int, rngs: nnx.Rngs) -> Float[Array, " expert"]:
    bound = number**-0.5
    return jax.random.uniform(rngs.params(), (number,), minval=-bound, maxval=bound)
