"""The linear baseline against scikit-learn's minimisers, and its choices."""

import dataclasses

import numpy as np
import pytest
import scipy.sparse
from sklearn.linear_model import LogisticRegression, Ridge

from mtl_jax import metrics
from mtl_jax.metrics import logistic as module
from mtl_jax.metrics.logistic import fit_linear, logistic


@pytest.fixture(scope="module")
def problem():
    """Correlated dense columns, one-hot columns of uneven frequency, and targets of the three kinds."""
    rng = np.random.default_rng(0)
    dense = rng.normal(size=(400, 3)) @ np.array([[1, 0.9, 0.5], [0, 0.2, 0.5], [0, 0, 1]])
    group = np.minimum(rng.geometric(0.3, 400), 12)
    features = np.concatenate([dense, group[:, None] == np.arange(1, 13)], axis=1).astype(np.float64)
    score = features @ rng.normal(size=15) + rng.logistic(size=400)
    classes = np.digitize(score, [-1, 1])
    targets = {
        "binary": (score > 0.5).astype(np.float64)[:, None],
        "multiclass": (classes[:, None] == np.arange(3)).astype(np.float64),
        "regression": score[:, None],
    }
    return features, targets, rng.uniform(0.2, 2, 400)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("penalty", [0.1, 10.0])
@pytest.mark.parametrize("kind", ["binary", "multiclass", "regression"])
def test_minimiser_is_that_of_scikit_learn(problem, kind, penalty, sparse):
    features, targets, weights = problem
    labels = targets[kind].argmax(axis=1) if kind == "multiclass" else targets[kind][:, 0]
    model = (
        Ridge(alpha=penalty)
        if kind == "regression"
        else LogisticRegression(C=1 / penalty, solver="newton-cg", tol=1e-10, max_iter=2000)
    )
    model.fit(features, labels, sample_weight=weights)
    ours = fit_linear(
        kind,
        scipy.sparse.csr_matrix(features) if sparse else features,
        targets[kind],
        weights,
        penalty,
        tolerance=1e-14,
        max_iterations=1000,
    )
    np.testing.assert_allclose(ours[1:].T, np.atleast_2d(model.coef_), atol=1e-4)
    # The intercepts of classes are free up to a common shift.
    shift = ours[0].mean() - np.mean(model.intercept_) if kind == "multiclass" else 0
    np.testing.assert_allclose(ours[0] - shift, np.atleast_1d(model.intercept_), atol=1e-4)


def test_few_iterations_suffice(problem):
    """The default tolerance and iteration limit leave the objective within 1e-5 of its minimum."""
    features, targets, weights = problem

    def objective(coefficients):
        scores = (coefficients[0] + features @ coefficients[1:])[:, 0]
        return (
            metrics.logloss(targets["binary"][:, 0], scores, weights) * weights.sum()
            + np.sum(coefficients[1:] ** 2) / 2
        )

    quick = fit_linear("binary", features, targets["binary"], weights, 1.0)
    exact = fit_linear("binary", features, targets["binary"], weights, 1.0, tolerance=1e-14, max_iterations=1000)
    assert objective(exact) <= objective(quick) <= objective(exact) * (1 + 1e-5)


def test_no_penalty_strength_of_the_grid_is_better_on_validation(training):
    """The returned outputs are those of the best strength up to the first that is worse than its predecessor."""
    outputs = logistic(training, training.valid)
    rows = np.arange(training.train.num_rows)
    columns = module._Columns(training.schema, training.train, rows)
    train, valid = columns.of(training.train), columns.of(training.valid)
    assert scipy.sparse.issparse(train) and train.shape[1] == 3 + 20 + 15
    task = training.schema.task("rating")
    used = training.train.mask["rating"]
    losses = []
    for penalty in module.ONE_HOT_PENALTIES:
        ridge = Ridge(alpha=penalty, solver="lsqr", tol=1e-10).fit(
            train[used], training.train.labels["rating"][used], sample_weight=training.train.weight[used]
        )
        values, _ = metrics.evaluate_task(
            task, ridge.predict(valid), training.valid.labels["rating"], training.valid.mask["rating"],
            weight=training.valid.weight,
        )  # fmt: skip
        losses.append(values["rmse"])
    best = metrics.evaluate([task], outputs, training.valid)[0]["rating"]["rmse"]
    assert best == pytest.approx(min(losses), rel=1e-3)
    assert losses[0] > 1.05 * best


def test_linear_beats_the_means_where_the_features_tell(training, part):
    table = metrics.baselines.evaluate_baselines(training, part, names=("global_mean", "user_item_mean", "logistic"))
    for task in training.schema.tasks:
        sign = 1 if task.higher_is_better else -1
        mean, linear = (table[name][task.name][task.metric] for name in ("user_item_mean", "logistic"))
        assert sign * linear > sign * mean, task.name


def test_declared_features_are_the_only_ones(training, part):
    """With ``logistic_features`` neither ids nor other columns are read, whatever stands there."""
    schema = dataclasses.replace(training.schema, logistic_features=("x2", "x0"))
    declared = dataclasses.replace(training, schema=schema)
    outputs = logistic(declared, part)
    changed = dataclasses.replace(part, ids=part.ids * 0, dense=part.dense * np.array([1, 50, 1], np.float32))
    for task, values in logistic(declared, changed).items():
        np.testing.assert_array_equal(values, outputs[task])
    moved = dataclasses.replace(part, dense=part.dense + np.array([1, 0, 0], np.float32))
    assert (logistic(declared, moved)["click"] > outputs["click"] + 0.5).all()


def test_ids_that_train_lacks_have_no_effect(training, part):
    """Unknown buckets give the same outputs, whichever unknown id it is."""
    first, second = (
        logistic(training, dataclasses.replace(part, ids=np.full_like(part.ids, number))) for number in (999, 1234)
    )
    for task in first:
        np.testing.assert_array_equal(first[task], second[task])


def test_the_seed_draws_the_rows_of_a_long_training_part(training, part, monkeypatch):
    monkeypatch.setattr(module, "MAX_ROWS", 300)
    same, again, other = (logistic(training, part, seed=seed)["click"] for seed in (0, 0, 1))
    np.testing.assert_array_equal(same, again)
    assert np.abs(same - other).max() > 0.01


def test_one_class_in_train_is_predicted_as_certain(training, part):
    labels = training.train.labels | {
        "click": np.ones(training.train.num_rows, np.float32),
        "grade": np.full(training.train.num_rows, 1, np.int32),
    }
    certain = dataclasses.replace(training, train=dataclasses.replace(training.train, labels=labels))
    outputs = logistic(certain, part)
    assert metrics.sigmoid(outputs["click"]).min() > 1 - 1e-5
    assert np.exp(outputs["grade"])[:, 1].min() > 1 - 1e-5


@pytest.mark.data
@pytest.mark.slow
def test_complete_journey_floors():
    """Nineteen log1p numbers of the past, standardised: AUC of the four binary tasks."""
    from mtl_jax.data import load

    dataset = load("complete_journey")
    table = metrics.baselines.evaluate_baselines(dataset.for_training(), dataset.open_test(), names=("logistic",))[
        "logistic"
    ]
    floors = {"buy": 0.7992, "promo": 0.8261, "private": 0.8521, "coupon": 0.8397}
    assert {name: table[name]["auc"] for name in floors} == pytest.approx(floors, abs=1e-3)
