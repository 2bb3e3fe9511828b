"""STEM: tables and experts of every task, and shared ones, which all tasks read and their own task alone trains."""

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


class STEMCommon(NamedTuple):
    """What the tasks read besides their own experts.

    Attributes:
      x: The inputs, which own experts and gates read.
      specific: Outputs of the experts of all tasks, in the order of the tasks; without a gradient where that is stopped.
      shared: Outputs of the shared experts.
      key: Of the dropout in the heads.
    """

    x: Float[Array, "batch input in"]
    specific: Float[Array, "expert batch hidden"]
    shared: Float[Array, "expert batch hidden"]
    key: PRNGKeyArray | None


class STEM(Strategy):
    r"""Shared and task-specific embeddings: every task has tables of its own beside the shared ones.

    Experts E_k of task k read the input x_k from its own tables, E_s the shared input x_s. A task weighs all of them, and
    trains those of other tasks no more than their tables:

    .. math::
        z_k = g_k(x_k + x_s) \cdot [\operatorname{sg}(E_j(x_j)),\, j \ne k;\, E_k(x_k);\, E_s(x_s)]

    Members of a gate are the experts of all tasks in the order of the tasks, each in its place, then the shared ones.

    Args:
      in_features: Width of each input.
      tasks: Task names.
      expert_units: Layer widths of every expert (ReLU after each); the last one is the width of z_k.
      num_specific: Experts of a task, or a mapping from tasks to numbers.
      num_shared: Shared experts.
      stop_cross: Whether gradients stop at other tasks' experts. Without the stop every task trains all experts, and the
        own tables of all tasks.
      dropout: Rate after each expert layer, in [0, 1).
      gate: ``(in_features, num_members, *, rngs) -> module``, once per task.
      rngs: Initialisation.

    Raises:
      ConfigError: A number of experts does not fit; or x has not one input for each task and one more.

    Labels: a task's experts and gate are ``task/<name>``, and so are its tables; shared experts are ``shared``. Without
    ``stop_cross`` all experts are ``shared``, and all tables ``embedding``.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from mtl_jax.sharing import STEM
      >>> strategy = STEM(16, ("click", "buy"), expert_units=(32, 8), rngs=nnx.Rngs(0))
      >>> {task: z.shape for task, z in strategy(jnp.ones((5, 3, 16))).items()}
      {'click': (5, 8), 'buy': (5, 8)}

    References:
      Su et al., *STEM: Unleashing the Power of Embeddings for Multi-task Recommendation*, AAAI 2024, arXiv 2308.13537. One
      level, as in its experiments; with more, shared streams would read all experts, and every task would train all tables.
    """

    private_tables = True
    shared_tables = True
    widths = ("expert_units",)

    def __init__(
        self,
        in_features: int,
        tasks: Sequence[str],
        *,
        expert_units: Sequence[int] = (512, 256),
        num_specific: int | Mapping[str, int] = 1,
        num_shared: int = 1,
        stop_cross: bool = True,
        dropout: float = 0.2,
        gate: Callable[..., nnx.Module] = Gate,
        rngs: nnx.Rngs,
    ):
        self.tasks = tuple(tasks)
        self.reads_all_tables = not stop_cross
        self.num_specific = specific_counts(num_specific, self.tasks)
        for number in self.num_specific:
            check_count(number, "num_specific")
        check_count(num_shared, "num_shared")

        def bank(number: int, rngs: nnx.Rngs) -> Experts:
            return Experts(in_features, expert_units, num_experts=number, dropout=dropout, rngs=rngs)

        numbers = dict(zip(self.tasks, self.num_specific, strict=True))
        self.shared = bank(num_shared, rngs)
        self.specific = None if stop_cross else nnx.List([bank(number, rngs) for number in self.num_specific])

        def own(task: str, rngs: nnx.Rngs) -> nnx.Dict:
            parts = {"gate": gate(in_features, sum(self.num_specific) + num_shared, rngs=rngs)}
            return nnx.Dict(parts | ({"experts": bank(numbers[task], rngs)} if stop_cross else {}))

        self.task = by_task(self.tasks, own, rngs)
        self.out_features = self.shared.out_features

    def common(self, x: Float[Array, "batch input in"], context: Context = Context()) -> STEMCommon:
        if x.ndim != 3 or x.shape[1] != len(self.tasks) + 1:
            raise ConfigError(
                f"the input has the shape {x.shape}; expected [batch, {len(self.tasks) + 1}, in], one of each task and a "
                "shared one. Look them up in private and in shared tables"
            )
        key = context.rngs if context.train else None
        specific = jnp.concatenate([self._experts(task, x, key) for task in self.tasks])
        if self.specific is None:
            specific = jax.lax.stop_gradient(specific)
        return STEMCommon(x, specific, self.shared(x[:, -1], context.stream("shared")), key)

    def head(self, task: str, common: STEMCommon) -> Float[Array, "batch hidden"]:
        weights = self._gate(task, common.x, head_context(common.key, task))
        if self.specific is not None:
            return mix(weights, common.specific, common.shared)
        index = self.tasks.index(task)
        start = sum(self.num_specific[:index])
        before, after = common.specific[:start], common.specific[start + self.num_specific[index] :]
        return mix(weights, before, self._experts(task, common.x, common.key), after, common.shared)

    def _experts(self, task: str, x: Array, key: PRNGKeyArray | None) -> Float[Array, "expert batch hidden"]:
        """Outputs of a task's experts: the same wherever they are computed, dropout included."""
        index = self.tasks.index(task)
        experts = self.task[task]["experts"] if self.specific is None else self.specific[index]
        return experts(x[:, index], head_context(key, task).stream("experts"))

    def _gate(self, task: str, x: Array, context: Context = Context()) -> Float[Array, "batch member"]:
        return self.task[task]["gate"](x[:, self.tasks.index(task)] + x[:, -1], context.stream("gate"))

    def gates(self, x, context=Context()):
        return {f"{task}/gate": self._gate(task, x) for task in self.tasks}

    def gate_members(self):
        numbers = zip(self.tasks, self.num_specific, strict=True)
        members = [f"{task} {i}" for task, number in numbers for i in range(number)]
        members += [f"shared {i}" for i in range(self.shared.num_experts)]
        return dict.fromkeys((f"{task}/gate" for task in self.tasks), tuple(members))
