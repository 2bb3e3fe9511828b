"""The strategies as their tests see them: how each is made small, and what its reference reads from it."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import references
from flax import nnx

from mtl_jax.nn import Gate, State
from mtl_jax.sharing import (
    CGC,
    DBMTL,
    MTAN,
    PLE,
    AdaTT,
    AdaTTSp,
    Context,
    CrossStitch,
    DSelectK,
    MMoE,
    OMoE,
    SharedBottom,
    SingleTask,
    Sluice,
    SNRAver,
    SNRTrans,
    SoftSharing,
)

TASKS = ("click", "buy", "return")
WIDTH = 6
"""Of the input."""
DOMAINS, PRIOR = 3, 4
"""Number of domains, and width of the prior, of those that read them."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A strategy with small widths.

    Attributes:
      make: ``(in_features, tasks, *, rngs) -> Strategy``.
      arguments: Strategy -> name of its reference, and the arguments after ``x`` and ``tasks``; or a function of x, the
        context, the tasks and the arguments after it.
      any_tasks: Whether it can be made for other tasks than ``TASKS``.
    """

    make: Callable[..., Any]
    arguments: Callable[[Any], tuple]
    any_tasks: bool = True

    def expected(self, strategy, x: np.ndarray) -> dict[str, np.ndarray]:
        """What the reference makes of the strategy's parameters."""
        name, *arguments = self.arguments(strategy)
        if callable(name):
            return name(np.asarray(x, np.float64), context(len(x)), strategy.tasks, *arguments)
        return getattr(references, name)(np.asarray(x, np.float64), strategy.tasks, *arguments)


# From modules to the shapes of parameters that references have


def array(variable) -> np.ndarray:
    return np.asarray(variable[...], np.float64)


def layer(module):
    return array(module.kernel), None if getattr(module, "bias", None) is None else array(module.bias)


def mlp(module):
    return [layer(one) for one in module.layers]


def bank(module, start=0, stop=None):
    if module is None:
        return []
    stop = module.num_experts if stop is None else stop
    return [[(array(one.kernel)[e], array(one.bias)[e]) for one in module.layers] for e in range(start, stop)]


def gate(module):
    found = {"hidden": mlp(module.hidden), "kernel": array(module.kernel), "temperature": module.temperature}
    return found | ({} if module.bias is None else {"bias": array(module.bias)})


def norm(module):
    return array(module.scale), array(module.bias)


def by_task(strategy, read):
    return {task: read(strategy.task[task]) for task in strategy.tasks}


def ple(strategy):
    tasks, levels = strategy.tasks, []
    for index, level in enumerate(strategy.levels):
        starts = np.cumsum([0, *level.specific])
        specific = {task: bank(level.experts, a, b) for task, a, b in zip(tasks, starts[:-1], starts[1:], strict=True)}
        if index == len(strategy.levels) - 1:
            gates = by_task(strategy, lambda own: gate(own.lower_gate))
        else:
            gates = {task: gate(one) for task, one in zip(tasks, level.gates, strict=True)}
        shared = {"shared": bank(level.experts, starts[-1]), "shared_gate": gate(level.shared_gate)}
        levels.append({"specific": specific, "gates": gates} | shared)
    own = by_task(strategy, lambda own: bank(own.experts))
    gates = by_task(strategy, lambda own: gate(own.gate))
    return "ple", [*levels, {"specific": own, "shared": bank(strategy.shared), "gates": gates}]


def cgc(strategy):
    ((level,),) = ple(strategy)[1:]
    return "cgc", level["specific"], level["shared"], level["gates"]


def stacked(module, index):
    return array(module.kernel)[index], array(module.bias)[index]


def cross_stitch(strategy):
    rows = [array(stitch) for stitch in strategy.stitch] + [
        np.stack([array(strategy.task[task].stitch) for task in strategy.tasks])
    ]
    return "cross_stitch", [
        {
            "layers": {task: stacked(one, k) for k, task in enumerate(strategy.tasks)},
            "stitch": dict(zip(strategy.tasks, stitch, strict=True)),
        }
        for one, stitch in zip(strategy.layers, rows, strict=True)
    ]


def sluice(strategy):
    def halves(one, k):
        kernels, biases = (np.split(part, 2, axis=-1) for part in stacked(one, k))
        return tuple(zip(kernels, biases, strict=True))

    mixing = [array(alpha) for alpha in strategy.alpha]
    mixing.append(np.concatenate([array(strategy.task[task].alpha) for task in strategy.tasks]))
    levels = [
        {
            "layers": {task: halves(one, k) for k, task in enumerate(strategy.tasks)},
            "mixing": {task: rows[2 * k : 2 * k + 2] for k, task in enumerate(strategy.tasks)},
        }
        for one, rows in zip(strategy.layers, mixing, strict=True)
    ]
    return "sluice", levels, by_task(strategy, lambda own: array(own.beta))


def mtan(strategy):
    def mask(module):
        norms = [norm(one) for one in module.norms] or [None, None]
        parts = {"hidden": layer(module.first), "output": layer(module.second)}
        return parts | dict(zip(("hidden_norm", "output_norm"), norms, strict=True))

    levels = []
    for index, (inner, outer) in enumerate(zip(strategy.inner, strategy.outer, strict=True)):
        levels.append(
            {
                "inner": layer(inner),
                "outer": layer(outer),
                "masks": by_task(strategy, lambda own, i=index: mask(own[i])),
            }
        )
        if index:
            levels[-1]["bridge"] = layer(strategy.between[index - 1])
    return "mtan", levels


def sparse_gate(module):
    found = {name: array(getattr(module, name)) for name in ("selector_bias", "code_bias")}
    if module.selector is not None:
        found |= {"selector": array(module.selector), "code": array(module.code)}
    return found


def dselect_k(strategy):
    own = strategy.task[strategy.tasks[0]]
    return "dselect_k", bank(strategy.experts), by_task(strategy, sparse_gate), own.gamma, own.selector is not None


def snr(strategy):
    def maps(node):
        return [array(one.kernel) for one in node.transforms]

    levels = [{"nodes": [[layer(one)] for one in strategy.first]}]
    for level in strategy.levels:
        levels.append(
            {
                "nodes": [[layer(node.layer)] for node in level],
                "log_alpha": np.stack([array(node.log_alpha) for node in level]),
                "maps": [maps(node) for node in level],
            }
        )
    last = {
        "nodes": by_task(strategy, lambda node: [layer(node.layer)]),
        "log_alpha": by_task(strategy, lambda node: array(node.log_alpha)),
        "maps": by_task(strategy, maps),
    }
    return "snr_trans" if strategy.transforms else "snr_aver", levels, last


def adatt(strategy):
    tasks, numbers, levels = strategy.tasks, strategy.numbers, []
    starts = np.cumsum([0, *numbers])
    for index, experts in enumerate(strategy.experts):
        level = {"experts": {task: bank(experts, starts[k], starts[k + 1]) for k, task in enumerate(tasks)}}
        if len(numbers) > len(tasks):
            level["shared"] = bank(experts, starts[-2])
        if index < strategy.num_levels - 1:
            gates = [gate(one) for one in strategy.gate_levels[index]]
            residuals = [array(one) for one in strategy.residuals[index]] if len(strategy.residuals) else None
        else:
            gates = [gate(strategy.task[task].gate) for task in tasks]
            learned = "residual" in strategy.task[tasks[0]]
            residuals = [array(strategy.task[task].residual) for task in tasks] if learned else None
        level["gates"] = dict(zip(tasks, gates, strict=False))
        if residuals is not None:
            level["residual"] = dict(zip(tasks, residuals, strict=False))
        if len(gates) > len(tasks):
            level["shared_gate"] = gates[-1]
            level["shared_residual"] = None if residuals is None else residuals[-1]
        levels.append(level)
    return "adatt" if len(numbers) > len(tasks) else "adatt_sp", levels, strategy.native_residual


def dbmtl(strategy):
    networks = {task: strategy._network(task) for task in strategy.tasks}
    relations = {task: mlp(one.relation) for task, one in networks.items() if one.relation is not None}
    gates = None if strategy.experts is None else {task: gate(one.gate) for task, one in networks.items()}
    return (
        "dbmtl",
        dict(zip(strategy.tasks, strategy.parents, strict=True)),
        {task: mlp(one.network) for task, one in networks.items()},
        relations,
        mlp(strategy.bottom),
        None if strategy.experts is None else bank(strategy.experts),
        gates,
    )


def single_task(strategy):
    return "single_task", by_task(strategy, mlp)


def mmoe(strategy):
    return "mmoe", bank(strategy.experts), by_task(strategy, gate)


def rich_gate(in_features, num_members, *, rngs):
    return Gate(in_features, num_members, hidden=(5,), bias=True, temperature=0.5, rngs=rngs)


def small(kind, **options):
    return functools.partial(kind, dropout=0.0, **options)


CASES = {
    "single_task": Case(small(SingleTask, units=(7, 4), share_embeddings=True), single_task),
    "shared_bottom": Case(small(SharedBottom, units=(7, 4)), lambda strategy: ("shared_bottom", mlp(strategy.bottom))),
    "soft_sharing": Case(small(SoftSharing, units=(7, 4)), lambda s: ("soft_sharing", by_task(s, mlp))),
    "omoe": Case(small(OMoE, num_experts=3, expert_units=(7, 4)), lambda s: ("omoe", bank(s.experts), gate(s.gate))),
    "mmoe": Case(small(MMoE, num_experts=3, expert_units=(7, 4)), mmoe),
    "mmoe, rich gates": Case(small(MMoE, num_experts=3, expert_units=(7, 4), gate=rich_gate), mmoe),
    "cgc": Case(small(CGC, expert_units=(7, 4), num_specific=1, num_shared=3), cgc),
    "cgc, unequal": Case(
        small(CGC, expert_units=(7, 4), num_specific={"click": 2, "buy": 1, "return": 0}, num_shared=2),
        cgc,
        any_tasks=False,
    ),
    "ple, one level": Case(small(PLE, levels=((7, 4),), num_specific=2), ple),
    "ple": Case(small(PLE, levels=((7,), (5, 4)), num_specific=(1, 2), num_shared=(2, 1)), ple),
    "ple, three levels": Case(small(PLE, levels=((7,), (5,), (4,)), num_specific=2, num_shared=(1, 3, 2)), ple),
    "cross_stitch": Case(small(CrossStitch, units=(7, 4)), cross_stitch),
    "cross_stitch, per unit": Case(small(CrossStitch, units=(7, 5, 4), per_unit=True), cross_stitch),
    "sluice": Case(small(Sluice, width=4, num_layers=3), sluice),
    "mtan": Case(small(MTAN, units=(7, 5, 4)), mtan),
    "mtan, no norm": Case(small(MTAN, units=(4,), norm="none"), mtan),
    "dselect_k": Case(small(DSelectK, num_experts=4, expert_units=(7, 4)), dselect_k),
    "dselect_k, six experts": Case(
        small(DSelectK, num_experts=6, expert_units=(4,), num_selected=3, per_example=False), dselect_k
    ),
    "snr_trans": Case(small(SNRTrans, num_nodes=(3, 2), units=(7, 5, 4)), snr),
    "snr_aver": Case(small(SNRAver, num_nodes=(3,), units=(4, 4)), snr),
    "adatt": Case(small(AdaTT, levels=((7,), (4,)), num_specific=2), adatt),
    "adatt, one expert each": Case(small(AdaTT, levels=((7,), (5,), (4,))), adatt),
    "adatt, no residual": Case(small(AdaTT, levels=((4,),), num_specific=2, native_residual=False), adatt),
    "adatt_sp": Case(small(AdaTTSp, levels=((7,), (4,)), num_specific=2), adatt),
    "dbmtl": Case(
        small(
            DBMTL,
            parents={"buy": ["click"], "return": ["buy", "click"]},
            bottom=(7,),
            units=(5, 4),
            relation_units=(4,),
        ),
        dbmtl,
        any_tasks=False,
    ),
    "dbmtl, experts": Case(
        small(
            DBMTL,
            parents={"return": ["click"]},
            bottom=(),
            num_experts=3,
            expert_units=(5,),
            units=(4,),
            relation_units=(4,),
        ),
        dbmtl,
        any_tasks=False,
    ),
    "dbmtl, detached": Case(
        small(DBMTL, parents={"buy": ["click"]}, bottom=(7,), units=(4,), relation_units=(4,), detach_parents=True),
        dbmtl,
        any_tasks=False,
    ),
}


def make(case, tasks=TASKS, seed=0):
    """The strategy of a case, with all parameters drawn, biases and norms too."""
    strategy = case.make(WIDTH, tasks, rngs=nnx.Rngs(seed))
    generator = np.random.default_rng(seed)
    for path, variable in nnx.to_flat_state(nnx.state(strategy, nnx.Param)):
        drawn = 0.6 * generator.standard_normal(variable.shape)
        drawn = 1 + 0.5 * drawn if path[-1] == "scale" else drawn
        variable[...] = jax.device_put(drawn.astype(np.float32))
    draw_states(strategy, generator)
    return strategy


def draw_states(strategy, generator: np.random.Generator) -> None:
    """Moments, centres and constants that are not those of the start."""
    for path, variable in nnx.to_flat_state(nnx.state(strategy, State)):
        drawn = generator.standard_normal(variable.shape)
        match path[-1]:
            case "variance":
                drawn = 0.5 + drawn**2
            case "centres":
                drawn = drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
            case "seen":
                drawn = 1.0
            case "alpha":
                drawn = 1.25
            case "epoch":
                drawn = 3.0
        variable[...] = jax.device_put(np.asarray(drawn, variable.dtype))


def context(number=5, seed=2) -> Context:
    """Domains and priors of the first rows, for those that read them."""
    prior = np.random.default_rng(seed).standard_normal((number, PRIOR)).astype(np.float32)
    return Context(domain=jnp.arange(number, dtype=jnp.int32) % DOMAINS, prior=jnp.asarray(prior))


def rows(number=5, seed=1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((number, WIDTH)).astype(np.float32)
