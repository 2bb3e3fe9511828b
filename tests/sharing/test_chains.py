"""AITM, ResFlow, LTB and HoME: what they reduce to, where gradients go, what training moves."""

import functools

import cases_chains as chains
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mtl_jax.errors import ConfigError
from mtl_jax.model import label
from mtl_jax.nn import BatchNorm, State
from mtl_jax.nn.stacked_batch_norm import StackedBatchNorm
from mtl_jax.sharing import Context, SharedBottom
from mtl_jax.sharing.aitm import AITM
from mtl_jax.sharing.home import HoME
from mtl_jax.sharing.ltb import LTB
from mtl_jax.sharing.resflow import ResFlow
from mtl_jax.train.state import Functional

cases, references = chains.cases, chains.cases.references
CASES, TASKS, WIDTH = chains.CASES, cases.TASKS, cases.WIDTH
IN_ORDER = pytest.mark.parametrize("kind", [AITM, ResFlow])
ONE_EACH = {"watching": ["click"], "owning": ["buy"], "regret": ["return"]}


def drawn(make, tasks=TASKS, seed=0):
    """A strategy whose parameters and moments are all drawn."""
    strategy = make(WIDTH, tasks, rngs=nnx.Rngs(seed))
    generator = np.random.default_rng(seed)
    for path, variable in nnx.to_flat_state(nnx.state(strategy, (nnx.Param, State))):
        values = 0.6 * generator.standard_normal(variable.shape)
        values = 1 + 0.5 * values if path[-1] == "scale" else np.ones_like(values) if path[-1] == "seen" else values
        values = 0.5 + np.abs(values) if path[-1] == "variance" else values
        variable[...] = jax.device_put(np.float32(values))
    return strategy


def outputs(strategy, x, context=Context()):
    """Of all tasks, and the states afterwards, in one compiled program."""
    graph, arrays = nnx.split(strategy)

    @jax.jit
    def run(arrays, x):
        module = nnx.merge(graph, arrays)
        return module(x, context), Functional.of(module)[2]

    return run(arrays, x)


def assert_equal(found, expected, **tolerance):
    assert set(found) == set(expected)
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], **({"rtol": 1e-5, "atol": 2e-6} | tolerance))


def training(weight=None, seed=0):
    return Context(train=True, rngs=jax.random.key(seed), weight=weight)


@IN_ORDER
def test_names_decide_the_order_and_not_positions(kind):
    make = functools.partial(kind, WIDTH, units=(5, 4), dropout=0.0)
    x, order = cases.rows(), ("return", "click", "buy")
    first, _ = outputs(make(TASKS, order=order, rngs=nnx.Rngs(0)), x)
    second, _ = outputs(make(order, rngs=nnx.Rngs(0)), x)
    assert_equal(first, second)
    assert np.abs(outputs(make(TASKS, rngs=nnx.Rngs(0)), x)[0]["return"] - first["return"]).max() > 1e-3


@IN_ORDER
@pytest.mark.parametrize("order", [["click"], ["click", "buy", "buy"], ["click", "buy", "sell"], "click"])
def test_an_order_of_other_tasks_is_an_error(kind, order):
    with pytest.raises(
        ConfigError, match=r"order is .*; expected all of the tasks \['click', 'buy', 'return'\], each once"
    ):
        kind(WIDTH, TASKS, order=order, rngs=nnx.Rngs(0))


def test_aitm_of_one_task_is_single_task():
    strategy = drawn(functools.partial(AITM, units=(5, 4), dropout=0.0), tasks=("buy",))
    assert {label(path) for path in Functional.of(strategy)[1]} == {"task/buy"}
    layers = [cases.layer(one.layers[0]) for one in strategy.task["buy"].network]
    x = cases.rows()
    assert_equal(strategy(x), references.single_task(x.astype(np.float64), ("buy",), {"buy": layers}))


def test_aitm_detached_has_no_gradient_in_the_tasks_before_and_the_same_values():
    make = functools.partial(AITM, WIDTH, TASKS, units=(4,), dropout=0.0)
    detached = make(detach_previous=True, rngs=nnx.Rngs(0))
    functional, params, rest = Functional.of(detached)
    x = cases.rows(number=32)

    @jax.jit
    @jax.jacrev
    def squares(params):
        found = functional.merge(params, rest)(x)
        return jnp.stack([(found[task] ** 2).sum() for task in TASKS])

    for path, derivatives in squares(params).items():
        reached = {task for task, one in zip(TASKS, derivatives, strict=True) if np.any(one != 0)}
        owner = label(path).removeprefix("task/")
        assert reached == ({owner} if owner != "shared" else {"buy", "return"}), path  # the attention alone is shared
    assert_equal(detached(x), make(rngs=nnx.Rngs(0))(x))


def test_aitm_weighs_two_and_takes_a_rate_for_each_layer():
    strategy = AITM(WIDTH, TASKS, units=(5, 4), dropout=(0.0, 0.5), rngs=nnx.Rngs(0))
    x = cases.rows()
    assert set(strategy.gates(x)) == {"buy/transfer", "return/transfer"}
    for weights in strategy.gates(x).values():
        np.testing.assert_allclose(weights.sum(axis=-1), 1.0, rtol=1e-5)
    last = strategy(jnp.ones((200, WIDTH)), training())["click"]
    assert 0.3 < np.mean(last == 0) and len(np.unique(np.asarray(last), axis=0)) <= 2**4  # no unit of the first is off
    with pytest.raises(
        ConfigError, match=r"dropout is \(0.1, 0.3, 0.3\) and units \[4\]; expected one rate, or one for"
    ):
        AITM(WIDTH, TASKS, units=(4,), rngs=nnx.Rngs(0))


def test_resflow_with_empty_networks_behind_the_first_repeats_it():
    strategy = ResFlow(WIDTH, TASKS, units=(5, 4), dropout=0.0, rngs=nnx.Rngs(0))
    for task in TASKS[1:]:
        for one in chains.part_of(strategy, task):
            one.linear.kernel[...] = jnp.zeros_like(one.linear.kernel[...])
    found = strategy(cases.rows())
    assert np.abs(found["click"]).max() > 0.1
    for task in TASKS[1:]:
        np.testing.assert_array_equal(found[task], found["click"])


@pytest.mark.parametrize("tasks", [TASKS, ("buy",)], ids=["switched off", "one task"])
def test_resflow_without_residuals_is_single_task(tasks):
    make = functools.partial(ResFlow, units=(5, 4), norm="none", features=len(tasks) == 1, logits=False, dropout=0.0)
    strategy, x = drawn(make, tasks), cases.rows()
    assert {label(path) for path in Functional.of(strategy)[1]} == {f"task/{task}" for task in tasks}
    for one in (one for network in strategy.task.values() for one in network):
        one.slope[...] = jnp.zeros(())  # PReLU is ReLU
    networks = {task: [cases.layer(one.linear) for one in strategy.task[task]] for task in tasks}
    assert_equal(strategy(x), references.single_task(x.astype(np.float64), tasks, networks))


def test_resflow_of_an_unknown_norm_is_an_error():
    with pytest.raises(ConfigError, match="norm is 'group'; expected one of"):
        ResFlow(WIDTH, TASKS, norm="group", rngs=nnx.Rngs(0))


def one_task_a_category(*arguments, **options):
    return HoME(*arguments, categories=ONE_EACH, levels=((5,), (4,)), rank=2, dropout=0.0, **options)


@pytest.mark.parametrize(
    "make, expected",
    [(CASES["resflow"].make, chains.resflow), (one_task_a_category, chains.home)],
    ids=["resflow", "home, one task a category"],
)
def test_evaluation_normalises_by_the_running_moments(make, expected):
    strategy, x = drawn(make), cases.rows()
    found, states = outputs(strategy, x)
    name, *arguments = expected(strategy)
    reference = getattr(references, name)(x.astype(np.float64), TASKS, *arguments)
    assert_equal(found, reference, rtol=1e-4, atol=1e-5)
    assert_equal(states, Functional.of(strategy)[2], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["resflow", "home, categories"])
def test_training_moves_all_moments_and_padding_rows_do_not_enter(name):
    strategy, x = drawn(CASES[name].make), cases.rows(number=8)
    alone, states = outputs(strategy, x, training())
    before = Functional.of(strategy)[2]
    assert before and all(np.any(states[path] != before[path]) for path in before if not path.endswith("seen"))
    weight = jnp.ones(11).at[8:].set(0)
    padded, with_padding = outputs(strategy, np.concatenate([x, np.full((3, WIDTH), 50, np.float32)]), training(weight))
    assert_equal({task: z[:8] for task, z in padded.items()}, alone, rtol=1e-4, atol=1e-5)
    assert_equal(with_padding, states)


def test_a_stacked_batch_norm_is_one_for_each_expert_and_sums_over_devices():
    x = np.random.default_rng(0).standard_normal((3, 8, 4)).astype(np.float32)
    x = x * np.float32([1, 2, 0.1])[:, None, None]
    norms = [BatchNorm(4) for _ in x]
    expected = np.stack([norm(one, training()) for norm, one in zip(norms, x, strict=True)])
    functional, *arrays = Functional.of(StackedBatchNorm(3, 4))

    def normalised(x, axis=None):
        module = functional.merge(*arrays)
        return module(x, training()._replace(axis=axis)), module.mean[...], module.variance[...]

    y, mean, variance = normalised(jnp.asarray(x))
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(mean, np.stack([norm.mean[...] for norm in norms]), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(variance, np.stack([norm.variance[...] for norm in norms]), rtol=1e-5)
    halves = jnp.asarray(x.reshape(3, 2, 4, 4).swapaxes(0, 1))
    parts = jax.vmap(functools.partial(normalised, axis="device"), axis_name="device")(halves)
    np.testing.assert_allclose(np.concatenate(parts[0], axis=1), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(parts[2][1], variance, rtol=1e-5)


def test_ltb_of_one_node_is_shared_bottom():
    strategy = drawn(functools.partial(LTB, units=(5, 4), num_nodes=1, dropout=0.0))
    bottom, x = SharedBottom(WIDTH, TASKS, units=(5, 4), dropout=0.0, rngs=nnx.Rngs(0)), cases.rows()
    for one, level in zip(bottom.bottom.layers, strategy.levels, strict=True):
        one.kernel[...], one.bias[...] = level.kernel[0], level.bias[0]
    expected = bottom(x)
    assert_equal(strategy(x), expected)
    assert_equal(strategy(x, training()), expected)


def routed(strategy, x, routes, of_tasks):
    return references.ltb_routed(x.astype(np.float64), TASKS, chains.ltb_levels(strategy), routes, of_tasks)


def test_ltb_reads_one_node_in_training_and_learns_which():
    strategy, x = drawn(functools.partial(LTB, units=(5, 4), dropout=0.0)), cases.rows()
    strategy.epoch[...] = jnp.float32(3.0)
    functional, params, rest = Functional.of(strategy)

    @functools.partial(jax.jit, static_argnames="train")
    def run(params, key, train=True):
        def loss(params):
            found = functional.merge(params, rest)(x, Context(train=train, rngs=jax.random.key(9), step_rngs=key))
            return sum((z**2).sum() for z in found.values()), found

        (_, found), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        return found, gradients

    eye, seen, learns = np.eye(3), set(), set()
    every = {
        (tuple(row), k): routed(strategy, x, [None, eye[list(row)]], dict.fromkeys(TASKS, eye[k]))
        for row in np.ndindex(3, 3, 3)
        for k in range(3)
        if all(j == 0 or i == k for i, j in enumerate(row))  # what task nodes do not read is node 0
    }
    for seed in range(6):
        found, gradients = run(params, jax.random.key(seed))
        for task in TASKS:
            nearest = min(every, key=lambda one: np.abs(every[one][task] - found[task]).max())
            np.testing.assert_allclose(found[task], every[nearest][task], rtol=1e-5, atol=1e-5)
            seen.add((task, nearest[1]))
        learns |= {path for path, gradient in gradients.items() if np.any(gradient != 0)}
    assert len(seen) > len(TASKS)  # draws differ from step to step
    assert learns == set(params)
    assert_equal(run(params, jax.random.key(0), train=False)[0], CASES["ltb"].expected(strategy, x))


def test_ltb_warms_up_on_means_and_then_cools():
    make = functools.partial(LTB, units=(5, 4), temperature=3.0, epochs=150, steps_per_epoch=1, dropout=0.0)
    strategy, x = drawn(make), cases.rows()
    strategy.epoch[...] = jnp.zeros(())
    mean = np.full((3, 3), 1 / 3)
    expected = routed(strategy, x, [None, mean], dict.fromkeys(TASKS, mean[0]))
    strategy(x)
    assert strategy.epoch[...] == 0  # evaluation is no training
    for epoch in range(3):
        found = strategy.common(x, training())
        assert strategy.epoch[...] == epoch + 1
        assert bool(found.warm) == (epoch < 1.5)
        np.testing.assert_allclose(found.temperature.values, 3.0 * 150 / 20 / np.sqrt(epoch + 1), rtol=1e-6)
        if epoch < 2:
            assert_equal({task: strategy.head(task, found) for task in TASKS}, expected)


def test_ltb_tells_the_tree_that_evaluation_reads():
    strategy, x = drawn(functools.partial(LTB, units=(5, 4, 4), num_nodes=2, dropout=0.0)), cases.rows()
    tree, gates, members = strategy.tree(), strategy.gates(x), strategy.gate_members()
    assert set(tree) == {*TASKS, *(f"node {i}/level {level}" for i in range(2) for level in (1, 2, 3))}
    for child, parent in tree.items():
        while parent != "x":  # up to the root, through one parent each
            assert child in TASKS or int(parent[-1]) == int(child[-1]) - 1
            child, parent = parent, tree[parent]
    for gate, weights in gates.items():
        owner, level = gate.split("/")
        child = owner if owner in TASKS else gate
        assert sorted(np.asarray(weights)) == [0, 1]
        assert tree[child] == f"{members[gate][int(np.argmax(weights))]}/level {int(level.split()[-1]) - 1}"


def test_home_gives_a_task_alone_in_its_category_what_only_it_reads():
    """The gates and second experts of the category; its first experts go into the shared stream, and so to all tasks."""
    strategy = one_task_a_category(WIDTH, TASKS, rngs=nnx.Rngs(0))
    params = set(Functional.of(strategy)[1])
    assert not any(path.startswith("inner/") for path in params)
    for task in TASKS:
        assert f"task/{task}/category/experts/networks/layers/0/kernel" in params
        assert f"task/{task}/category/gates/all/kernel" in params
    assert all(label(path) == "shared" for path in params if path.startswith("first/"))
    alone = HoME(WIDTH, ("buy",), rngs=nnx.Rngs(0))  # one task keeps the labels of several
    assert any(path.startswith("inner/") for path in Functional.of(alone)[1])


def test_home_of_one_category_for_all_is_the_default():
    make = functools.partial(HoME, WIDTH, TASKS, levels=((5,), (4,)), dropout=0.0)
    x = cases.rows()
    assert_equal(make(categories={"any": TASKS}, rngs=nnx.Rngs(0))(x), make(rngs=nnx.Rngs(0))(x), rtol=0, atol=0)


def test_a_feature_gate_without_second_factor_lets_all_through():
    gate = HoME(WIDTH, TASKS, levels=((5,), (4,)), rngs=nnx.Rngs(0)).first_shared.feature_gate
    assert gate.up.shape == (2, 4, WIDTH)
    assert np.abs(gate(cases.rows()) - 1).max() > 1e-3
    gate.up[...] = jnp.zeros_like(gate.up[...])
    np.testing.assert_allclose(gate(cases.rows()), 1.0, rtol=1e-6)


@pytest.mark.parametrize(
    "categories",
    [
        {"a": ["click", "buy"]},
        {"a": ["click", "buy"], "b": ["buy", "return"]},
        {"a": TASKS, "b": ["sell"]},
        {"a": TASKS, "b": []},
    ],
    ids=["missing", "twice", "unknown", "empty"],
)
def test_categories_that_do_not_share_out_the_tasks_are_an_error(categories):
    with pytest.raises(ConfigError, match="categories is .* in one of them, and none empty. Change it"):
        HoME(WIDTH, TASKS, categories=categories, rngs=nnx.Rngs(0))


def test_home_has_two_levels():
    with pytest.raises(ConfigError, match="expected two lists of widths"):
        HoME(WIDTH, TASKS, levels=((5,),), rngs=nnx.Rngs(0))
