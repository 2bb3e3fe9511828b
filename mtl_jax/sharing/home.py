"""HoME: experts for all tasks, for categories of tasks and for each task, in two levels, with gates on what they read."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from mtl_jax.arguments import check_count, check_counts, shown
from mtl_jax.errors import ConfigError
from mtl_jax.nn import Experts, Gate, Linear, mix
from mtl_jax.nn.stacked_batch_norm import StackedBatchNorm
from mtl_jax.sharing.base import Context, Kept, Strategy, by_task

Bank = Float[Array, "expert batch hidden"]


class HoMECommon(NamedTuple):
    """What the tasks read from the shared part: the shared stream m^s and its experts F^s, those of each category, and for
    categories of a single task what makes them (x, the experts of the first level)."""

    stream: Float[Array, "batch hidden"]
    experts: Bank
    category_streams: dict[str, Float[Array, "batch hidden"]]
    category_experts: dict[str, Bank]
    x: Float[Array, "batch in"] | None
    first: Bank | None
    category_first: dict[str, Bank]
    kept: Kept


class HoME(Strategy):
    r"""Hierarchy of multi-gate experts. Tasks come in categories; c is the category of task k.

    .. math::
        m^c &= g_c(x) \cdot [E^s; E^c](x) + s_c(x) \cdot E^c(x), \qquad
        m^s = g_s(x) \cdot [E^s; E^1; \dots; E^C](x) + s_s(x) \cdot E^s(x) \\
        z_k &= g_k([m^c; m^s]) \cdot [F^s(m^s); F^c(m^c); F^k(m^c)] + s_k(m^c) \cdot F^k(m^c)

    with softmax gates g and self gates s, which are softmax gates too, and a sigmoid over a single expert. An expert is
    :math:`\operatorname{swish}(\operatorname{BN}(\operatorname{MLP}(v)))`. Every set of experts reads :math:`v \odot a(v)`
    with a feature gate of its own, a sum of R low-rank ones:

    .. math:: a(v) = \sum_{i=1}^{R} \operatorname{softmax}(v S)_i \; 2 \sigma(v B_i A_i)

    Args:
      in_features: Width of x.
      tasks: Task names.
      categories: Category -> its tasks, every task in one; None: one category of all tasks.
      levels: Layer widths of the experts (ReLU after each), of the first level E and the second F.
      num_shared: Experts of E^s and of F^s.
      num_category: Experts of every E^c and F^c.
      num_specific: Experts of every F^k.
      num_factors: R.
      rank: Inner width of B_i A_i; None: a sixteenth of the width of v, 4 at least.
      dropout: Rate after each layer of the experts, in [0, 1).
      gate: ``(in_features, num_members, *, rngs) -> module``, for all but the sigmoid gates.
      rngs: Initialisation.

    Raises:
      ConfigError: The categories do not share out the tasks, or there are not two levels.

    Labels: F^k and its gates are ``task/<name>``, as are g_c, s_c and F^c of a category with a single one of several
    tasks; the rest is ``shared``, E^c included, because m^s reads it. Running moments are no parameters.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from mtl_jax.sharing import HoME
      >>> categories = {"watching": ["click", "long"], "social": ["like"]}
      >>> options = {"categories": categories, "levels": ((32,), (8,))}
      >>> strategy = HoME(16, ("click", "long", "like"), **options, rngs=nnx.Rngs(0))
      >>> {task: z.shape for task, z in strategy(jnp.ones((5, 16))).items()}
      {'click': (5, 8), 'long': (5, 8), 'like': (5, 8)}

    References:
      Wang, Cao, Fu, Gai, Zhou, *HoME: Hierarchy of Multi-Gate Experts for Multi-Task Learning at Kuaishou*, KDD 2025, arXiv
      2408.05430. R, the ranks and the depth of experts are ours; the paper does not say.
    """

    widths = ("levels",)

    def __init__(
        self,
        in_features: int,
        tasks: Sequence[str],
        *,
        categories: Mapping[str, Sequence[str]] | None = None,
        levels: Sequence[Sequence[int]] = ((512,), (256,)),
        num_shared: int = 1,
        num_category: int = 1,
        num_specific: int = 1,
        num_factors: int = 2,
        rank: int | None = None,
        dropout: float = 0.2,
        gate: Callable[..., nnx.Module] = Gate,
        rngs: nnx.Rngs,
    ):
        self.tasks = tuple(tasks)
        self.categories = _categories(self.tasks, categories)
        if not isinstance(levels, list | tuple) or len(levels) != 2:
            raise ConfigError(f"levels is {shown(levels)}; expected two lists of widths. Change it")
        for units in levels:
            check_counts(units, "levels", empty=False)
        for number, place in (
            (num_shared, "num_shared"),
            (num_category, "num_category"),
            (num_specific, "num_specific"),
        ):
            check_count(number, place)
        check_count(num_factors, "num_factors")
        check_count(4 if rank is None else rank, "rank")
        (*_, hidden), (*_, self.out_features) = levels
        alone = {of[0] for _, of in self.categories if len(of) == 1 < len(self.tasks)}

        def experts(level: int, number: int, rngs: nnx.Rngs) -> _Experts:
            width = (in_features, hidden)[level]
            inner = max(4, width // 16) if rank is None else rank
            return _Experts(width, levels[level], number, num_factors, inner, dropout, rngs)

        def category(rngs: nnx.Rngs) -> _Category:
            gates = _Gates(in_features, in_features, num_shared + num_category, num_category, gate, rngs)
            return _Category(gates, experts(1, num_category, rngs))

        def own(task: str, rngs: nnx.Rngs) -> _Own:
            gates = _Gates(2 * hidden, hidden, num_shared + num_category + num_specific, num_specific, gate, rngs)
            parts = gates, experts(1, num_specific, rngs)
            return _Own(*parts, category(rngs) if task in alone else None)

        self.first_shared = experts(0, num_shared, rngs)
        self.first = nnx.List([experts(0, num_category, rngs) for _ in self.categories])
        everything = num_shared + num_category * len(self.categories)
        self.shared = _Category(
            _Gates(in_features, in_features, everything, num_shared, gate, rngs), experts(1, num_shared, rngs)
        )
        self.inner_names = tuple(name for name, of in self.categories if not alone.issuperset(of))
        self.inner = nnx.List([category(rngs) for _ in self.inner_names])
        self.task = by_task(self.tasks, own, rngs)
        self.num_shared, self.num_category, self.num_specific = num_shared, num_category, num_specific

    def common(self, x: Float[Array, "batch in"], context: Context = Context()) -> HoMECommon:
        shared = self.first_shared(x, context.stream("first"))
        first = {
            name: experts(x, context.stream(f"first/{name}"))
            for (name, _), experts in zip(self.categories, self.first, strict=True)
        }
        stream = self.shared.gates(x, x, context.stream("gates"), shared, *first.values(), own=shared)
        streams, banks = {}, {}
        for name, category in zip(self.inner_names, self.inner, strict=True):
            named = context.stream(f"category/{name}")
            streams[name], banks[name] = category(x, shared, first.pop(name), named)
        bank = self.shared.experts(stream, context.stream("second"))
        alone = (x, shared, first) if first else (None, None, {})
        return HoMECommon(stream, bank, streams, banks, *alone, Kept.of(context))

    def head(self, task: str, common: HoMECommon) -> Float[Array, "batch hidden"]:
        own, context = self.task[task], common.kept.context(task)
        stream, bank = self._category(task, common)
        experts = own.experts(stream, context.stream("experts"))
        both = jnp.concatenate([stream, common.stream], axis=-1)
        return own.gates(both, stream, context.stream("gates"), common.experts, bank, experts, own=experts)

    def _category(self, task: str, common: HoMECommon) -> tuple[Array, Bank]:
        """The stream of the task's category, and the experts on it."""
        name = next(name for name, of in self.categories if task in of)
        if name in common.category_streams:
            return common.category_streams[name], common.category_experts[name]
        context = common.kept.context(task).stream("category")
        return self.task[task].category(common.x, common.first, common.category_first[name], context)

    def gates(self, x, context=Context()):
        common = self.common(x)
        found = dict(zip(("shared/level 1", "shared/level 1, own"), self.shared.gates.weights(x, x), strict=True))
        for name, owner, category in self._all_categories():
            names = f"{owner}/level 1 of {name}", f"{owner}/level 1 of {name}, own"
            found |= zip(names, category.gates.weights(x, x), strict=True)
        for task in self.tasks:
            stream, _ = self._category(task, common)
            both = jnp.concatenate([stream, common.stream], axis=-1)
            weights = self.task[task].gates.weights(both, stream)
            found |= zip((f"{task}/level 2", f"{task}/level 2, own"), weights, strict=True)
        return found

    def gate_members(self):
        def bank(owner: str, number: int) -> tuple[str, ...]:
            return tuple(f"{owner} {index}" for index in range(number))

        shared = bank("shared", self.num_shared)
        of = {name: bank(f"category {name}", self.num_category) for name, _ in self.categories}
        everything = (*shared, *(member for members in of.values() for member in members))
        found = {"shared/level 1": everything, "shared/level 1, own": shared}
        for name, owner, _ in self._all_categories():
            found |= {f"{owner}/level 1 of {name}": shared + of[name], f"{owner}/level 1 of {name}, own": of[name]}
        for name, tasks in self.categories:
            for task in tasks:
                own = bank(f"task {task}", self.num_specific)
                found |= {f"{task}/level 2": shared + of[name] + own, f"{task}/level 2, own": own}
        return found

    def _all_categories(self) -> list[tuple[str, str, "_Category"]]:
        """Name, whose it is, and module of every category."""
        common = dict(zip(self.inner_names, self.inner, strict=True))
        return [
            (name, "shared", common[name]) if name in common else (name, tasks[0], self.task[tasks[0]].category)
            for name, tasks in self.categories
        ]


class _FeatureGate(nnx.Module):
    """Factors in (0, 2) on the features of v, from v."""

    def __init__(self, width: int, num_factors: int, rank: int, rngs: nnx.Rngs):
        init = nnx.initializers.glorot_uniform(batch_axis=(0,))
        self.selector = Linear(width, num_factors, use_bias=False, rngs=rngs)
        self.down = nnx.Param(init(rngs.params(), (num_factors, width, rank)))
        self.up = nnx.Param(init(rngs.params(), (num_factors, rank, width)))

    def __call__(self, v: Float[Array, "batch in"]) -> Float[Array, "batch in"]:
        weights = jax.nn.softmax(self.selector(v), axis=-1)
        inner = jnp.einsum("bi,fir->fbr", v.astype(self.down.dtype), self.down[...])
        return mix(weights, 2 * jax.nn.sigmoid(jnp.einsum("fbr,fri->fbi", inner, self.up[...])))


class _Experts(nnx.Module):
    """A set of experts behind a feature gate."""

    def __init__(self, in_features, units, number, num_factors, rank, dropout, rngs):
        self.feature_gate = _FeatureGate(in_features, num_factors, rank, rngs)
        self.networks = Experts(in_features, units, num_experts=number, dropout=dropout, rngs=rngs)
        self.norm = StackedBatchNorm(number, self.networks.out_features)

    def __call__(self, v: Float[Array, "batch in"], context: Context) -> Bank:
        return jax.nn.swish(self.norm(self.networks(v * self.feature_gate(v), context), context))


class _Gates(nnx.Module):
    """The gate over several sets of experts, and the self gate over one."""

    def __init__(self, in_features, own_features, number, num_own, gate, rngs):
        self.all = gate(in_features, number, rngs=rngs)
        several = num_own > 1
        self.own = gate(own_features, num_own, rngs=rngs) if several else None
        self.single = None if several else Linear(own_features, 1, use_bias=False, rngs=rngs)

    def weights(self, v: Array, of_own: Array, context: Context = Context()) -> tuple[Array, Array]:
        weights = self.all(v, context.stream("all"))
        if self.single is not None:
            return weights, jax.nn.sigmoid(self.single(of_own))
        return weights, self.own(of_own, context.stream("own"))

    def __call__(
        self, v: Array, of_own: Array, context: Context, *banks: Bank, own: Bank
    ) -> Float[Array, "batch hidden"]:
        weights, of_own = self.weights(v, of_own, context)
        return mix(weights, *banks) + mix(of_own, own)


class _Category(nnx.Module):
    """What makes a stream of the first level, and the experts of the second that read it."""

    def __init__(self, gates: _Gates, experts: _Experts):
        self.gates, self.experts = gates, experts

    def __call__(self, x: Array, shared: Bank, own: Bank, context: Context) -> tuple[Array, Bank]:
        stream = self.gates(x, x, context.stream("gates"), shared, own, own=own)
        return stream, self.experts(stream, context.stream("experts"))


class _Own(nnx.Module):
    """What is one task's: its gates, its experts, and its category where it is alone in it."""

    def __init__(self, gates: _Gates, experts: _Experts, category: _Category | None):
        self.gates, self.experts, self.category = gates, experts, category


def _categories(
    tasks: tuple[str, ...], categories: Mapping[str, Sequence[str]] | None
) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Every category with its tasks; a ConfigError where a task is in none or in several, or a category has none."""
    if categories is None:
        return (("all", tasks),)
    found = {name: tuple(of) for name, of in categories.items()}
    if sorted(str(task) for of in found.values() for task in of) != sorted(tasks) or not all(found.values()):
        raise ConfigError(
            f"categories is {shown(dict(categories))}; expected each of {list(tasks)} in one of them, and none empty. "
            "Change it"
        )
    return tuple(found.items())
