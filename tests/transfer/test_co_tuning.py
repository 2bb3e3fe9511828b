"""Co-tuning: the relation of classes, the term it makes, and what it refuses."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtl_jax.data.dataset import TrainingData
from mtl_jax.errors import ConfigError, Interrupted
from mtl_jax.model import label
from mtl_jax.tasks import Task
from mtl_jax.train import Member, Optimizer, fit, fit_many
from mtl_jax.train.session import Session
from mtl_jax.train.setup import Setup
from mtl_jax.transfer import CoTuning, FineTune

BINARY = Task("click", "binary")
KIND = Task("kind", "multiclass", classes=("a", "b", "c"))
TASKS = (BINARY, KIND)
COPY = "aux/copy/"
RUN = {"epochs": 2, "batch_size": 8, "patience": 0, "steps_per_call": 1, "checkpoint_seconds": 0}


@pytest.fixture(scope="module")
def model(schema, make_model):
    return make_model(3, of=dataclasses.replace(schema, tasks=TASKS))


@pytest.fixture(scope="module")
def data(schema, make_rows):
    parts = make_rows(22, 0, tasks=TASKS), make_rows(20, 50, tasks=TASKS)
    return TrainingData("classes", dataclasses.replace(schema, tasks=TASKS), *parts, "0" * 64)


@pytest.fixture(scope="module")
def member_of(model, arrays_of):
    def build(strategy=CoTuning(), **options):
        origin = dict.fromkeys(arrays_of(model), True)
        return Member(
            lambda: model,
            seed=1,
            adaptation=strategy,
            origin=origin,
            optimizer=Optimizer(learning_rate=0.03),
            **options,
        )

    return build


def probabilities(task, z):
    z = np.asarray(z, np.float64)
    z = np.stack([np.zeros_like(z), z], axis=1) if task.kind == "binary" else z
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def relation(task, outputs, labels, counted):
    """Class by class, from the definition."""
    said = probabilities(task, outputs)
    return np.stack([said[(labels == c) & counted].mean(axis=0) for c in range(said.shape[1])])


def view(task, labels, counted, outputs=lambda params: params):
    """Of a model whose outputs are its parameters, or what is said of them."""
    return types.SimpleNamespace(
        axis=None,
        tasks=(task,),
        labels={task.name: labels},
        counted={task.name: jnp.asarray(counted)},
        outputs=lambda params, train: outputs(params),
    )


@pytest.mark.parametrize("batch_size", [22, 8])
def test_the_relation_is_the_mean_of_what_the_source_says_of_the_training_rows_of_a_class(
    batch_size, data, model, member_of
):
    """Whatever the batches; of rows of weight 0 and of unobserved labels nothing is heard."""
    weight = np.where(np.arange(22) % 5 == 1, 0, data.train.weight).astype(np.float32)
    some = dataclasses.replace(data, train=dataclasses.replace(data.train, weight=weight))
    setup = Setup.of(some, adaptation=CoTuning(), **RUN | {"batch_size": batch_size})
    _, state = setup.build(member_of(), setup.stages[0], model, study=True)
    found, outputs = state.kept.arrays["relation"], model(setup.train)
    assert np.isnan(data.train.labels["click"]).any()
    for task in TASKS:
        counted = data.train.mask[task.name] & (weight > 0)
        expected = relation(task, outputs[task.name], data.train.labels[task.name], counted)
        np.testing.assert_allclose(found[task.name], expected, rtol=1e-5)
        np.testing.assert_allclose(np.sum(found[task.name], axis=1), 1, rtol=1e-6)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.kind)
def test_a_perfect_source_relates_each_class_to_itself(task):
    classes = np.arange(12) % (2 if task is BINARY else 3)
    logits = 200 * classes - 100 if task is BINARY else 200 * np.eye(3)[classes]
    rows = view(task, jnp.asarray(classes), np.ones(12, bool))
    params = {task.name: jnp.asarray(logits, jnp.float32)}
    found = CoTuning().study(params, {}, lambda function: function(rows))["relation"][task.name]
    np.testing.assert_allclose(found, np.eye(found.shape[0]), atol=1e-6)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.kind)
def test_the_term_is_the_cross_entropy_of_the_sources_towers_by_the_relation(task):
    """A mean over rows whose label counts; the others get no gradient, whatever stands there for a label."""
    rng = np.random.default_rng(0)
    classes = 2 if task is BINARY else 3
    own, logits = rng.normal(size=(2, 6) if task is BINARY else (2, 6, 3))
    counted = np.array([1, 0, 1, 1, 0, 1], bool)
    labels = np.where(counted, np.arange(6) % classes, np.nan if task is BINARY else -1)
    q = rng.dirichlet(np.ones(classes), size=classes)
    p = probabilities(task, logits)
    expected = -0.7 * np.mean([q[int(labels[row])] @ np.log(p[row]) for row in np.flatnonzero(counted)])

    with jax.enable_x64(True):
        tower, kept = f"task/{task.name}/tower", {"relation": {task.name: jnp.asarray(q)}}
        rows = view(task, jnp.asarray(labels), counted, lambda params: {task.name: params[tower]})

        def penalty(old):
            return CoTuning(0.7).penalty({tower: jnp.asarray(own), f"{COPY}{tower}": old}, kept, rows)

        value, gradient = jax.value_and_grad(penalty)(jnp.asarray(logits))
    np.testing.assert_allclose(value, expected, rtol=1e-8)
    by_hand = 0.7 / counted.sum() * (p - q[np.where(counted, labels, 0).astype(int)]) * counted[:, None]
    np.testing.assert_allclose(gradient, by_hand[:, 1] if task is BINARY else by_hand, rtol=1e-7, atol=1e-12)


def test_a_step_pulls_on_what_both_towers_read_and_on_the_old_towers(model, make_step, make_batch, studied):
    """The target's towers are free of the term, and so they move as in fine-tuning; the old ones by the term alone."""
    batch, moved = make_batch(20, tasks=TASKS), {}
    for strategy in (FineTune(), CoTuning(5.0)):
        step, state = make_step(model, strategy, tasks=TASKS, optimizer=Optimizer(optax.identity(), 0.1))
        state = studied(step, state, batch)
        after = jax.jit(step)(state, batch)[0].params
        moved[type(strategy)] = {path: after[path] - array for path, array in state.params.items()}
    plain, found = moved[FineTune], moved[CoTuning]
    for path, change in plain.items():
        assert np.allclose(found[path], change, rtol=1e-5, atol=1e-7) == label(path).startswith("task/"), path
    old = found.keys() - plain.keys()
    assert old == {f"{COPY}{path}" for path in plain if path.startswith("task/")}
    assert all(np.any(found[path]) for path in old)


@pytest.mark.parametrize("way", ["dense", "sparse"])
def test_the_relation_does_not_depend_on_how_tables_are_updated(way, model, make_step, make_batch, studied):
    batch = make_batch(20, tasks=TASKS)
    step, state = make_step(model, CoTuning(), tasks=TASKS, table_updates={"user": way})
    state = studied(step, state, batch)
    assert bool(state.tables) == (way == "sparse")
    expected = relation(KIND, model(batch)["kind"], batch["labels"]["kind"], np.asarray(batch["mask"]["kind"]) > 0)
    np.testing.assert_allclose(state.kept.arrays["relation"]["kind"], expected, rtol=1e-5)
    after, _ = jax.jit(step)(state, batch)
    jax.tree.map(np.testing.assert_array_equal, after.kept, state.kept)


def test_a_run_that_was_stopped_asks_the_source_only_once(data, member_of, arrays_of, assert_same, tmp_path):
    options = {"adaptation": CoTuning()} | RUN
    setup = Setup.of(data, **options)
    undisturbed = Session(setup, member_of()).run()
    assert any(key[0] == "study" for key in setup.programs)
    asked = iter(range(1, 100))
    with pytest.raises(Interrupted):
        stopping = dataclasses.replace(setup, should_stop=lambda: next(asked) == 2)
        Session(stopping, member_of(checkpoints=tmp_path)).run()
    later = Setup.of(data, **options)
    resumed = Session(later, member_of(checkpoints=tmp_path)).run()
    assert_same(arrays_of(resumed.model), arrays_of(undisturbed.model))
    assert undisturbed.monitor["step"] > 3
    assert later.programs and not any(key[0] == "study" for key in later.programs)


def test_runs_side_by_side_are_those_runs_alone(data, member_of, arrays_of):
    members = [member_of(CoTuning(weight)) for weight in (0.5, 8.0)]
    options = RUN | {"adaptation": CoTuning()}
    together, alone = (dict(fit_many(members, data, axis=axis, **options)) for axis in ("vmap", "map"))
    results = [[arrays_of(runs[number].model) for number in (0, 1)] for runs in (together, alone)]
    for found, expected in zip(*results, strict=True):
        for path in expected:
            np.testing.assert_allclose(found[path], expected[path], rtol=2e-5, atol=2e-5, err_msg=path)
    assert any(np.any(results[1][0][path] != results[1][1][path]) for path in results[1][0])


def test_classes_without_a_training_row_are_listed(data, model, arrays_of):
    """Where a label is unobserved or its row has no weight, it is no row of the class."""
    labels = {"click": np.zeros(22, np.float32), "kind": np.resize([0, 2], 22).astype(np.int32)}
    labels["click"][3], labels["kind"][4] = 1, 1
    mask = {task: np.arange(22) != 3 for task in labels}
    weight = (np.arange(22) != 4).astype(np.float32)
    part = dataclasses.replace(data.train, labels=labels, mask=mask, weight=weight)
    with pytest.raises(ConfigError, match=r"classes \{'click': \['1'\], 'kind': \['b'\]\} have no training row"):
        origin = dict.fromkeys(arrays_of(model), True)
        fit(model, dataclasses.replace(data, train=part), adaptation=CoTuning(), origin=origin, **RUN)


def test_tasks_without_classes_are_refused(make_model, make_data, arrays_of):
    model = make_model()
    with pytest.raises(ConfigError, match="no classes for the regression task 'spend'; expected binary or multiclass"):
        fit(model, make_data(), adaptation=CoTuning(), origin=dict.fromkeys(arrays_of(model), True), **RUN)


def test_towers_have_to_come_from_the_source(data, model, arrays_of):
    origin = {path: not path.startswith("task/kind") for path in arrays_of(model)}
    with pytest.raises(
        ConfigError, match=r"those of \['kind'\] did not come from there; expected towers of the source"
    ):
        fit(model, data, adaptation=CoTuning(), origin=origin, **RUN)
