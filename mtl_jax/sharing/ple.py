"""PLE: levels of experts, shared ones and each task's, which become more and more the task's own."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from mtl_jax.arguments import check_count, shown
from mtl_jax.errors import ConfigError
from mtl_jax.nn import Experts, Gate, mix
from mtl_jax.sharing.base import Context, Strategy, by_task, head_context


class PLECommon(NamedTuple):
    """What the tasks read from the shared part.

    Attributes:
      inputs: What the first gates that are a task's own read: the input of the last level but one, or of the only one. A
        list with one for each task where these differ.
      lower: Outputs of all experts of the last level but one; None with one level.
      shared: Outputs of the last level's shared experts; None where there are none.
      key: Of the dropout in the heads.
    """

    inputs: Float[Array, "batch in"] | list[Float[Array, "batch in"]]
    lower: Float[Array, "expert batch hidden"] | None
    shared: Float[Array, "expert batch hidden"] | None
    key: PRNGKeyArray | None


class PLE(Strategy):
    r"""Progressive layered extraction.

    Level j has experts of every task, which read the task's stream, and shared ones, which read the shared stream:

    .. math::
        x_k^j &= g_k^j(x_k^{j-1}) \cdot [E_k^j(x_k^{j-1});\, E_s^j(x_s^{j-1})] \\
        x_s^j &= g_s^j(x_s^{j-1}) \cdot [E_1^j(x_1^{j-1});\, \dots;\, E_K^j(x_K^{j-1});\, E_s^j(x_s^{j-1})]

    with :math:`x_k^0 = x_s^0 = x` and :math:`z_k = x_k^L`. The last level has no shared stream.

    Args:
      in_features: Width of x.
      tasks: Task names.
      levels: Layer widths of an expert (ReLU after each), for each level.
      num_specific: Experts of a task: a number, one a level, or a mapping from tasks to numbers in either place.
      num_shared: Shared experts: a number, or one a level.
      dropout: Rate after each expert layer, in [0, 1).
      gate: ``(in_features, num_members, *, rngs) -> module``.
      rngs: Initialisation.

    Raises:
      ConfigError: A task would have no expert at all to read, or the numbers do not fit levels and tasks.

    Labels: shared experts and shared gates are ``shared``, and so are the tasks' experts below the last level, because the
    shared stream reads them. A task's experts of the last level and its gates of the last two are ``task/<name>``.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from mtl_jax.sharing import PLE
      >>> strategy = PLE(16, ("click", "buy"), levels=((32,), (8,)), rngs=nnx.Rngs(0))
      >>> {task: z.shape for task, z in strategy(jnp.ones((5, 16))).items()}
      {'click': (5, 8), 'buy': (5, 8)}

    References:
      Tang, Liu, Zhao, Gong, *Progressive Layered Extraction (PLE): A Novel Multi-Task Learning Model for Personalized
      Recommendations*, RecSys 2020. Public code differs: without a shared stream, with shared gates over shared experts
      alone, or with one more shared gate after the last level, which nothing reads.
    """

    widths = ("levels",)

    def __init__(
        self,
        in_features: int,
        tasks: Sequence[str],
        *,
        levels: Sequence[Sequence[int]] = ((512,), (256,)),
        num_specific: int | Mapping[str, int] | Sequence[Any] = 1,
        num_shared: int | Sequence[int] = 1,
        dropout: float = 0.2,
        gate: Callable[..., nnx.Module] = Gate,
        rngs: nnx.Rngs,
    ):
        self.tasks = tuple(tasks)
        if not levels:
            raise ConfigError("levels is empty; expected at least one level. Add one")
        specific = [specific_counts(n, self.tasks) for n in _a_level(num_specific, len(levels), "num_specific")]
        shared = _a_level(num_shared, len(levels), "num_shared")
        for counts, number in zip(specific, shared, strict=True):
            check_count(number, "num_shared", least=0)
            if number == 0 and 0 in counts:
                raise ConfigError(
                    "num_shared and num_specific are both 0; expected an expert for every task. Change one"
                )
        *lower, units = levels
        levels_below = []
        for index, level_units in enumerate(lower):
            own_gates = index < len(lower) - 1  # those of the last level but one are the tasks' own
            level = _Level(in_features, level_units, specific[index], shared[index], own_gates, dropout, gate, rngs)
            levels_below.append(level)
            own_in, in_features = in_features, level.experts.out_features
        self.levels = nnx.List(levels_below)

        def bank(number: int, rngs: nnx.Rngs) -> Experts | None:
            return Experts(in_features, units, num_experts=number, dropout=dropout, rngs=rngs) if number else None

        self.shared = bank(shared[-1], rngs)

        def last(task: str, rngs: nnx.Rngs) -> nnx.Dict:
            index = self.tasks.index(task)
            number = specific[-1][index]
            parts = {"gate": gate(in_features, number + shared[-1], rngs=rngs), "experts": bank(number, rngs)}
            if lower:
                parts["lower_gate"] = gate(own_in, specific[-2][index] + shared[-2], rngs=rngs)
            return nnx.Dict(parts)

        self.task = by_task(self.tasks, last, rngs)
        self.num_specific, self.num_shared = tuple(specific), tuple(shared)
        self.out_features = units[-1]

    def common(self, x: Float[Array, "batch in"], context: Context = Context()) -> PLECommon:
        own, shared, outputs = x, x, None
        for index, level in enumerate(self.levels):
            if outputs is not None:
                own = self.levels[index - 1].own_streams(own, outputs, context.stream(f"level {index - 1}"))
            outputs = level.outputs(own, shared, context.stream(f"level {index}"))
            shared = mix(level.shared_gate(shared, context.stream(f"shared gate {index}")), outputs)
        last = self.shared(shared, context.stream("last level")) if self.shared is not None else None
        return PLECommon(own, outputs, last, context.rngs if context.train else None)

    def head(self, task: str, common: PLECommon) -> Float[Array, "batch hidden"]:
        return self._head(task, common)[0]

    def _head(self, task: str, common: PLECommon) -> tuple[Float[Array, "batch hidden"], dict[str, Array]]:
        """The representation, and the weights of the gates on the way."""
        own, index, context = self.task[task], self.tasks.index(task), head_context(common.key, task)
        x, weights = _stream(common.inputs, index), {}
        if common.lower is not None:
            level = self.levels[len(self.levels) - 1]
            weights["lower"] = own.lower_gate(x, context.stream("lower gate"))
            x = mix(weights["lower"], *level.read_by(index, common.lower))
        weights["last"] = own.gate(x, context.stream("gate"))
        banks = [own.experts(x, context.stream("experts"))] if own.experts is not None else []
        return mix(weights["last"], *banks, *([common.shared] if common.shared is not None else [])), weights

    def gates(self, x, context=Context()):
        common, last = self.common(x, context._replace(train=False)), len(self.levels) + 1
        found, own, shared = {}, x, x
        for index, level in enumerate(self.levels):
            outputs = level.outputs(own, shared, Context())
            found[f"shared/level {index + 1}"] = level.shared_gate(shared)
            for task, gate in zip(self.tasks, level.gates, strict=False):
                found[f"{task}/level {index + 1}"] = gate(_stream(own, self.tasks.index(task)))
            shared = mix(found[f"shared/level {index + 1}"], outputs)
            own = level.own_streams(own, outputs, Context()) if len(level.gates) else own
        for task in self.tasks:
            weights = self._head(task, common)[1]
            found |= {f"{task}/level {last - (name == 'lower')}": weight for name, weight in weights.items()}
        return dict(sorted(found.items(), key=lambda item: (item[0].split("/level ")[1], item[0])))

    def gate_members(self):
        found = {}
        for index, (specific, number) in enumerate(zip(self.num_specific, self.num_shared, strict=True)):
            of_task = {
                task: tuple(f"{task} {i}" for i in range(n)) for task, n in zip(self.tasks, specific, strict=True)
            }
            shared = tuple(f"shared {i}" for i in range(number))
            found |= {f"{task}/level {index + 1}": own + shared for task, own in of_task.items()}
            if index < len(self.levels):
                found[f"shared/level {index + 1}"] = sum(of_task.values(), ()) + shared
        return found


class _Level(nnx.Module):
    """A level below the last one: all of its experts side by side, first each task's, then the shared ones."""

    def __init__(self, in_features, units, specific, num_shared, own_gates, dropout, gate, rngs):
        self.experts = Experts(in_features, units, num_experts=sum(specific) + num_shared, dropout=dropout, rngs=rngs)
        self.shared_gate = gate(in_features, sum(specific) + num_shared, rngs=rngs)
        numbers = specific if own_gates else ()
        self.gates = nnx.List([gate(in_features, number + num_shared, rngs=rngs) for number in numbers])
        self.specific, self.num_shared = tuple(specific), num_shared

    def outputs(self, own, shared, context: Context) -> Float[Array, "expert batch hidden"]:
        """Of all experts: those of a task on its stream, the shared ones on theirs."""
        if not isinstance(own, list):  # the first level: all read x
            return self.experts(shared, context)
        streams = [own[task] for task, number in enumerate(self.specific) for _ in range(number)]
        return self.experts(jnp.stack(streams + [shared] * self.num_shared), context)

    def own_streams(self, own, outputs, context: Context) -> list[Float[Array, "batch hidden"]]:
        """The streams of all tasks after this level."""
        return [
            mix(gate(_stream(own, task), context.stream(f"gate {task}")), *self.read_by(task, outputs))
            for task, gate in enumerate(self.gates)
        ]

    def read_by(self, task: int, outputs: Float[Array, "expert batch hidden"]) -> list[Array]:
        """The experts that the gate of a task weighs: its own and the shared ones."""
        start = sum(self.specific[:task])
        banks = [outputs[start : start + self.specific[task]], outputs[sum(self.specific) :]]
        return [bank for bank in banks if bank.shape[0]]


def specific_counts(counts: int | Mapping[str, int], tasks: Sequence[str]) -> tuple[int, ...]:
    """Number of each task's own experts; a ConfigError where they do not fit the tasks."""
    if isinstance(counts, Mapping) and set(counts) != set(tasks):
        raise ConfigError(f"num_specific names {list(counts)}; expected a number for each of {list(tasks)}. Change it")
    numbers = [counts[task] for task in tasks] if isinstance(counts, Mapping) else [counts] * len(tasks)
    for number in numbers:
        check_count(number, "num_specific", least=0)
    return tuple(numbers)


def _a_level(value: Any, num_levels: int, place: str) -> list[Any]:
    if not isinstance(value, list | tuple):
        return [value] * num_levels
    if len(value) != num_levels:
        raise ConfigError(f"{place} is {shown(value)}; expected one number, or one for each of {num_levels} levels")
    return list(value)


def _stream(streams: Any, task: int) -> Array:
    return streams[task] if isinstance(streams, list) else streams
