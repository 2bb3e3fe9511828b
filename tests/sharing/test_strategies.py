"""What every strategy owes: its equations, its labels, a complete cut, rows that do not mix."""

import functools

import cases
import cases_chains
import cases_domains
import cases_stateful_domains
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mtl_jax.model import label
from mtl_jax.sharing import CGC, PLE, Context, MMoE, SharedBottom, SingleTask
from mtl_jax.train.cut_model import CutModel
from mtl_jax.train.gradients import TaskGradients, weighted_sum
from mtl_jax.train.objective import TaskLoss
from mtl_jax.train.state import Functional

TASKS = cases.TASKS
CASES = cases.CASES | cases_chains.CASES | cases_domains.CASES | cases_stateful_domains.CASES
EVERY = pytest.mark.parametrize("name", CASES)
ONE_OF_EACH = [name for name in CASES if "," not in name or name == "ple, three levels"]
# Other options of the same classes: their equations are checked in every run, the rest in the slow one.
EVERY_CLASS = pytest.mark.parametrize(
    "name", [name if name in ONE_OF_EACH else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
SOME = ("mmoe", "ple", "cross_stitch", "dselect_k", "ltb", "resflow", "star", "m3oe")
SOME_CLASSES = pytest.mark.parametrize(
    "name", [name if name in SOME else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
ANY_TASKS = pytest.mark.parametrize("name", [name for name in ONE_OF_EACH if CASES[name].any_tasks])


CONTEXT = cases.context()


def make(name, *arguments, **options):
    return cases.make(CASES[name], *arguments, **options)


def output_sum(outputs, task):
    return (outputs[task] ** 2).sum()


def run(strategy, x, order=slice(None)):
    """All outputs for some of the first rows, in one compiled program."""
    context = cases.context(len(x))

    @jax.jit
    def outputs(x):
        return strategy(x, context._replace(domain=context.domain[order], prior=context.prior[order]))

    return outputs(x[order])


def flat(strategy):
    """The strategy as a function of its parameters by path."""
    functional, params, rest = Functional.of(strategy)
    return params, lambda params: functional.merge(params, rest)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.slow)])
@EVERY
def test_equals_its_reference(name, dtype):
    """NumPy loops in float64 over rows, tasks, experts and levels."""
    x = cases.rows()
    with jax.enable_x64(dtype == "float64"):
        strategy = make(name)
        params, build = flat(strategy)
        params = {path: np.asarray(array, dtype) for path, array in params.items()}
        outputs = jax.jit(lambda params, x: build(params)(x, CONTEXT))(params, np.asarray(x, dtype))
        tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == "float32" else {"rtol": 1e-10, "atol": 1e-10}
        for task, expected in CASES[name].expected(strategy, x).items():
            np.testing.assert_allclose(outputs[task], expected, **tolerance)


@pytest.mark.parametrize("tasks", [("buy",), tuple("edcba")], ids=["one", "five"])
@ANY_TASKS
def test_equals_its_reference_for_other_tasks(name, tasks):
    strategy, x = make(name, tasks), cases.rows()
    outputs = run(strategy, x)
    assert set(outputs) == set(tasks)
    for task, expected in CASES[name].expected(strategy, x).items():
        np.testing.assert_allclose(outputs[task], expected, rtol=1e-5, atol=1e-5)


@SOME_CLASSES
def test_shapes_and_bfloat16(name):
    strategy, x = make(name), cases.rows()
    params, build = flat(strategy)
    narrow = build({path: jax.device_put(np.asarray(array, jnp.bfloat16)) for path, array in params.items()})
    exactly = run(strategy, x)
    for task, z in run(narrow, x).items():
        exact = np.asarray(exactly[task])
        assert z.shape == exact.shape == (5, 4) and strategy.out_features == 4
        np.testing.assert_allclose(np.asarray(z, np.float32), exact, rtol=0.1, atol=0.05 * (1 + np.abs(exact).max()))


@EVERY_CLASS
def test_labels_are_what_gradients_say(name):
    """A parameter is a task's own exactly if no other task's output depends on it, and every parameter is reached."""
    params, build = flat(make(name))
    x = cases.rows(number=64)  # so that no unit is off in all rows
    context = cases.context(len(x))

    def squared(p):
        outputs = build(p)(x, context)
        return jnp.stack([output_sum(outputs, task) for task in TASKS])

    squares = jax.device_get(jax.jit(jax.jacrev(squared))(params))
    reached = {path: {t for t, g in zip(TASKS, squares[path], strict=True) if np.abs(g).max() > 0} for path in params}
    assert all(reached.values()), [path for path, tasks in reached.items() if not tasks]
    owners = {path: label(path).removeprefix("task/") for path in params if label(path).startswith("task/")}
    assert owners == {path: next(iter(tasks)) for path, tasks in reached.items() if len(tasks) == 1}


@EVERY_CLASS
def test_common_reads_nothing_of_a_task_and_heads_nothing_shared(name):
    """Beside what they may read, not a number lies in the parameters."""
    strategy, x = make(name), cases.rows()
    params, build = flat(strategy)

    def without(keep):
        return build(
            {path: array if keep(label(path)) else np.nan * np.asarray(array) for path, array in params.items()}
        )

    outputs, common = run(strategy, x), jax.jit(lambda x: strategy.common(x, CONTEXT))(x)
    if "detached" not in name:  # which reads other tasks' representations, without a gradient
        shared_only = jax.jit(lambda x: without(lambda kind: kind == "shared").common(x, CONTEXT))(x)
        for one, two in zip(jax.tree.leaves(common), jax.tree.leaves(shared_only), strict=True):
            np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6)
    for task in TASKS:
        own_only = without(lambda kind, task=task: kind == f"task/{task}")
        z = jax.jit(own_only.head, static_argnums=0)(task, common)
        np.testing.assert_allclose(z, outputs[task], rtol=1e-5, atol=1e-6)


@EVERY_CLASS
def test_the_cut_is_complete(name):
    """Weighted gradients at the cut, pulled down once, are the weighted gradient of all parameters and of the input."""
    strategy, x = make(name), cases.rows()
    params, build = flat(strategy)
    params = params | {"x": x}
    weights = np.array([0.3, -1.2, 2.0])

    def merged(some):
        return build({path: some.get(path, array) for path, array in params.items() if path != "x"})

    def common(below, _):
        return merged(below).common(below["x"], CONTEXT)

    def head(task):
        def loss(own, cut, _):
            total = (merged(own).head(task, cut) ** 2).sum()
            return TaskLoss(total, total, jnp.ones(()))

        return loss

    def in_two_parts(params):
        model = CutModel.of(common, {task: head(task) for task in TASKS}, params)
        below, own = weighted_sum(model, TaskGradients(*model.at_cut(None)), weights, weights)
        return below | {path: gradient for part in own.values() for path, gradient in part.items()}

    def whole(params):
        outputs = merged(params)(params["x"], CONTEXT)
        return sum(weight * output_sum(outputs, task) for weight, task in zip(weights, TASKS, strict=True))

    with jax.enable_x64(True):
        params = {path: np.asarray(array, np.float64) for path, array in params.items()}
        found = jax.jit(in_two_parts)(params)
        for path, expected in jax.jit(jax.grad(whole))(params).items():
            np.testing.assert_allclose(found[path], expected, rtol=1e-9, atol=1e-9, err_msg=path)


@EVERY_CLASS
def test_a_row_does_not_depend_on_the_others(name):
    strategy, x = make(name), cases.rows()
    order = np.array([3, 0, 4])
    together = run(strategy, x)
    for task, z in run(strategy, x, order).items():
        np.testing.assert_allclose(z, together[task][order], rtol=1e-5, atol=1e-6)


@SOME_CLASSES
def test_one_trace_for_all_runs_side_by_side(name):
    """A leading run axis of the parameters is a loop over runs."""
    x, traced = cases.rows(), []
    (first, build), (second, _) = flat(make(name)), flat(make(name, seed=3))

    @jax.jit
    def outputs(params, x):
        traced.append(1)
        return build(params)(x, CONTEXT)

    both = {path: np.stack([first[path], second[path]]) for path in first}
    together = jax.jit(jax.vmap(lambda params: build(params)(x, CONTEXT)))(both)
    for index, params in enumerate((first, second)):
        alone = outputs(params, x)
        for task in TASKS:
            np.testing.assert_allclose(together[task][index], alone[task], rtol=2e-5, atol=1e-5)
    assert len(traced) == 1


@SOME_CLASSES
def test_saved_arrays_give_the_same_predictions(name, tmp_path):
    x, strategy = cases.rows(), make(name)
    functional, params, rest = Functional.of(strategy)
    np.savez(tmp_path / "arrays.npz", **{path.replace("/", "|"): array for path, array in (params | rest).items()})
    with np.load(tmp_path / "arrays.npz") as saved:
        arrays = {path.replace("|", "/"): jnp.asarray(saved[path]) for path in saved.files}
    other, _, _ = Functional.of(make(name, seed=5))
    assert other == functional and hash(other) == hash(functional)  # one compiled program for both
    expected = run(strategy, x)
    for task, z in run(other.merge(arrays), x).items():
        np.testing.assert_array_equal(z, expected[task])


@EVERY
def test_what_gates_weigh_is_named(name):
    strategy, x = make(name), cases.rows()
    gates, members = jax.jit(lambda x: strategy.gates(x, CONTEXT))(x), strategy.gate_members()
    assert set(gates) == set(members)
    for gate, weights in gates.items():
        owner = gate.split("/")[0]
        assert owner in (*TASKS, "shared", "all") or owner.startswith("node ")
        assert weights.shape in ((len(members[gate]),), (len(x), len(members[gate]))), gate
        assert len(set(members[gate])) == len(members[gate])


@pytest.mark.parametrize(
    "name", ["omoe", "mmoe", "cgc", "ple", "ple, three levels", "adatt", "dselect_k", "dbmtl, experts"]
)
def test_weights_of_gates_add_up_to_one(name):
    gates = jax.jit(make(name).gates)(cases.rows())
    assert gates
    for weights in gates.values():
        np.testing.assert_allclose(weights.sum(axis=-1), 1.0, rtol=1e-5)


@pytest.mark.parametrize(
    "name", ["mmoe", "cgc", "ple", "ple, three levels", "adatt", "cross_stitch", "sluice", "mtan, no norm"]
)
def test_gates_are_those_of_the_forward_pass(name):
    """With every gate of the last level on its first member only, a task's representation is that member's."""
    strategy, x = make(name), cases.rows()
    for task in TASKS:
        before = np.asarray(strategy(x)[task])
        seen = {gate: np.asarray(w) for gate, w in strategy.gates(x).items() if gate.startswith(f"{task}/")}
        for path, variable in nnx.to_flat_state(nnx.state(strategy.task[task], nnx.Param)):
            if path[-1] in ("kernel", "stitch", "alpha"):
                variable[...] = 0.5 * variable[...]
        assert np.abs(np.asarray(strategy(x)[task]) - before).max() > 1e-4
        after = strategy.gates(x)
        assert any(np.abs(np.asarray(after[gate]) - weights).max() > 1e-5 for gate, weights in seen.items())


@pytest.mark.parametrize("name", [name for name in CASES if "," not in name])
def test_dropout_is_random_in_training_only(name):
    make_one = functools.partial(CASES[name].make.func, **CASES[name].make.keywords | {"dropout": 0.5})
    module, x = make_one(cases.WIDTH, TASKS, rngs=nnx.Rngs(0)), cases.rows(number=32)
    task = TASKS[1]
    context = cases.context(len(x))

    @functools.partial(jax.jit, static_argnames="train")
    def outputs(train=False, seed=None):
        one = nnx.clone(module)  # because training moves states
        return one(x, context._replace(train=train, rngs=None if seed is None else jax.random.key(seed)))[task]

    one, two = outputs(train=True, seed=0), outputs(train=True, seed=1)
    assert not np.allclose(one, two)
    np.testing.assert_array_equal(outputs(), outputs(seed=0))
    np.testing.assert_array_equal(one, outputs(train=True, seed=0))


@pytest.mark.parametrize("name", ["single_task", "mmoe", "cgc", "mtan", "soft_sharing"])
def test_a_tasks_own_part_starts_from_its_name(name):
    """Neither the number nor the order of the other tasks changes its initial values."""
    one, other = (CASES[name].make(cases.WIDTH, tasks, rngs=nnx.Rngs(0)) for tasks in (TASKS, TASKS[:0:-1]))
    for task in TASKS[1:]:
        own, same = (jax.tree.leaves(nnx.state(module.task[task])) for module in (one, other))
        for a, b in zip(own, same, strict=True):
            np.testing.assert_array_equal(a, b)
    own, others = (jax.tree.leaves(nnx.state(one.task[task])) for task in TASKS[1:])
    assert any(np.any(a != b) for a, b in zip(own, others, strict=True))


def test_single_task_with_private_tables_reads_an_input_of_its_own():
    strategy = SingleTask(cases.WIDTH, TASKS, units=(7, 4), dropout=0.0, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).standard_normal((5, 3, cases.WIDTH)).astype(np.float32)
    expected = cases.references.single_task(
        {task: x[:, k].astype(np.float64) for k, task in enumerate(TASKS)}, TASKS, cases.by_task(strategy, cases.mlp)
    )
    for task, z in strategy(x).items():
        np.testing.assert_allclose(z, expected[task], rtol=1e-5, atol=1e-6)


def test_single_tasks_drop_units_of_their_own():
    """Networks with equal weights, under one key: the masks go by the task's name."""
    strategy = SingleTask(6, TASKS, units=(16,), dropout=0.5, share_embeddings=True, rngs=nnx.Rngs(0))
    nnx.update(strategy.task["buy"], nnx.state(strategy.task["click"]))
    x = jnp.ones((9, 6))
    outputs = strategy(x)
    np.testing.assert_array_equal(outputs["buy"], outputs["click"])
    outputs = strategy(x, Context(train=True, rngs=jax.random.key(0)))
    assert np.any(outputs["buy"] != outputs["click"])


def count(name):
    return sum(p.size for p in jax.tree.leaves(nnx.state(make(name), nnx.Param)))


def test_parameter_counts():
    """By hand: inputs of 6, layers of 7 and 4 with biases, three tasks."""
    network, gate, k = 6 * 7 + 7 + 7 * 4 + 4, 6, 3
    assert count("shared_bottom") == network
    assert count("single_task") == count("soft_sharing") == k * network
    assert count("omoe") == 3 * network + 3 * gate
    assert count("mmoe") == 3 * network + k * 3 * gate
    assert count("cgc") == (k * 1 + 3) * network + k * (1 + 3) * gate
    assert count("cgc, unequal") == (2 + 1 + 0 + 2) * network + (4 + 3 + 2) * gate
    assert count("ple, one level") == (k * 2 + 1) * network + k * 3 * gate
    first, second = 6 * 7 + 7, 7 * 5 + 5 + 5 * 4 + 4
    lower = (k * 1 + 2) * first + (k * (1 + 2) + (k * 1 + 2)) * 6
    assert count("ple") == lower + (k * 2 + 1) * second + k * (2 + 1) * 7
    assert count("cross_stitch") == k * network + 2 * k * k
    assert count("sluice") == k * (6 * 4 + 4 + 2 * (4 * 4 + 4)) + 3 * 4 * k * k + k * 3
    trunk = 6 * 4 + 4 + 4 * 4 + 4
    assert count("mtan, no norm") == trunk + k * (4 * 4 + 4 + 4 * 4 + 4)
    assert count("dselect_k") == 4 * network + k * (6 * 2 + 2 + 2 * 6 * 2 + 2 * 2)
    assert count("snr_aver") == 3 * (6 * 4 + 4) + k * (4 * 4 + 4 + 3)
    assert count("adatt, no residual") == (k * 2 + 1) * (6 * 4 + 4) + k * (k * 2 + 1) * 6


def test_a_gate_of_the_mmoe_paper_is_linear():
    strategy = make("mmoe")
    strategy.task["buy"].kernel[...] = jnp.zeros((6, 3))
    x = cases.rows()
    np.testing.assert_allclose(strategy(x)["buy"], strategy.experts(x).mean(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("strategy", [SharedBottom, MMoE, CGC, PLE])
def test_defaults_are_the_public_recipe(strategy):
    module = strategy(8, TASKS, rngs=nnx.Rngs(0))
    assert module.out_features == 256
