"""Mean weights of gates, over rows and within domains, against sums by hand."""

import functools

import numpy as np
import pytest
from flax import nnx

from mtl_jax import MultiTaskModel
from mtl_jax.data import Encoded, Numeric, Schema
from mtl_jax.sharing import CrossStitch, MMoE, SharedBottom
from mtl_jax.tasks import Task
from mtl_jax.train.gate_use import gate_use
from mtl_jax.train.state import Functional

TASKS = ("buy", "spend")
SHOPS = ("north", "south", "closed")


def rows(number):
    generator = np.random.default_rng(0)
    labels = {task: generator.random(number).astype(np.float32) for task in TASKS}
    return Encoded(
        ids=np.zeros((number, 0), np.int32),
        dense=generator.standard_normal((number, 3)).astype(np.float32),
        bags={},
        sequences={},
        labels=labels,
        mask=dict.fromkeys(TASKS, np.ones(number, bool)),
        task_weight={},
        weight=generator.random(number).astype(np.float32),
        domain=generator.integers(0, 2, number).astype(np.int32),
    )


def model(sharing):
    schema = Schema(
        features=tuple(Numeric(name) for name in "abc"),
        vocabularies=(),
        tasks=tuple(Task(name, "regression") for name in TASKS),
        domains=SHOPS,
    )
    return MultiTaskModel(schema, sharing=sharing, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("number", [100, 8192 + 77])
def test_means_are_weighted_and_by_domain(number):
    part, made = rows(number), model(functools.partial(MMoE, num_experts=3, expert_units=(4,)))
    functional, params, rest = Functional.of(made)
    found = gate_use(functional, params | rest, part, SHOPS)
    assert list(found) == ["all", "domain=north", "domain=south"]  # nothing is known of a domain without rows
    for place, chosen in (("all", part.domain >= 0), ("domain=south", part.domain == 1)):
        for task in TASKS:
            scores = part.dense[chosen] @ np.asarray(made.sharing.task[task].kernel[...])
            weights = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
            expected = np.average(weights, axis=0, weights=part.weight[chosen])
            use = found[place][f"{task}/gate"]
            assert list(use) == ["expert 0", "expert 1", "expert 2"]
            np.testing.assert_allclose(list(use.values()), expected, rtol=1e-4)


def test_stitches_are_their_own_mean():
    functional, params, rest = Functional.of(model(functools.partial(CrossStitch, units=(4, 4))))
    use = gate_use(functional, params | rest, rows(50))
    assert use["all"]["buy/layer 2"] == pytest.approx({"buy": 0.9, "spend": 0.1})


def test_strategies_without_gates_use_none():
    functional, params, rest = Functional.of(model(functools.partial(SharedBottom, units=(4,))))
    assert gate_use(functional, params | rest, rows(50)) == {}
