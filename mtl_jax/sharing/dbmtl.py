"""DBMTL: a network a task, and relations from the tasks that come before."""

import graphlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from mtl_jax.arguments import check_count, check_counts, shown
from mtl_jax.errors import ConfigError
from mtl_jax.nn import MLP, Experts, Gate, mix, stream
from mtl_jax.sharing.base import Context, Strategy, head_context


class DBMTLCommon(NamedTuple):
    """What the tasks read from the shared part: its output (of the experts, where there are some), the representations of
    tasks that others depend on, and the key of the heads."""

    bottom: Float[Array, "batch in"]
    experts: Float[Array, "expert batch hidden"] | None
    relations: dict[str, Float[Array, "batch hidden"]]
    key: PRNGKeyArray | None


class DBMTL(Strategy):
    r"""Deep Bayesian multi-target learning: a task's representation depends on those of its parents.

    .. math::
        t_k = \operatorname{MLP}_k(h_k), \qquad
        r_k = \operatorname{MLP}_{\mathrm{rel},k}([t_k;\, r_p \text{ for } p \in \mathrm{parents}(k)]), \qquad z_k = r_k

    and :math:`r_k = t_k` for tasks without parents. h is the output of a shared bottom, or for each task a mixture of
    shared experts on it.

    Args:
      in_features: Width of x.
      tasks: Task names.
      parents: Task -> the tasks that it depends on; those that are not named have none. Without parents this is a shared
        bottom with towers of MLP_k.
      bottom: Layer widths of the shared bottom; empty gives x.
      num_experts: Shared experts, each a ``expert_units`` MLP with a gate a task; 0: none.
      expert_units: Layer widths of every expert.
      units: Layer widths of MLP_k.
      relation_units: Layer widths of MLP_rel,k; the last one is that of ``units``. None: one layer of that width.
      detach_parents: Whether gradients stop at the parents' representations.
      dropout: Rate after each layer, in [0, 1).
      gate: ``(in_features, num_members, *, rngs) -> module``.
      rngs: Initialisation.

    Raises:
      ConfigError: A parent is no task, the parents go in a circle, or widths do not fit.

    Labels: networks and gates of tasks that no other depends on are ``task/<name>``, the others ``shared``. With
    ``detach_parents`` every task's are its own.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from mtl_jax.sharing import DBMTL
      >>> parents = {"buy": ["click"]}
      >>> strategy = DBMTL(16, ("click", "buy"), parents=parents, bottom=(32,), units=(8,), rngs=nnx.Rngs(0))
      >>> {task: z.shape for task, z in strategy(jnp.ones((5, 16))).items()}
      {'click': (5, 8), 'buy': (5, 8)}

    References:
      Wang, Huang, Ge, Zhang, Feng, Zhang, Deng, *Deep Bayesian Multi-Target Learning for Recommender Systems*,
      arXiv 1902.09154, 2019.
    """

    widths = ("bottom", "expert_units", "units", "relation_units")

    def __init__(
        self,
        in_features: int,
        tasks: Sequence[str],
        *,
        parents: Mapping[str, Sequence[str]] | None = None,
        bottom: Sequence[int] = (512, 256),
        num_experts: int = 0,
        expert_units: Sequence[int] = (256,),
        units: Sequence[int] = (128,),
        relation_units: Sequence[int] | None = None,
        detach_parents: bool = False,
        dropout: float = 0.2,
        gate: Callable[..., nnx.Module] = Gate,
        rngs: nnx.Rngs,
    ):
        self.tasks = tuple(tasks)
        check_count(num_experts, "num_experts", least=0)
        check_counts(expert_units, "expert_units", empty=False)
        order, found = _order(self.tasks, parents or {})
        self.parents = tuple(found[task] for task in self.tasks)
        self.bottom = MLP(in_features, bottom, dropout=dropout, rngs=rngs)
        hidden = self.bottom.out_features
        self.out_features = units[-1] if units else expert_units[-1] if num_experts else hidden
        relation_units = (self.out_features,) if relation_units is None else relation_units
        if [*relation_units][-1:] != [self.out_features]:
            raise ConfigError(
                f"relation_units is {shown(relation_units)} and other representations have {self.out_features} units; "
                "expected one width of all of them. Change one"
            )

        def bank() -> Experts | None:
            options = {"num_experts": num_experts, "dropout": dropout, "rngs": rngs}
            return Experts(hidden, expert_units, **options) if num_experts else None

        self.experts = bank()
        key = rngs.params()

        def network(task: str) -> _Network:
            read = self.experts.out_features if self.experts is not None else hidden
            gate_of = (lambda rngs: gate(hidden, num_experts, rngs=rngs)) if num_experts else None
            rngs = nnx.Rngs(params=stream(key, task))
            return _Network(read, len(found[task]), units, relation_units, dropout, gate_of, rngs)

        asked = {parent for one in self.parents for parent in one}
        self.asked = tuple(task for task in order if task in asked)
        inner = () if detach_parents else self.asked
        self.inner = nnx.List([network(task) for task in inner])
        self.task = nnx.Dict({task: network(task) for task in self.tasks if task not in inner})
        self.detach_parents = detach_parents

    def common(self, x: Float[Array, "batch in"], context: Context = Context()) -> DBMTLCommon:
        h = self.bottom(x, context.stream("bottom"))
        experts = self.experts(h, context.stream("experts")) if self.experts is not None else None
        common = DBMTLCommon(h, experts, {}, context.rngs if context.train else None)
        for task in self.asked:
            relation = self._relation(task, common)
            common.relations[task] = jax.lax.stop_gradient(relation) if self.detach_parents else relation
        return common

    def head(self, task: str, common: DBMTLCommon) -> Float[Array, "batch hidden"]:
        return self._relation(task, common) if task in self.task else common.relations[task]

    def _relation(self, task: str, common: DBMTLCommon) -> Float[Array, "batch hidden"]:
        before = [common.relations[parent] for parent in self.parents[self.tasks.index(task)]]
        return self._network(task)(common.bottom, common.experts, before, head_context(common.key, task))

    def _network(self, task: str) -> "_Network":
        return self.task[task] if task in self.task else self.inner[self.asked.index(task)]

    def gates(self, x, context=Context()):
        if self.experts is None:
            return {}
        h = self.bottom(x)
        return {f"{task}/gate": self._network(task).gate(h) for task in self.tasks}

    def gate_members(self):
        if self.experts is None:
            return {}
        members = tuple(f"expert {e}" for e in range(self.experts.num_experts))
        return dict.fromkeys((f"{task}/gate" for task in self.tasks), members)


class _Network(nnx.Module):
    """What one task makes of the shared part and of its parents."""

    def __init__(self, in_features, num_parents, units, relation_units, dropout, gate, rngs):
        self.gate = gate(rngs) if gate is not None else None
        self.network = MLP(in_features, units, dropout=dropout, rngs=rngs)
        width = (1 + num_parents) * self.network.out_features
        self.relation = MLP(width, relation_units, dropout=dropout, rngs=rngs) if num_parents else None

    def __call__(self, bottom, experts, before: list[Array], context: Context) -> Float[Array, "batch hidden"]:
        h = bottom if experts is None else mix(self.gate(bottom, context.stream("gate")), experts)
        t = self.network(h, context.stream("network"))
        if self.relation is None:
            return t
        return self.relation(jnp.concatenate([t, *before], axis=-1), context.stream("relation"))


def _order(tasks: Sequence[str], parents: Mapping[str, Any]) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
    """The tasks with parents before children, and each one's parents in the order of the tasks."""
    named = {*parents, *(parent for found in parents.values() for parent in found)}
    if unknown := named - set(tasks):
        raise ConfigError(f"parents names {sorted(unknown)}; expected tasks of {list(tasks)}. Change it")
    found = {task: tuple(p for p in tasks if p in parents.get(task, ())) for task in tasks}
    try:
        return tuple(graphlib.TopologicalSorter(found).static_order()), found
    except graphlib.CycleError as error:
        circle = " <- ".join(error.args[1])
        raise ConfigError(f"parents go in a circle ({circle}); expected an order. Leave one out") from None
