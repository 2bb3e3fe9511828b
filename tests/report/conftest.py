"""A finished run of four tasks with figures of a realistic size, and the pieces around it."""

import copy

import pytest

from mtl_jax.report.record import new_record

TASKS = {"buy": "auc", "promo": "auc", "coupon": "auc", "spend": "rmse"}
MODEL = {"buy": 0.8046, "promo": 0.8322, "coupon": 0.8301, "spend": 1.0214}
SINGLE = {"buy": 0.8031, "promo": 0.8334, "coupon": 0.8127, "spend": 1.0297}
BASELINES = {
    "global_mean": {"buy": 0.5, "promo": 0.5, "coupon": 0.5, "spend": 1.1846},
    "user_item_mean": {"buy": 0.7712, "promo": 0.8015, "coupon": 0.7603, "spend": 1.0655},
    "logistic": {"buy": 0.7992, "promo": 0.8261, "coupon": 0.8397, "spend": 1.0463},
}
ROWS = {"train": 194_922, "valid": 203_423, "test": 212_732}
POSITIVES = {"buy": 49_725, "promo": 29_779, "coupon": 1_134, "spend": None}


def per_task(values):
    return {task: {TASKS[task]: value} for task, value in values.items()}


def build(values, *, sharing="mmoe", run_id="0a1b2c3d4e5f-9f8e7d6c-s0", started="2026-03-01T10:00:00+00:00"):
    support = {
        task: {metric: {"n": ROWS["test"], "positives": POSITIVES[task], "reason": None}}
        for task, metric in TASKS.items()
    }
    known = {
        "run_id": run_id,
        "config": {"sharing": {"_target_": f"mtl_jax.sharing.{sharing}"}, "seed": 0},
        "config_hash": run_id[:12],
        "seed": 0,
        "split_seed": 0,
        "selector": "valid_best",
        "tuning_trials": 1,
        "test_openings": 1,
        "metrics": {"valid": per_task(values), "test": per_task(values)},
        "support": {"valid": support, "test": support},
        "baselines": {name: per_task(row) for name, row in BASELINES.items()},
        "method": {"sharing": sharing, "balancing": "equal"},
        "tasks": {
            task: {
                "kind": "binary" if metric == "auc" else "regression",
                "loss": "bce" if metric == "auc" else "squared",
                "space": "all" if metric == "auc" else "buy",
                "metric": metric,
                "direction": "higher" if metric == "auc" else "lower",
            }
            for task, metric in TASKS.items()
        },
        "data": {
            "name": "complete_journey",
            "recipe": "repurchase",
            "split": "time",
            "sha256": "9f8e7d6c" * 8,
            "rows": ROWS,
            "licence": "research and teaching",
        },
        "params": {
            "embedding": 410_000,
            "shared": 61_000,
            "task": 9_000,
            "total": 480_000,
            "flops_per_example": 470_000,
        },
        "monitor": {"name": "mean_gain", "value": 0.4731, "step": 1200},
        "timing": {
            "examples_per_second": 182_345.6,
            "compile_seconds": 11.84,
            "wall_seconds": 74.2,
            "peak_memory_bytes": 1_200_000_000,
            "started": started,
        },
        "flags": {"transductive": False, "oracle": False, "reopened": False, "below_baseline": True, "leak": False},
    }
    return new_record(known, status="completed")


@pytest.fixture
def record():
    """The MMoE run; ``coupon`` is below its logistic baseline."""
    return build(MODEL)


@pytest.fixture
def reference():
    """The single-task run of the same data, tasks and seed."""
    return build(SINGLE, sharing="single_task", run_id="ffeeddccbbaa-9f8e7d6c-s0")


@pytest.fixture
def changed(record):
    """Makes a deep copy of the record with one dotted key set, or removed where the value is ``...``."""

    def change(dotted, value):
        copied = copy.deepcopy(record)
        *parents, last = dotted.split("/")
        place = copied
        for key in parents:
            place = place[key]
        if value is ...:
            del place[last]
        else:
            place[last] = value
        return copied

    return change


@pytest.fixture
def history():
    """Validation curves that rise towards the record's values and level off."""
    return [
        {
            "step": step,
            "part": "valid",
            "task": task,
            "name": metric,
            "value": MODEL[task] + (BASELINES["user_item_mean"][task] - MODEL[task]) * 1.5 * 0.72 ** (step / 150),
        }
        for task, metric in TASKS.items()
        for step in range(150, 1801, 150)
    ]
