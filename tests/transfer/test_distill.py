"""Distillation: values by hand, what rows count, and what it adds to a step; of outputs and of representations."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtl_jax.errors import ConfigError
from mtl_jax.sharing import ResFlow
from mtl_jax.tasks import Task
from mtl_jax.train import Optimizer
from mtl_jax.train.state import Functional
from mtl_jax.transfer import Distill, FeatureDistill, FineTune

BINARY = Task("click", "binary")
KIND = Task("kind", "multiclass", classes=("a", "b", "c"))


def view(*tasks, weight):
    """Of a model whose outputs are its parameters, and so are its features."""
    return types.SimpleNamespace(
        axis=None,
        tasks=tasks,
        weight=jnp.asarray(weight, jnp.float32),
        outputs=lambda params, train: params,
        features=lambda params, train: params["h"],
    )


def distance(strategy, task, teacher, student, weight=None):
    """The penalty and its gradient by the student's outputs, in float64."""
    with jax.enable_x64(True):
        teacher, student = jnp.asarray(teacher), jnp.asarray(student)
        rows = view(task, weight=np.ones(len(teacher)) if weight is None else weight)

        def penalty(student):
            return strategy.penalty({task.name: student}, {"teacher": {task.name: teacher}}, rows)

        return jax.tree.map(np.asarray, jax.value_and_grad(penalty)(student))


def test_values_of_a_binary_task_by_hand():
    value, gradient = distance(Distill(1.0, 2.0), BINARY, [2.0, -1.0], [0.0, 1.0])
    np.testing.assert_allclose(value, 0.46680681, rtol=1e-7)
    np.testing.assert_allclose(gradient, [-0.23105858, 0.24491866], rtol=1e-7)


def softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


def reference(task, teacher, student, temperature, weight):
    """Row by row, from the definition."""
    total, count = 0.0, 0
    for t, s, w in zip(teacher, student, weight, strict=True):
        if w == 0:
            continue
        count += 1
        if task.kind == "regression":
            total += (s - t) ** 2
        elif task.kind == "multiclass":
            p, q = softmax(t / temperature), softmax(s / temperature)
            total += temperature**2 * np.sum(p * np.log(p / q))
        else:
            for one, other in zip(np.ravel(t), np.ravel(s), strict=True):
                p, q = (1 / (1 + np.exp(-z / temperature)) for z in (one, other))
                total += temperature**2 * (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q)))
    return total / max(count, 1)


@pytest.mark.parametrize(
    ("task", "shape"),
    [
        (BINARY, (6,)),
        (KIND, (6, 3)),
        (Task("tags", "multilabel", classes=("a", "b")), (6, 2)),
        (Task("spend", "regression"), (6,)),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_values_are_means_over_rows_of_a_weight_above_zero(task, shape, temperature):
    """Whatever the weight: rows of the target without a label count too."""
    rng = np.random.default_rng(0)
    teacher, student = rng.normal(size=shape), rng.normal(size=shape)
    weight = [1, 0, 0.5, 2, 1, 0]
    value, gradient = distance(Distill(0.7, temperature), task, teacher, student, weight)
    np.testing.assert_allclose(value, 0.7 * reference(task, teacher, student, temperature, weight), rtol=1e-8)
    assert not np.any(np.asarray(gradient)[[1, 5]])
    twice = distance(
        Distill(0.7, temperature), task, np.tile(teacher.T, 2).T, np.tile(student.T, 2).T, np.tile(weight, 2)
    )
    np.testing.assert_allclose(twice[0], value, rtol=1e-12)


def test_a_binary_task_is_one_of_two_classes():
    teacher, student = np.array([2.0, -1.0, 0.3]), np.array([0.0, 1.0, -2.0])
    pair = Task("kind", "multiclass", classes=("no", "yes"))

    def logits(z):
        return np.stack([np.zeros_like(z), z], axis=1)

    value, gradient = distance(Distill(), BINARY, teacher, student)
    of_classes = distance(Distill(), pair, logits(teacher), logits(student))
    np.testing.assert_allclose(value, of_classes[0], rtol=1e-10)
    np.testing.assert_allclose(gradient, of_classes[1][:, 1], rtol=1e-10)


def test_at_a_high_temperature_logits_are_matched():
    teacher, student = np.array([2.0, -1.0, 0.5, 3.0]), np.array([0.0, 1.0, -2.0, 3.0])
    gradient = distance(Distill(1.0, 1e4), BINARY, teacher, student)[1]
    np.testing.assert_allclose(gradient, (student - teacher) / (4 * 4), rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("task", [BINARY, KIND], ids=lambda task: task.kind)
def test_a_student_that_is_the_teacher_stays(task):
    logits = np.random.default_rng(0).normal(size=(5, 3) if task is KIND else 5)
    value, gradient = distance(Distill(), task, logits, logits)
    np.testing.assert_allclose(value, 0, atol=1e-15)
    np.testing.assert_allclose(gradient, 0, atol=1e-15)


def test_large_logits_are_finite():
    value, gradient = distance(Distill(1.0, 1.0), BINARY, [800.0, -800.0], [-800.0, 800.0])
    np.testing.assert_allclose([value, *gradient], [800, -0.5, 0.5], rtol=1e-10)


def test_kinds_without_a_distance_are_refused():
    task = Task("stars", "ordinal", classes=("1", "2", "3"))
    with pytest.raises(ConfigError, match="no distance for the ordinal task 'stars'"):
        distance(Distill(), task, np.zeros((2, 2)), np.zeros((2, 2)))


@pytest.mark.parametrize("strategy", [Distill(), FeatureDistill()], ids=lambda s: type(s).__name__)
def test_the_teacher_runs_as_in_evaluation_and_gets_no_gradient(strategy):
    seen = []

    def read(params, train):
        seen.append(train)
        return params["z"] if train else params["z"] * 2

    rows = types.SimpleNamespace(
        axis=None,
        tasks=(BINARY,),
        weight=jnp.ones(2),
        outputs=lambda params, train: {"click": read(params, train)},
        features=lambda params, train: read(params, train)[:, None],
    )
    student, teacher = {"z": jnp.array([2.0, -4.0])}, {"z": jnp.array([1.0, -2.0])}

    def penalty(params, teacher):
        return strategy.penalty(params, {"teacher": teacher}, rows)

    value, gradients = jax.value_and_grad(penalty, argnums=(0, 1))(student, teacher)
    assert sorted(seen) == [False, True]
    assert abs(value) < 1e-6 and not np.any(gradients[1]["z"])
    assert np.any(jax.grad(penalty)({"z": jnp.zeros(2)}, teacher)["z"])


def test_features_are_compared_by_half_their_mean_squared_distance():
    rng = np.random.default_rng(1)
    taught, student, weight = rng.normal(size=(5, 3)), rng.normal(size=(5, 3)), np.array([1, 2, 0, 0.5, 0])
    expected = np.mean([np.sum((student[row] - taught[row]) ** 2) / 2 for row in (0, 1, 3)])
    rows, kept = view(weight=weight), {"teacher": {"h": jnp.asarray(taught)}}
    value = FeatureDistill(0.3).penalty({"h": jnp.asarray(student)}, kept, rows)
    np.testing.assert_allclose(value, 0.3 * expected, rtol=1e-6)
    start = {"h": jnp.asarray(taught)}
    value, gradient = jax.value_and_grad(lambda params: FeatureDistill().penalty(params, kept, rows))(start)
    assert value == 0 and not np.any(gradient["h"])


@pytest.mark.parametrize("strategy", [Distill(0.8, 3.0), FeatureDistill(0.8)], ids=lambda s: type(s).__name__)
def test_a_step_is_that_of_fine_tuning_and_the_gradient_of_the_distance(
    strategy, make_model, make_step, make_batch, arrays_of, perturbed
):
    """Towers are reached by the distance of outputs, not by that of representations."""
    model, batch, rate = make_model(), make_batch(20), 0.1
    functional, loaded, rest = Functional.of(model)

    def outputs(params):
        return functional.merge(params, rest)(batch)

    def features(params):
        model = functional.merge(params, rest)
        return model.common(model.inputs(batch))

    def penalty(params):
        if isinstance(strategy, FeatureDistill):
            return 0.8 / 2 * jnp.mean(jnp.sum(jnp.square(features(params) - features(loaded)), axis=1))
        teacher, student = outputs(loaded), outputs(params)
        p, q = (
            jnp.stack([jax.nn.sigmoid(-z["click"] / 3), jax.nn.sigmoid(z["click"] / 3)]) for z in (teacher, student)
        )
        divergence = 9 * jnp.mean(jnp.sum(p * jnp.log(p / q), axis=0))
        return 0.8 * (divergence + jnp.mean(jnp.square(student["spend"] - teacher["spend"])))

    found = {}
    for one in (FineTune(), strategy):
        step, state = make_step(model, one, optimizer=Optimizer(optax.identity(), rate))
        before = perturbed(state, 0.1)
        found[type(one)] = jax.jit(step)(before, batch)[0].params
    gradient = jax.jit(jax.grad(penalty))(before.params)
    for path, plain in found[FineTune].items():
        expected = plain - rate * gradient[path]
        np.testing.assert_allclose(found[type(strategy)][path], expected, rtol=1e-4, atol=1e-6, err_msg=path)
    reached = {path.split("/")[0] for path in gradient if np.any(gradient[path])}
    assert reached == {"tables", "sharing"} | ({"task"} if isinstance(strategy, Distill) else set())


@pytest.mark.parametrize("strategy", [Distill(), FeatureDistill()], ids=lambda s: type(s).__name__)
def test_a_teacher_keeps_the_running_moments_that_it_came_with(strategy, make_model, make_step, make_batch):
    """Those of the student move; in training it reads the moments of the batch, so the update does not depend on them."""
    model = make_model(sharing=ResFlow, units=(4,), logits=False, dropout=0.0)
    found = []
    for one in (FineTune(), strategy):
        step, state = make_step(model, one, optimizer=Optimizer(optax.identity(), 0.1))
        paths = step.functional.state_paths
        moved = {path: state.rest[path] + 1 for path in paths}
        run = jax.jit(step)
        updates = [run(state._replace(rest=state.rest | rest), make_batch(20))[0].params for rest in ({}, moved)]
        found.append(all(np.array_equal(updates[0][path], updates[1][path]) for path in updates[0]))
    assert paths and found == [True, True]
