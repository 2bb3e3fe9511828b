"""Ordinal, count, zero-inflated and multilabel tasks: their metrics, baselines and linear models, on one small world."""

import dataclasses

import numpy as np
import pytest
import sklearn.linear_model
import sklearn.metrics

from mtl_jax import metrics
from mtl_jax.data.dataset import Encoded, TrainingData
from mtl_jax.data.schema import Numeric, Schema
from mtl_jax.metrics import baselines
from mtl_jax.metrics.logistic import fit_linear
from mtl_jax.tasks import Task

TASKS = (
    Task("stars", "ordinal", classes=("1", "2", "3", "4")),
    Task("visits", "count"),
    Task("calls", "count", loss="negative_binomial"),
    Task("spend", "zero_inflated"),
    Task("tags", "multilabel", classes=("a", "b", "c")),
)
NAMES = [task.name for task in TASKS]


def encode(num_rows, seed):
    rng = np.random.default_rng(seed)
    user, item = rng.integers(0, 12, num_rows), rng.integers(0, 9, num_rows)
    dense = rng.normal(size=(num_rows, 2)).astype(np.float32)
    z = np.sin(user) + np.cos(item) + dense[:, 0]
    noisy = lambda *shape: rng.logistic(size=(num_rows, *shape))  # noqa: E731
    labels = {
        "stars": np.digitize(z + 0.3 * noisy(), [-1.5, 0, 1.5]).astype(np.int32),
        "visits": rng.poisson(np.exp(0.5 * z)).astype(np.float32),
        "calls": rng.poisson(np.exp(0.3 * z) * rng.gamma(1.0, 1.0, num_rows)).astype(np.float32),
        "spend": np.where(z + 0.3 * noisy() > 0, 1 + z.clip(0) + 0.1 * rng.random(num_rows), 0).astype(np.float32),
        "tags": (z[:, None] * [1, -1, 0.5] + 0.3 * noisy(3) > 0.5).astype(np.float32),
    }
    mask = {name: rng.random(of.shape) < 0.85 for name, of in labels.items()}
    return Encoded(
        ids=np.zeros((num_rows, 0), np.int32),
        dense=dense,
        bags={},
        sequences={},
        labels={name: np.where(mask[name], of, 0).astype(of.dtype) for name, of in labels.items()},
        mask=mask,
        task_weight={"tags": rng.choice([1.0, 2.0], num_rows).astype(np.float32)},
        weight=rng.choice([0.0, 0.5, 1.0], num_rows).astype(np.float32),
        domain=rng.integers(0, 2, num_rows).astype(np.int32),
        user=user.astype(np.int32),
        item=item.astype(np.int32),
    )


@pytest.fixture(scope="module")
def world():
    schema = Schema((Numeric("x0"), Numeric("x1")), (), TASKS, domain="d", domains=("n", "s"), user="user", item="item")
    return TrainingData("kinds", schema, encode(500, 0), encode(150, 1), "identity")


@pytest.fixture(scope="module")
def part():
    return encode(150, 2)


@pytest.fixture(scope="module")
def outputs(world, part):
    return baselines.fit_predict(world, part)


def rows_of(encoded, name):
    """(weight, labels) of the observed rows of positive weight; of cells for ``tags``."""
    weight = encoded.weight * encoded.task_weight.get(name, 1.0)
    mask = encoded.mask[name] & ((weight > 0) if name != "tags" else (weight > 0)[:, None])
    weight = np.broadcast_to(weight[:, None], mask.shape) if name == "tags" else weight
    labels = encoded.labels[name][mask]
    return np.float64(weight[mask]), labels if labels.dtype == np.int32 else np.float64(labels)


def random_outputs(num_rows):
    rng = np.random.default_rng(7)
    found = {task.name: rng.normal(size=(num_rows, *task.output_shape)) for task in TASKS}
    return found | {"stars": -np.sort(-found["stars"], axis=1)}


@pytest.mark.parametrize("task", TASKS, ids=NAMES)
def test_metrics_are_those_of_the_observed_weighted_rows(part, task):
    outputs = random_outputs(part.num_rows)[task.name]
    values, support = metrics.evaluate([task], {task.name: outputs}, part)
    values, support = values[task.name], support[task.name]
    assert list(values) == list(metrics.METRICS[task.kind]) and values[task.metric] is not None
    w, y = rows_of(part, task.name)
    weight = part.weight * part.task_weight.get(task.name, 1.0)
    mask = part.mask[task.name] & ((weight > 0) if task.kind != "multilabel" else (weight > 0)[:, None])
    a = outputs[mask]
    assert all(facts["n"] == len(y) for facts in support.values())
    if task.kind == "ordinal":
        classes = (a >= 0).sum(axis=1)
        expected = {
            "qwk": sklearn.metrics.cohen_kappa_score(y, classes, weights="quadratic", sample_weight=w),
            "accuracy": sklearn.metrics.accuracy_score(y, classes, sample_weight=w),
            "macro_f1": sklearn.metrics.f1_score(y, classes, average="macro", sample_weight=w),
            "mae": sklearn.metrics.mean_absolute_error(y, classes, sample_weight=w),
            "logloss": metrics.ordinal_logloss(y, a, w),
        }
    elif task.kind == "count":
        means = np.exp(a if task.loss == "poisson" else a[:, 0])
        expected = {
            "poisson_deviance": sklearn.metrics.mean_poisson_deviance(y, means, sample_weight=w),
            "rmse": sklearn.metrics.root_mean_squared_error(y, means, sample_weight=w),
            "mae": sklearn.metrics.mean_absolute_error(y, means, sample_weight=w),
        }
    elif task.kind == "zero_inflated":
        scale = 1e-2 + np.log1p(np.exp(a[:, 2]))
        means = np.exp(a[:, 1] + scale**2 / 2) / (1 + np.exp(-a[:, 0]))
        expected = {
            "rmse": sklearn.metrics.root_mean_squared_error(y, means, sample_weight=w),
            "mae": sklearn.metrics.mean_absolute_error(y, means, sample_weight=w),
            "auc": sklearn.metrics.roc_auc_score(y > 0, a[:, 0], sample_weight=w),
        }
        assert support["rmse"]["positives"] == (y > 0).sum()
    else:
        columns = []
        for c in range(3):
            seen = mask[:, c]
            label, score = part.labels["tags"][seen, c], outputs[seen, c]
            facts = {"sample_weight": weight[seen]}
            auc = sklearn.metrics.roc_auc_score(label, score, **facts)
            columns.append((auc, sklearn.metrics.f1_score(label, score >= 0, **facts)))
        auc, f1 = np.mean(columns, axis=0)
        expected = {
            "auc": auc,
            "logloss": sklearn.metrics.log_loss(y, 1 / (1 + np.exp(-a)), sample_weight=w),
            "accuracy": sklearn.metrics.accuracy_score(y, a >= 0, sample_weight=w),
            "macro_f1": f1,
        }
        assert (support["auc"]["groups_used"], support["auc"]["groups_skipped"]) == (3, 0)
        assert support["logloss"]["positives"] == y.sum()
    assert values == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("task", TASKS, ids=NAMES)
def test_what_stands_under_the_mask_is_not_read(part, task):
    outputs = random_outputs(part.num_rows)
    expected, _ = metrics.evaluate([task], outputs, part)
    labels = part.labels[task.name]
    hidden = np.where(part.mask[task.name], labels, -7 if task.kind == "ordinal" else np.nan).astype(labels.dtype)
    poisoned = dataclasses.replace(part, labels=part.labels | {task.name: hidden})
    assert metrics.evaluate([task], outputs, poisoned)[0] == expected


def test_labels_without_both_classes_are_left_out_and_counted():
    task, ones = TASKS[-1], np.ones((4, 3), bool)
    labels = np.array([[1, 0, 1], [1, 0, 0], [1, 0, 1], [1, 0, 0]])
    logits = np.array([[1.0, -1, 2], [1, -1, 1], [1, -1, 3], [-1, -1, -1]])
    values, support = metrics.evaluate_task(task, logits, labels, ones)
    assert values["auc"] == 1 and support["auc"]["groups_skipped"] == 2
    assert values["macro_f1"] == pytest.approx((6 / 7 + 0.8) / 2) and support["macro_f1"]["groups_skipped"] == 1
    values, support = metrics.evaluate_task(task, logits[:, :2].repeat([1, 2], axis=1), labels[:, [0, 1, 1]], ones)
    assert values["auc"] is None and support["auc"]["reason"] == "no label has both classes"


def test_a_row_mask_hides_all_labels_of_a_row(part):
    task, rows = TASKS[-1], np.arange(150) % 2 == 0
    outputs, labels = random_outputs(150)["tags"], part.labels["tags"]
    by_row = metrics.evaluate_task(task, outputs, labels, rows)
    assert by_row == metrics.evaluate_task(task, outputs, labels, np.tile(rows[:, None], 3))


def test_widths_of_one_and_wrong_shapes():
    one = Task("tags", "multilabel", classes=("only",))
    labels, ones = np.array([[1], [0]]), np.ones((2, 1), bool)
    assert metrics.evaluate_task(one, np.array([1.0, 0.0]), labels, ones)[0]["auc"] == 1
    with pytest.raises(ValueError, match=r"outputs \(2, 2\) and labels \(2,\); expected \(2, 3\) and \(2,\)"):
        metrics.evaluate_task(TASKS[0], np.zeros((2, 2)), np.zeros(2), np.ones(2, bool))


def test_diverged_outputs_have_a_reason(part):
    outputs = random_outputs(part.num_rows) | {"spend": np.full((150, 3), 1e200)}
    values, support = metrics.evaluate(TASKS, outputs, part)
    assert values["spend"]["rmse"] is None and support["spend"]["rmse"]["reason"] == "the value is not finite"


def test_slices_are_the_metrics_of_their_rows(part):
    outputs, inside = random_outputs(part.num_rows), part.domain == 1
    slices = metrics.evaluate_slices(TASKS, outputs, part, ("n", "s"))
    for task in TASKS:
        alone = metrics.evaluate_task(
            task,
            outputs[task.name][inside],
            part.labels[task.name][inside],
            part.mask[task.name][inside],
            weight=(part.weight * part.task_weight.get(task.name, 1.0))[inside],
        )[0]
        assert slices["domain=s"][task.name] == alone


def test_constant_outputs_score_exactly_the_row_of_the_table(world, part):
    """The trivial predictor of each kind, written as constants: rates, median class, mean, share of y > 0."""
    table = baselines.evaluate_baselines(world, part, names=("global_mean",))["global_mean"]
    constants = {}
    for task in TASKS:
        w, y = rows_of(world.train, task.name)
        mean, count = np.average(y, weights=w), part.num_rows
        if task.kind == "ordinal":
            rates = np.bincount(y, w) / w.sum()
            at_least = 1 - np.cumsum(rates)[:-1]
            row = np.log(at_least / (1 - at_least))
            median = np.searchsorted(np.cumsum(rates), 0.5)
            assert (row >= 0).sum() == median
        elif task.kind == "count":
            row = np.log(mean) if task.loss == "poisson" else np.array([np.log(mean), 0.7])
        elif task.kind == "zero_inflated":
            share, scale = np.average(y > 0, weights=w), 1e-2 + np.log1p(np.exp(0.4))
            row = np.array([np.log(share / (1 - share)), np.log(mean / share) - scale**2 / 2, 0.4])
        else:
            weight = np.float64(world.train.weight * world.train.task_weight["tags"])
            cells = world.train.mask["tags"] * weight[:, None]
            rates = (cells * world.train.labels["tags"]).sum(0) / cells.sum(0)
            row = np.log(rates / (1 - rates))
        constants[task.name] = np.broadcast_to(row, (count, *np.shape(row)))
    expected, _ = metrics.evaluate(TASKS, constants, part)
    assert set(table) == set(expected)
    for task in TASKS:
        assert table[task.name] == pytest.approx(expected[task.name], rel=1e-9)
    assert table["stars"]["qwk"] == 0 and table["tags"]["auc"] == table["spend"]["auc"] == 0.5
    assert metrics.mean_gain(TASKS, table, table) == 0


def test_groups_tell_more_than_the_mean(world, part, outputs):
    """User and item effects drive every label: both together gain over the mean in the likelihood or error."""
    table = baselines.evaluate_baselines(world, part)
    for task, metric in (("stars", "logloss"), ("visits", "poisson_deviance"), ("spend", "rmse"), ("tags", "logloss")):
        assert table["user_item_mean"][task][metric] < table["global_mean"][task][metric], task
    assert all(np.isfinite(values).all() for of in outputs.values() for values in of.values())
    for task in TASKS[1:4]:
        means = metrics.mean_amounts(task, outputs["user_item_mean"][task.name])
        w, y = rows_of(world.train, task.name)
        assert means.min() >= 0.01 * np.average(y, weights=w) * (1 - 1e-9)
        assert means.max() <= y.max() * (1 + 1e-9)


def test_user_means_by_hand(world, part, outputs):
    w, y = rows_of(world.train, "visits")
    keep = world.train.mask["visits"] & (world.train.weight > 0)
    users, mean = world.train.user[keep], np.average(y, weights=w)
    effect = [w[users == u] @ (y[users == u] - mean) / (w[users == u].sum() + 5) for u in range(12)]
    expected = np.clip(mean + np.array(effect)[part.user], 0.01 * mean, y.max())
    np.testing.assert_allclose(np.exp(outputs["user_mean"]["visits"]), expected, rtol=1e-6)


def test_which_kinds_have_a_linear_baseline(world, part, outputs):
    assert set(outputs["logistic"]) == {"visits", "calls", "tags"}
    assert "median" not in outputs
    ordinal = dataclasses.replace(world, schema=world.schema.with_tasks(["stars"]))
    assert "logistic" not in baselines.fit_predict(ordinal, part)
    table = baselines.evaluate_baselines(world, part)
    assert table["logistic"]["visits"]["poisson_deviance"] < table["global_mean"]["visits"]["poisson_deviance"]
    assert table["logistic"]["tags"]["auc"] > 0.6


def test_poisson_regression_is_that_of_scikit_learn():
    """scikit-learn minimises half the mean deviance plus (alpha/2) |w|^2, so its alpha is our penalty over n."""
    rng = np.random.default_rng(3)
    features = rng.normal(size=(300, 4))
    counts = rng.poisson(np.exp(features @ [0.5, -0.3, 0.2, 0] + 0.3)).astype(float)
    model = sklearn.linear_model.PoissonRegressor(alpha=2 / 300, tol=1e-10, max_iter=1000).fit(features, counts)
    ours = fit_linear("count", features, counts[:, None], np.ones(300), 2.0, tolerance=1e-14, max_iterations=500)
    np.testing.assert_allclose(ours[1:, 0], model.coef_, atol=1e-5)
    assert ours[0, 0] == pytest.approx(model.intercept_, abs=1e-5)


def test_a_label_that_nobody_observed_is_a_coin(world, part):
    """In train; its baseline must not divide by zero."""
    mask = world.train.mask["tags"].copy()
    mask[:, 1] = False
    train = dataclasses.replace(world.train, mask=world.train.mask | {"tags": mask})
    outputs = baselines.fit_predict(dataclasses.replace(world, train=train), part)
    for name, of in outputs.items():
        np.testing.assert_array_equal(of["tags"][:, 1], 0, err_msg=name)
