"""A finished run of four tasks with figures of a realistic size, and the pieces around it."""

import copy
import json

import numpy as np
import pytest

from mtl_jax.report.folder import RunFolder
from mtl_jax.report.record import new_record, validate

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


SPARKLE = "<script>alert(1)</script> $x$ %{y}"


@pytest.fixture(scope="session")
def grid_folder(tmp_path_factory):
    """An ablation of 3 sharings x 2 balancings and the baseline, 5 seeds, 2 tasks; one arm has a name made of markup.

    One run has failed; one seed of ``mmoe+equal`` stops early; one arm records gradient cosines and the use of gates.
    """
    folder = tmp_path_factory.mktemp("grid")
    generator = np.random.default_rng(0)
    seeds, tasks = range(5), {"buy": "auc", "spend": "rmse"}
    arms = {"single_task": ("single_task", "equal")}
    for sharing in ("shared_bottom", "mmoe", "ple"):
        for balancing in ("equal", "pcgrad"):
            arms[f"{sharing}+{balancing}"] = (sharing, balancing)
    arms[SPARKLE] = arms.pop("ple+pcgrad")
    shifts = dict(zip(arms, (0.0, 0.001, 0.003, 0.012, 0.009, -0.008, 0.002), strict=True))
    members = []
    for arm, (sharing, balancing) in arms.items():
        for seed in seeds:
            run_id = f"{len(members):012x}-9f8e7d6c-s{seed}"
            members.append({"run_id": run_id, "arm": arm, "values": {}, "seed": seed, "data": "complete_journey"})
            noise = generator.normal(0, 0.001, 2)
            values = {"buy": 0.8 + shifts[arm] + noise[0], "spend": 1.03 - shifts[arm] / 2 + noise[1]}
            with RunFolder.open(folder / "runs" / run_id) as run:
                if arm == "shared_bottom+pcgrad" and seed == 4:
                    lost = new_record(
                        {"run_id": run_id, "config": {}, "config_hash": run_id[:12], "seed": seed},
                        status="failed",
                        error=FloatingPointError("loss is nan <at step 12>"),
                    )
                    run.write_json("result.json", lost)
                    continue
                record = _of_tasks(build(MODEL, sharing=sharing, run_id=run_id), tasks, values)
                record["method"]["balancing"], record["seed"] = balancing, seed
                special = sharing == "mmoe" and balancing == "pcgrad"
                if special:
                    record["diagnostics"] = {
                        "gate_use": {
                            "all": {
                                "buy/gate": {"expert 0": 0.7, "expert 1": 0.3},
                                "spend/gate": {"expert 0": 0.2 + 0.1 * seed, "expert 1": 0.8 - 0.1 * seed},
                            }
                        }
                    }
                validate(record)
                run.write_json("result.json", record)
                epochs = 6 if (arm, seed) == ("mmoe+equal", 0) else 10
                run.write_history(_curves(tasks, values, epochs, generator, cosines=special))
    ablation = {
        "id": "0123abcd",
        "command": "python -m experiments.ablate sharing=<all> seeds=5",
        "baseline": "single_task",
    }
    ablation |= {"created": "2026-03-01T09:00:00+00:00", "members": members}
    (folder / "ablation.json").write_text(json.dumps(ablation))
    return folder


def _of_tasks(record, tasks, values):
    """The record with some of its tasks, and other values."""
    for part in ("valid", "test"):
        record["metrics"][part] = {task: {metric: float(values[task])} for task, metric in tasks.items()}
        record["support"][part] = {task: record["support"][part][task] for task in tasks}
    record["baselines"] = {name: {t: row[t] for t in tasks} for name, row in record["baselines"].items()}
    record["tasks"] = {task: record["tasks"][task] for task in tasks}
    return record


def _curves(tasks, values, epochs, generator, *, cosines):
    rows = []
    for step in range(100, 100 * epochs + 1, 100):
        for task, metric in tasks.items():
            value = values[task] + (BASELINES["user_item_mean"][task] - values[task]) * 0.7 ** (step / 100)
            found = {("valid", metric): value, ("train", "weight"): 0.5 + generator.normal(0, 0.02)}
            rows += [
                {"step": step, "part": part, "task": task, "name": name, "value": float(value)}
                for (part, name), value in found.items()
            ]
        if cosines:
            cosine = float(generator.normal(0, 0.1))
            rows.append({"step": step, "part": "train", "task": None, "name": "cosine/buy/spend", "value": cosine})
    return rows


FLOORS = {"global_mean": {"click": 0.5, "rating": 1.11}, "item_mean": {"click": 0.70, "rating": 0.98}}


@pytest.fixture
def write_ablation(tmp_path):
    """Writes the folder of an ablation on movielens_1m from ``{arm: [metrics of seed 0, ...]}``.

    A member is ``{"click": auc, "rating": rmse}``, an exception for a run that failed, or None for one that never ran.
    ``points`` has one dict of axis values an arm's list for arms with several; ``change(arm, seed, record)`` edits.
    """

    def write(arms, *, baseline="single_task", change=None, points=None, name="ablation", data="movielens_1m"):
        folder, members = tmp_path / name, []
        for arm, outcomes in arms.items():
            for point, values in enumerate((points or {}).get(arm, [{}])):
                per_point = outcomes if not points or arm not in points else outcomes[point]
                for seed, outcome in enumerate(per_point):
                    run_id = f"{len(members):012x}-0badcafe-s{seed}"
                    members.append({"run_id": run_id, "arm": arm, "values": values, "seed": seed, "data": data})
                    if outcome is not None:
                        record = _member(run_id, arm, seed, outcome)
                        if change is not None:
                            change(arm, seed, record)
                        validate(record)
                        (folder / "runs" / run_id).mkdir(parents=True)
                        (folder / "runs" / run_id / "result.json").write_text(json.dumps(record))
        folder.mkdir(exist_ok=True)
        facts = {"id": "0123abcd", "command": "python -m experiments.ablate sharing=mmoe", "created": "2026-03-01"}
        (folder / "ablation.json").write_text(json.dumps({**facts, "baseline": baseline, "members": members}))
        return folder

    return write


def _member(run_id, arm, seed, outcome):
    if isinstance(outcome, Exception):
        known = {"run_id": run_id, "config": {}, "config_hash": run_id[:12], "seed": seed}
        return new_record(known, status="failed", error=outcome)
    sharing, _, balancing = arm.partition("+")
    record = build(MODEL, sharing=sharing, run_id=run_id)
    record["method"]["balancing"], record["seed"] = balancing or "equal", seed
    tasks = {"click": "auc", "rating": "rmse"}
    support = {task: {metric: {"n": 1000, "positives": None}} for task, metric in tasks.items()}
    for part in ("valid", "test"):
        record["metrics"][part] = {task: {metric: outcome[task]} for task, metric in tasks.items()}
        record["support"][part] = copy.deepcopy(support)
    record["baselines"] = {n: {task: {tasks[task]: v} for task, v in row.items()} for n, row in FLOORS.items()}
    record["tasks"] = {"click": record["tasks"]["buy"], "rating": record["tasks"]["spend"]}
    record["data"]["name"], record["monitor"]["value"] = "movielens_1m", outcome["click"]
    return record
