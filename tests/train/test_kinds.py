"""All kinds of tasks in one model: they train together and beat the trivial predictor."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import nnx

import mtl_jax
from mtl_jax import losses, metrics
from mtl_jax.balancing import equal
from mtl_jax.data.batching import as_batch
from mtl_jax.nn import Tower
from mtl_jax.sharing import SharedBottom
from mtl_jax.tasks import KINDS, Task
from mtl_jax.train import Optimizer, Step, fit


@pytest.fixture(scope="module")
def data():
    return mtl_jax.data.load("synthetic", recipe="kinds", num_rows=960, dim=3, seed=1).for_training()


def make_model(schema, seed=0):
    return mtl_jax.MultiTaskModel(
        schema,
        sharing=functools.partial(SharedBottom, units=(16,), dropout=0.0),
        towers=functools.partial(Tower, units=(8,), dropout=0.0),
        rngs=nnx.Rngs(seed),
    )


@pytest.fixture(scope="module")
def fitted(data):
    return fit(
        make_model(data.schema), data, epochs=15, batch_size=80, patience=0, optimizer=Optimizer(learning_rate=1e-2)
    )


@pytest.fixture(scope="module")
def trivial(data):
    return metrics.baselines.evaluate_baselines(data, data.valid, names=("global_mean",))["global_mean"]


def test_every_kind_beats_the_trivial_predictor(data, fitted, trivial):
    assert {task.kind for task in data.schema.tasks} == set(KINDS)
    for task in data.schema.tasks:
        value, base = fitted.metrics["valid"][task.name][task.metric], trivial[task.name][task.metric]
        sign = 1 if task.higher_is_better else -1
        assert sign * (value - base) > 0.1 * abs(base), task.name
    assert fitted.monitor["value"] > 0.3


def test_training_moves_the_cutpoints_and_keeps_their_order(data, fitted):
    before = make_model(data.schema).task["stars"].outputs.cutpoints
    after = fitted.model.task["stars"].outputs.cutpoints
    assert np.abs(after - before).max() > 0.1 and (np.diff(after) > 1e-4 * (1 - 1e-3)).all()


def test_the_result_gives_metrics_the_outputs_of_the_loss(data, fitted):
    """predict() gives what losses read: their mean over the part is the metric of the same name."""
    outputs = fitted.predict(data.valid)
    assert {name: out.shape[1:] for name, out in outputs.items()} == {t.name: t.output_shape for t in data.schema.tasks}
    for name in ("stars", "tags"):
        task, mask = data.schema.task(name), data.valid.mask[name]
        elements = losses.element_losses(task, outputs[name], data.valid.labels[name], mask)
        expected = fitted.metrics["valid"][name]["logloss"]
        assert float(elements.sum() / mask.sum()) == pytest.approx(expected, rel=1e-5)
        np.testing.assert_array_equal(np.asarray(elements)[~mask], 0)


def test_other_losses_train_too():
    tasks = (Task("stars", "ordinal", loss="coral"), Task("visits", "count", loss="negative_binomial"))
    dataset = mtl_jax.data.load("synthetic", recipe="kinds", num_rows=960, dim=3, seed=1)
    built = mtl_jax.data.Dataset.from_frame(
        dataset.frame, dataclasses.replace(dataset.schema, tasks=tasks), dict(dataset.splits)
    ).for_training()
    result = fit(make_model(built.schema), built, epochs=6, batch_size=80, patience=0,
                 optimizer=Optimizer(learning_rate=1e-2))  # fmt: skip
    trivial = metrics.baselines.evaluate_baselines(built, built.valid, names=("global_mean",))["global_mean"]
    assert result.metrics["valid"]["stars"]["qwk"] > 0.3
    deviance = result.metrics["valid"]["visits"]["poisson_deviance"]
    assert deviance < 0.8 * trivial["visits"]["poisson_deviance"]
    # The counts are Poisson given the inputs: less dispersed than at the start, where the variance is mu + mu^2.
    assert float(result.model.task["visits"].outputs.alpha) < 0.98


def test_decay_leaves_parameters_of_losses_alone(data):
    """A step with zero gradient (every label hidden) and decay moves towers, not cutpoints."""
    schema = data.schema.with_tasks(["stars"])
    step, state = Step.of(
        make_model(schema),
        schema.tasks,
        key=jax.random.key(0),
        balancer=equal(),
        optimizer=Optimizer(learning_rate=0.1, weight_decay=0.5),
    )
    batch = jax.tree.map(lambda column: column[:8], as_batch(data.train))
    hidden = batch | {"mask": {name: 0 * mask for name, mask in batch["mask"].items()}}
    after, _ = jax.jit(step)(state, hidden)
    moved = {path for path in state.params if np.any(after.params[path] != state.params[path])}
    assert "task/stars/outputs/beta" not in moved and "task/stars/tower/head/kernel" in moved
