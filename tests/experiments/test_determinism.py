"""The same command on the same machine gives the same numbers, whatever Python's hash seed and working folder are."""

import json
import os
import subprocess
import sys

import numpy as np
import polars as pl
import pytest

import mtl_jax


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Text categories, a list of labels and numbers: everything that a set or a dict of raw values could order."""
    rng = np.random.default_rng(0)
    city = rng.choice([f"city {i}" for i in range(12)], 400)
    price = rng.normal(size=400)
    frame = pl.DataFrame({
        "city": city,
        "price": price,
        "buy": (price + rng.normal(size=400) > 0).astype(int),
        "kind": np.where(price > 0.5, "dear", np.where(price < -0.5, "cheap", "middling")),
    })  # fmt: skip
    path = tmp_path_factory.mktemp("table") / "rows.csv"
    frame.write_csv(path)
    return path


def record(folder, table, hash_seed):
    """The record and curves of a run in a process of its own."""
    folder.mkdir()
    overrides = [
        "data=table", f"data.path={table}", "data.tasks={buy: binary, kind: multiclass}", "data.split=rows",
        "sharing=shared_bottom", "sharing.units=[8]", "balancing=pcgrad", "trainer.epochs=2", "trainer.batch_size=64",
        "trainer.tables=sparse", "output_dir=out",
    ]  # fmt: skip
    source = os.path.dirname(os.path.dirname(mtl_jax.__file__))
    environment = os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": source}
    run = subprocess.run(
        [sys.executable, "-m", "experiments.train", *overrides],
        cwd=folder, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    (result,) = folder.glob("out/train/*/result.json")
    return json.loads(result.read_text()), pl.read_parquet(result.with_name("history.parquet"))


@pytest.mark.slow
def test_processes_agree_to_the_last_digit(tmp_path, table):
    (one, curves), (other, other_curves) = (
        record(tmp_path / seed, table, seed) for seed in ("1", "20261124")
    )  # fmt: skip
    assert one["run_id"] == other["run_id"] and one["data"] == other["data"]
    for key in ("metrics", "baselines", "support", "monitor", "params", "diagnostics", "config_hash"):
        assert one[key] == other[key], key
    assert curves.equals(other_curves)
    assert curves.height > 20 and one["metrics"]["test"]["buy"]["auc"] > 0.6
