"""Evaluation of tasks: the right function on the right rows, with support and reasons."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

from mtl_jax import metrics
from mtl_jax.tasks import Task

CLICK = Task("click", "binary")


def test_binary_metrics_are_those_of_the_observed_weighted_rows():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=60), (rng.random(60) < 0.4).astype(np.float32)
    mask, weight, user = rng.random(60) < 0.7, rng.choice([0.0, 0.5, 1.0], 60), rng.integers(0, 9, 60)
    hidden = np.where(mask, labels, np.nan)
    values, support = metrics.evaluate_task(
        CLICK, np.where(mask, logits, np.nan)[:, None], hidden, mask, weight=weight, user=user
    )

    y, z, w, u = (x[mask] for x in (labels, logits, weight, user))
    p = 1 / (1 + np.exp(-z))
    assert list(values) == list(metrics.METRICS["binary"])
    assert values == pytest.approx(
        {
            "auc": metrics.auc(y, z, w),
            "gauc_impr": metrics.gauc(y, z, u, w, weighting="impr"),
            "pr_auc": metrics.pr_auc(y, z, w),
            "logloss": metrics.logloss(y, z, w),
            "ne": metrics.ne(y, z, w),
            "pcoc": metrics.pcoc(y, p, w),
            "ece_width_10": metrics.ece_width_10(y, p, w),
            "ece_mass_20": metrics.ece_mass_20(y, p, w),
            "accuracy": metrics.accuracy(y, p >= 0.5, w),
            "macro_f1": metrics.macro_f1(y, p >= 0.5, w),
        },
        rel=1e-12,
    )
    used = w > 0
    assert (support["auc"]["n"], support["auc"]["positives"]) == (used.sum(), y[used].sum())
    mixed = [k for k in np.unique(u[used]) if 0 < y[used & (u == k)].mean() < 1]
    assert support["gauc_impr"] == {
        "n": np.isin(u[used], mixed).sum(),
        "positives": y[used & np.isin(u, mixed)].sum(),
        "groups_used": len(mixed),
        "groups_skipped": len(np.unique(u[used])) - len(mixed),
        "reason": None,
    }
    json.dumps([values, support])


def test_a_logit_of_zero_is_the_positive_class():
    values, _ = metrics.evaluate_task(CLICK, np.zeros(4), np.array([1, 1, 1, 0]), np.ones(4, bool))
    assert values["accuracy"] == 0.75


def test_multiclass_ties_go_to_the_lowest_class():
    task = Task("grade", "multiclass", classes=("a", "b", "c", "d"))
    values, support = metrics.evaluate_task(task, np.zeros((3, 4)), np.array([0, 0, 2]), np.ones(3, bool))
    assert values == pytest.approx({"accuracy": 2 / 3, "macro_f1": (0.8 + 0) / 2, "logloss": np.log(4)})
    assert (support["macro_f1"]["groups_used"], support["macro_f1"]["groups_skipped"]) == (2, 2)
    assert support["accuracy"]["positives"] is None


@pytest.mark.parametrize("transform", ["none", "log1p"])
def test_regression_errors_are_in_original_units(transform):
    task = Task("spend", "regression", transform=transform, mean=0.7, std=1.9)
    targets, predictions = np.array([1.0, 4.0, 10.0]), np.array([2.0, 4.0, 7.0])
    values, _ = metrics.evaluate_task(
        task, metrics.from_original(task, predictions), metrics.from_original(task, targets), np.ones(3, bool)
    )
    assert values == pytest.approx({"rmse": np.sqrt(10 / 3), "mae": 4 / 3})


@pytest.mark.parametrize(
    ("outputs", "labels", "mask", "missing"),
    [
        pytest.param(
            [0.1, 0.2],
            [0, 0],
            [True, True],
            {
                "auc": "one class only",
                "gauc_impr": "no user has both labels",
                "pr_auc": "no positive",
                "ne": "one class only",
                "pcoc": "no positive",
            },
            id="negatives only",
        ),
        pytest.param(
            [0.1, 0.2],
            [0, 1],
            [False, False],
            dict.fromkeys(metrics.METRICS["binary"], "no observed row"),
            id="nothing observed",
        ),
        pytest.param(
            [np.nan, np.inf],
            [0, 1],
            [True, True],
            dict.fromkeys(metrics.METRICS["binary"], "2 of 2 outputs are not finite"),
            id="diverged",
        ),
    ],
)
def test_what_cannot_be_computed_is_none_with_a_reason(outputs, labels, mask, missing):
    values, support = metrics.evaluate_task(
        CLICK, np.array(outputs), np.array(labels), np.array(mask), user=np.array([0, 0])
    )
    assert {name: support[name]["reason"] for name, value in values.items() if value is None} == missing
    assert all(support[name]["reason"] is None for name in values if name not in missing)


def test_no_user_column_and_overflow_have_reasons():
    values, support = metrics.evaluate_task(CLICK, np.array([0.0, 1.0]), np.array([0, 1]), np.ones(2, bool))
    assert values["auc"] == 1 and values["gauc_impr"] is None
    assert support["gauc_impr"]["reason"] == "no user column"
    spend = Task("spend", "regression", transform="log1p")
    values, support = metrics.evaluate_task(spend, np.array([1e4]), np.array([0.0]), np.ones(1, bool))
    assert values == {"rmse": None, "mae": None}
    assert support["mae"]["reason"] == "the value is not finite"


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"task 'click' has outputs \(3,\)"):
        metrics.evaluate_task(CLICK, np.zeros(3), np.zeros(2), np.ones(2, bool))
    grade = Task("grade", "multiclass", classes=("a", "b"))
    with pytest.raises(ValueError, match=r"expected \(2, 2\)"):
        metrics.evaluate_task(grade, np.zeros((2, 3)), np.zeros(2), np.ones(2, bool))


def outputs_for(tasks, num_rows):
    rng = np.random.default_rng(5)
    return {
        task.name: rng.normal(size=(num_rows, task.width) if task.kind == "multiclass" else num_rows) for task in tasks
    }


def test_evaluate_uses_row_and_task_weights(training, part):
    tasks = training.schema.tasks
    outputs = outputs_for(tasks, part.num_rows)
    values, support = metrics.evaluate(tasks, outputs, part)
    assert set(values) == set(support) == {task.name for task in tasks}
    both = part.weight * part.task_weight["click"]
    mask = part.mask["click"]
    assert values["click"]["logloss"] == pytest.approx(
        metrics.logloss(part.labels["click"][mask], outputs["click"][mask], both[mask])
    )
    mask = part.mask["grade"]
    assert values["grade"]["accuracy"] == pytest.approx(
        metrics.accuracy(part.labels["grade"][mask], outputs["grade"][mask].argmax(1), part.weight[mask])
    )
    assert support["click"]["auc"]["n"] == (part.mask["click"] & (both > 0)).sum()


def test_slices_split_the_rows_by_domain(training, part):
    """Each slice is the evaluation of its rows alone, and the weighted log loss of the slices is that of the part."""
    tasks, domains = training.schema.tasks, training.schema.domains
    outputs = outputs_for(tasks, part.num_rows)
    slices = metrics.evaluate_slices(tasks, outputs, part, domains)
    assert list(slices) == ["domain=north", "domain=south"]
    rows = part.domain == 1
    alone = dataclasses.replace(
        part,
        labels={name: values[rows] for name, values in part.labels.items()},
        mask={name: values[rows] for name, values in part.mask.items()},
        task_weight={name: values[rows] for name, values in part.task_weight.items()},
        weight=part.weight[rows],
        user=part.user[rows],
    )
    expected, _ = metrics.evaluate(tasks, {name: values[rows] for name, values in outputs.items()}, alone)
    assert slices["domain=south"] == expected

    both = part.weight * part.task_weight["click"] * part.mask["click"]
    shares = np.bincount(part.domain, both) / both.sum()
    total = sum(share * values["click"]["logloss"] for share, values in zip(shares, slices.values(), strict=True))
    assert total == pytest.approx(metrics.evaluate(tasks, outputs, part)[0]["click"]["logloss"])
    assert metrics.evaluate_slices(tasks, outputs, dataclasses.replace(part, domain=None), domains) == {}


def test_metrics_load_without_jax():
    code = "import sys, mtl_jax.metrics; print('jax' in sys.modules, 'sklearn' in sys.modules, 'polars' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.split() == ["False", "False", "False"]
