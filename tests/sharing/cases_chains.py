"""The cases of strategies with ordered tasks, with branches and with a hierarchy."""

import cases

from mtl_jax.sharing.aitm import AITM
from mtl_jax.sharing.home import HoME
from mtl_jax.sharing.ltb import LTB
from mtl_jax.sharing.resflow import ResFlow

Case, small, array, layer, bank, gate = (
    getattr(cases, name) for name in ("Case", "small", "array", "layer", "bank", "gate")
)


def part_of(strategy, task):
    """A task's part, wherever it lies."""
    own = strategy.task
    return own[task] if task in own else strategy.inner[strategy.inner_tasks.index(task)]


def aitm(strategy):
    def attention(module):
        return tuple(array(one.kernel) for one in (module.value, module.query, module.key))

    steps = {task: part_of(strategy, task) for task in strategy.order}
    if strategy.attention is not None:
        kernels = attention(strategy.attention)
    else:
        kernels = {task: attention(steps[task].attention) for task in strategy.order[1:]}
    return (
        "aitm",
        {task: [layer(one.layers[0]) for one in step.network] for task, step in steps.items()},
        {task: layer(steps[task].transfer) for task in strategy.order[1:]},
        kernels,
        strategy.order,
    )


def norm_with_moments(module, index=...):
    return tuple(array(one)[index] for one in (module.scale, module.bias, module.mean, module.variance))


def resflow(strategy):
    def read(one):
        norm = None
        if one.batch_norm is not None:
            norm = norm_with_moments(one.batch_norm)
        if one.layer_norm is not None:
            norm = array(one.layer_norm.scale), array(one.layer_norm.bias)
        return {"layer": layer(one.linear), "slope": float(array(one.slope)), "norm": norm}

    networks = {task: [read(one) for one in part_of(strategy, task)] for task in strategy.tasks}
    return "resflow", networks, strategy.order, strategy.features


def ltb_levels(strategy):
    return [
        [[(array(level.kernel)[i], array(level.bias)[i])] for i in range(strategy.num_nodes)]
        for level in strategy.levels
    ]


def ltb(strategy):
    logits = [None, *(array(choice.logits) for choice in strategy.choices)]
    return "ltb", ltb_levels(strategy), logits, {task: array(strategy.task[task].logits) for task in strategy.tasks}


def home(strategy):
    def experts(module):
        found = module.feature_gate
        feature_gate = {"selector": array(found.selector.kernel), "down": array(found.down), "up": array(found.up)}
        networks = [
            {"layers": layers, "norm": norm_with_moments(module.norm, index)}
            for index, layers in enumerate(bank(module.networks))
        ]
        return {"feature_gate": feature_gate, "experts": networks}

    def gates(module):
        single = module.single
        return {"gate": gate(module.all), "self_gate": gate(module.own) if single is None else array(single.kernel)}

    categories = {name: module for name, _, module in strategy._all_categories()}
    first = {
        "shared": experts(strategy.first_shared) | gates(strategy.shared.gates),
        "categories": {
            name: experts(one) | gates(categories[name].gates)
            for (name, _), one in zip(strategy.categories, strategy.first, strict=True)
        },
    }
    second = {
        "shared": experts(strategy.shared.experts),
        "categories": {name: experts(module.experts) for name, module in categories.items()},
        "tasks": {task: experts(own.experts) | gates(own.gates) for task, own in strategy.task.items()},
    }
    return "home", dict(strategy.categories), first, second


ORDER = ("return", "click", "buy")

CASES = {
    "aitm": Case(small(AITM, units=(7, 4)), aitm),
    "aitm, order, attention a step": Case(
        small(AITM, order=ORDER, units=(4,), share_attention=False), aitm, any_tasks=False
    ),
    "aitm, detached": Case(small(AITM, units=(7, 4), detach_previous=True), aitm),
    "resflow": Case(small(ResFlow, units=(7, 4)), resflow),
    "resflow, order, layer norm": Case(
        small(ResFlow, order=ORDER, units=(5, 4), norm="layer"), resflow, any_tasks=False
    ),
    "resflow, no residuals": Case(small(ResFlow, units=(7, 4), norm="none", features=False, logits=False), resflow),
    "ltb": Case(small(LTB, units=(7, 5, 4)), ltb),
    "ltb, five nodes": Case(small(LTB, units=(7, 4), num_nodes=5), ltb),
    "home": Case(small(HoME, levels=((7,), (4,)), num_shared=2, num_specific=2, rank=3), home),
    "home, categories": Case(
        small(
            HoME,
            categories={"social": ["return"], "watching": ["buy", "click"]},
            levels=((7, 5), (4,)),
            num_category=2,
            rank=3,
        ),
        home,
        any_tasks=False,
    ),
}
