"""Trivial predictors against their rules, written out as loops."""

import dataclasses

import numpy as np
import pytest

from mtl_jax import metrics
from mtl_jax.errors import ConfigError, LabelError
from mtl_jax.metrics import baselines
from mtl_jax.metrics.baselines import weighted_median

MEANS = tuple(baselines.GROUPS)


def train_rows(training, name):
    """(weight, target in original units, user, item, domain) of each observed training row."""
    task, train = training.schema.task(name), training.train
    labels = train.labels[name]
    targets = metrics.to_original(task, labels) if task.kind == "regression" else labels.astype(float)
    weights = train.weight * train.task_weight.get(name, np.ones(train.num_rows))
    rows = train.mask[name] & (weights > 0)
    return [array[rows] for array in (weights, targets, train.user, train.item, train.domain)]


def written_out(name, weights, targets, keys, part_keys, num_rows):
    """p plus the shrunk mean residual of each group in turn; ``keys`` are the groups of the training rows."""
    mean = np.average(targets, weights=weights)
    predictions, residuals = np.full(num_rows, mean), targets - mean
    for train_key, part_key in zip(keys, part_keys, strict=True):
        shrink = 0 if name == "base_rate_by_domain" else 5
        effect = {
            k: weights[train_key == k] @ residuals[train_key == k] / (weights[train_key == k].sum() + shrink)
            for k in set(train_key)
        }
        predictions = predictions + [effect.get(k, 0.0) for k in part_key]
        residuals = residuals - [effect[k] for k in train_key]
    return predictions


@pytest.fixture(scope="module")
def outputs(training, part):
    return baselines.fit_predict(training, part)


@pytest.mark.parametrize("name", MEANS)
def test_binary_and_regression_means(training, part, outputs, name):
    for task_name in ("click", "rating", "spend"):
        task = training.schema.task(task_name)
        weights, targets, user, item, domain = train_rows(training, task_name)
        keys = {"user": user, "item": item, "domain": domain}
        expected = written_out(
            name,
            weights,
            targets,
            [keys[key] for key in baselines.GROUPS[name]],
            [getattr(part, key) for key in baselines.GROUPS[name]],
            part.num_rows,
        )
        if task.kind == "binary":
            floor = 0.01 if name == "user_item_mean" else 1e-7
            actual, expected = metrics.sigmoid(outputs[name][task_name]), np.clip(expected, floor, 1 - floor)
        else:
            actual = metrics.to_original(task, outputs[name][task_name])
            expected = np.clip(expected, targets.min(), targets.max())
        np.testing.assert_allclose(actual, expected, rtol=1e-9)


def test_user_item_mean_is_clipped(training, part, outputs):
    """Probabilities to [.01, .99]; ratings to their range, here where only good items of keen users have a high one."""
    probabilities = metrics.sigmoid(outputs["user_item_mean"]["click"])
    assert probabilities.min() == pytest.approx(0.01) and probabilities.max() == pytest.approx(0.99)
    task, train = training.schema.task("rating"), training.train
    ratings = metrics.from_original(task, np.where((train.user < 10) & (train.item < 7), 5.0, 1.0))
    extreme = dataclasses.replace(train, labels=train.labels | {"rating": ratings})
    fitted = baselines.fit_predict(dataclasses.replace(training, train=extreme), part, names=("user_item_mean",))
    predictions = metrics.to_original(task, fitted["user_item_mean"]["rating"])
    assert predictions.min() == pytest.approx(1) and 3 < predictions.max() < 5
    assert np.isclose(predictions, 1)[(part.user >= 10) & (part.item >= 7)].all()


@pytest.mark.parametrize("name", MEANS)
def test_class_rates(training, part, outputs, name):
    """Log-probabilities of one-against-rest means; without clipping they sum to 1 by themselves."""
    weights, targets, user, item, domain = train_rows(training, "grade")
    keys = {"user": user, "item": item, "domain": domain}
    columns = [
        written_out(
            name,
            weights,
            (targets == number).astype(float),
            [keys[key] for key in baselines.GROUPS[name]],
            [getattr(part, key) for key in baselines.GROUPS[name]],
            part.num_rows,
        )
        for number in range(3)
    ]
    expected = np.maximum(np.stack(columns, axis=1), 0.02 / 3 if name == "user_item_mean" else 1e-7)
    expected /= expected.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(np.exp(outputs[name]["grade"]), expected, rtol=1e-5)
    np.testing.assert_allclose(np.exp(outputs[name]["grade"]).sum(axis=1), np.ones(part.num_rows))


def test_constant_outputs_score_exactly_the_rows_of_the_table(training, part):
    """The trivial predictor of each kind, written as constants, is its baseline; its AUC is ½."""
    table = baselines.evaluate_baselines(training, part, names=("global_mean", "median"))
    click, grade, rating, spend = training.schema.tasks
    weights, targets, *_ = train_rows(training, "click")
    rate = np.average(targets, weights=weights)
    class_weights, classes, *_ = train_rows(training, "grade")
    rates = np.bincount(classes.astype(int), class_weights) / class_weights.sum()
    constants = {
        "click": np.full(part.num_rows, np.log(rate / (1 - rate))),
        "grade": np.tile(np.log(rates), (part.num_rows, 1)),
    }
    medians = {}
    for task in (rating, spend):
        weights, targets, *_ = train_rows(training, task.name)
        constants[task.name] = np.full(part.num_rows, metrics.from_original(task, np.average(targets, weights=weights)))
        order = np.argsort(targets)
        middle = targets[order][np.searchsorted(np.cumsum(weights[order]), weights.sum() / 2)]
        medians[task.name] = np.full(part.num_rows, metrics.from_original(task, middle))
    for name, values in (("global_mean", constants), ("median", medians)):
        tasks = [task for task in (click, grade, rating, spend) if task.name in values]
        expected, _ = metrics.evaluate(tasks, values, part)
        assert set(table[name]) == set(expected)
        for task in tasks:
            assert table[name][task.name] == pytest.approx(expected[task.name], rel=1e-12)
    assert table["global_mean"]["click"]["auc"] == table["global_mean"]["click"]["gauc_impr"] == 0.5
    assert table["global_mean"]["grade"]["accuracy"] == pytest.approx(
        metrics.accuracy(
            part.labels["grade"][part.mask["grade"]],
            np.full(part.mask["grade"].sum(), rates.argmax()),
            part.weight[part.mask["grade"]],
        )
    )
    assert metrics.mean_gain(training.schema.tasks, table["global_mean"], table["global_mean"]) == 0


def test_names_follow_the_schema(training, part, outputs):
    assert tuple(outputs) == baselines.NAMES
    assert set(outputs["median"]) == {"rating", "spend"}
    bare = dataclasses.replace(training.train, user=None, item=None, domain=None)
    without = dataclasses.replace(training, train=bare, schema=training.schema.with_tasks(["click"]))
    assert tuple(baselines.fit_predict(without, part)) == ("global_mean", "logistic")
    with pytest.raises(ConfigError, match=r"unknown baselines \['item_mean'\]"):
        baselines.fit_predict(without, part, names=("item_mean",))


def test_unseen_and_missing_groups_have_no_effect(training, part):
    """A user beyond every training code, and the code -1 of no user, get the mean; -1 in train teaches nothing."""
    strange = dataclasses.replace(part, user=np.where(np.arange(part.num_rows) % 2, 10_000, -1))
    both = baselines.fit_predict(training, strange, names=("global_mean", "user_mean"))
    np.testing.assert_allclose(both["user_mean"]["click"], both["global_mean"]["click"], rtol=1e-12)
    nobody = dataclasses.replace(training, train=dataclasses.replace(training.train, user=training.train.user * 0 - 1))
    taught = baselines.fit_predict(nobody, part, names=("global_mean", "user_mean"))
    np.testing.assert_allclose(taught["user_mean"]["rating"], taught["global_mean"]["rating"], rtol=1e-12)


def test_labels_of_the_scored_part_are_not_read(training, part, outputs):
    poisoned = dataclasses.replace(part, labels={name: values * 0 - 7 for name, values in part.labels.items()})
    again = baselines.fit_predict(training, poisoned)
    for name, tasks in outputs.items():
        for task, values in tasks.items():
            np.testing.assert_array_equal(again[name][task], values)


def test_a_rate_of_zero_stays_finite(training, part):
    """A task without a positive in train: logits of 1e-7, no division by zero anywhere."""
    labels = training.train.labels | {"click": np.zeros(training.train.num_rows, np.float32)}
    flat = dataclasses.replace(training, train=dataclasses.replace(training.train, labels=labels))
    for name, tasks in baselines.fit_predict(flat, part).items():
        if "click" in tasks:
            assert np.isfinite(tasks["click"]).all(), name
            assert metrics.sigmoid(tasks["click"]).max() <= 0.0100001


def test_a_task_without_training_labels_is_an_error(training, part):
    mask = training.train.mask | {"click": np.zeros(training.train.num_rows, bool)}
    empty = dataclasses.replace(training, train=dataclasses.replace(training.train, mask=mask))
    with pytest.raises(LabelError, match="task 'click' has no observed training row"):
        baselines.fit_predict(empty, part, names=("global_mean",))


def test_weighted_median():
    rng = np.random.default_rng(0)
    for size in (1, 2, 7, 8):
        values, repeats = rng.normal(size=size), rng.integers(1, 4, size)
        assert weighted_median(values, np.ones(size)) == pytest.approx(np.median(values))
        assert weighted_median(values, repeats) == pytest.approx(np.median(values.repeat(repeats)))


@pytest.mark.data
@pytest.mark.slow
def test_movielens_floors():
    """Item and user biases on 1,000,209 ratings: AUC and log loss of click and like, RMSE of the rating."""
    from mtl_jax.data import load

    dataset = load("movielens_1m", tasks=("click", "like", "rating"))
    table = baselines.evaluate_baselines(
        dataset.for_training(), dataset.open_test(), names=("global_mean", "user_item_mean")
    )
    click, like, rating = (table["user_item_mean"][name] for name in ("click", "like", "rating"))
    assert (click["auc"], click["logloss"]) == (pytest.approx(0.7926, abs=1e-4), pytest.approx(0.5439, abs=1e-4))
    assert (like["auc"], like["logloss"]) == (pytest.approx(0.8023, abs=1e-4), pytest.approx(0.4283, abs=1e-4))
    assert (rating["rmse"], rating["mae"]) == (pytest.approx(0.9069, abs=1e-4), pytest.approx(0.7173, abs=1e-4))
    assert table["global_mean"]["rating"]["rmse"] == pytest.approx(1.1175, abs=1e-4)
