"""What every strategy owes: its equation, its labels, a complete cut, rows that do not mix."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mtl_jax.model import label
from mtl_jax.sharing import Context, MMoE, SharedBottom, SingleTask

TASKS = ("click", "buy", "return")
STRATEGIES = {
    "single_task": functools.partial(SingleTask, units=(7, 4), dropout=0.0, share_embeddings=True),
    "single_task with private inputs": functools.partial(SingleTask, units=(7, 4), dropout=0.0),
    "shared_bottom": functools.partial(SharedBottom, units=(7, 4), dropout=0.0),
    "mmoe": functools.partial(MMoE, num_experts=3, expert_units=(7, 4), dropout=0.0),
}


def make(name, tasks=TASKS):
    strategy = STRATEGIES[name](6, tasks, rngs=nnx.Rngs(0))
    shape = (5, len(tasks), 6) if strategy.private_tables else (5, 6)
    return strategy, jax.random.normal(jax.random.key(1), shape)


def mlp(layers, x):
    for layer in layers:
        x = np.maximum(x @ np.asarray(layer.kernel[...]) + np.asarray(layer.bias[...]), 0)
    return x


@pytest.mark.parametrize("name", STRATEGIES)
def test_shapes_and_bfloat16(name):
    strategy, x = make(name)
    for inputs in (x, x.astype(jnp.bfloat16)):
        outputs = strategy(inputs)
        assert list(outputs) == list(TASKS)
        assert all(z.shape == (5, 4) and bool(jnp.isfinite(z).all()) for z in outputs.values())
    assert strategy.out_features == 4


def test_shared_bottom_is_one_network_for_all():
    strategy, x = make("shared_bottom")
    for z in strategy(x).values():
        np.testing.assert_allclose(z, mlp(strategy.bottom.layers, np.asarray(x)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("private", [True, False])
def test_single_task_is_one_network_each(private):
    strategy, x = make("single_task with private inputs" if private else "single_task")
    for index, (task, z) in enumerate(strategy(x).items()):
        own = np.asarray(x)[:, index] if private else np.asarray(x)
        np.testing.assert_allclose(z, mlp(strategy.task[task].layers, own), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", STRATEGIES)
def test_labels_are_what_gradients_say(name):
    """A parameter is a task's own exactly if no other task's output depends on it."""
    strategy, x = make(name)
    graphdef, state = nnx.split(strategy)

    def output(state, task):
        return (nnx.merge(graphdef, state)(x)[task] ** 2).sum()

    reached = {}
    for task in TASKS:
        for path, gradient in nnx.to_flat_state(jax.grad(output)(state, task)):
            if np.abs(gradient[...]).max() > 0:
                reached.setdefault("/".join(map(str, path)), set()).add(task)
    for path, tasks in reached.items():
        expected = {label(path).removeprefix("task/")} if label(path).startswith("task/") else set(TASKS)
        assert tasks == expected, path
    assert len(reached) == len(nnx.to_flat_state(state))


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_cut_is_complete(name):
    strategy, x = make(name)
    common, pull = jax.vjp(lambda x: strategy.common(x), x)
    heads = lambda common: sum((strategy.head(task, common) ** 2).sum() for task in TASKS)  # noqa: E731
    (through_the_cut,) = pull(jax.grad(heads)(common))
    whole = jax.grad(lambda x: sum((z**2).sum() for z in strategy(x).values()))(x)
    np.testing.assert_allclose(through_the_cut, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_row_does_not_depend_on_the_others(name):
    strategy, x = make(name)
    order = np.array([3, 0, 4])
    for task, z in strategy(x[order]).items():
        np.testing.assert_allclose(z, strategy(x)[task][order], rtol=1e-6, atol=1e-7)


def test_a_single_tasks_initial_values_do_not_depend_on_the_other_tasks():
    alone = SingleTask(6, ("buy",), units=(7, 4), rngs=nnx.Rngs(0))
    among, _ = make("single_task")
    for one, two in zip(alone.task["buy"].layers, among.task["buy"].layers, strict=True):
        np.testing.assert_array_equal(one.kernel[...], two.kernel[...])


@pytest.mark.parametrize("strategy", [SingleTask, SharedBottom, MMoE])
def test_dropout_is_random_in_training_only(strategy):
    options = {"expert_units": (16,)} if strategy is MMoE else {"units": (16,)}
    options |= {"share_embeddings": True} if strategy is SingleTask else {}
    module = strategy(6, TASKS, dropout=0.5, rngs=nnx.Rngs(0), **options)
    x = jnp.ones((9, 6))
    one, two = (module(x, Context(train=True, rngs=jax.random.key(seed)))["buy"] for seed in (0, 1))
    assert not np.allclose(one, two)
    np.testing.assert_array_equal(module(x)["buy"], module(x, Context(rngs=jax.random.key(0)))["buy"])
    again = module(x, Context(train=True, rngs=jax.random.key(0)))["buy"]
    np.testing.assert_array_equal(one, again)


def test_single_tasks_drop_units_of_their_own():
    """Networks with equal weights, under one key: the masks go by the task's name."""
    strategy = SingleTask(6, TASKS, units=(16,), dropout=0.5, share_embeddings=True, rngs=nnx.Rngs(0))
    nnx.update(strategy.task["buy"], nnx.state(strategy.task["click"]))
    x = jnp.ones((9, 6))
    outputs = strategy(x)
    np.testing.assert_array_equal(outputs["buy"], outputs["click"])
    outputs = strategy(x, Context(train=True, rngs=jax.random.key(0)))
    assert np.any(outputs["buy"] != outputs["click"])


def test_parameter_counts():
    count = lambda module: sum(p.size for p in jax.tree.leaves(nnx.state(module, nnx.Param)))  # noqa: E731
    network = 6 * 7 + 7 + 7 * 4 + 4
    assert count(make("shared_bottom")[0]) == network
    assert count(make("single_task")[0]) == 3 * network
    assert count(make("mmoe")[0]) == 3 * network + 3 * 6 * 3
