"""Tasks of every kind from the command line: a text file, no Python."""

import json
import os
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from mtl_jax.data import synthetic
from mtl_jax.data.datasets import table
from mtl_jax.report.record import validate
from mtl_jax.tasks import KINDS

ROOT = Path(__file__).parents[2]
TASKS = (
    "{click: binary, channel: multiclass, rating: regression, stars: {kind: ordinal, loss: coral}, "
    "visits: {kind: count, loss: negative_binomial}, spend: zero_inflated, tags: multilabel, "
    "flags: {kind: multilabel, column: [has_gift, has_sale]}}"
)
OPTIONS = [
    "data=table", "data.path=kinds.csv", f"data.tasks={TASKS}", "data.user=user", "data.split=rows",
    "sharing=shared_bottom", "sharing.units=[8]", "towers.units=[4]",
    "trainer.batch_size=50", "trainer.epochs=1", "trainer.steps_per_call=4",
]  # fmt: skip


@pytest.fixture(scope="module")
def frame():
    made = synthetic.kinds(num_rows=300, dim=2, seed=0)
    has = {f"has_{name}": pl.col("tags").list.contains(name).cast(pl.Int8) for name in ("gift", "sale")}
    return made.with_columns(**has)


@pytest.mark.slow
def test_runs_from_a_text_file(frame, tmp_path):
    joined = frame.with_columns(pl.col("tags").list.join("|"))
    joined.write_csv(tmp_path / "kinds.csv", quote_style="non_numeric")  # "" is no tag, an empty field unobserved
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "experiments.train", *OPTIONS]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    (path,) = tmp_path.glob("outputs/train/*/result.json")
    record = json.loads(path.read_text())
    validate(record)
    assert {task["kind"] for task in record["tasks"].values()} == set(KINDS)
    for task, facts in record["tasks"].items():
        assert record["metrics"]["test"][task][facts["metric"]] is not None, task
        assert facts["metric"] in done.stdout
    assert set(record["baselines"]["global_mean"]) == set(record["tasks"])
    assert set(record["tasks"]) - set(record["baselines"]["logistic"]) == {"stars", "spend"}


def test_lists_as_text_are_the_lists_of_parquet(frame, tmp_path):
    frame.write_parquet(tmp_path / "kinds.parquet")
    frame.with_columns(pl.col("tags").list.join(";")).write_csv(tmp_path / "kinds.csv", quote_style="non_numeric")
    options = {"tasks": {"tags": "multilabel"}, "split": "rows", "list_separator": ";"}
    options["exclude"] = ["has_gift", "has_sale"]
    one, other = (table.load(path=tmp_path / f"kinds.{kind}", **options) for kind in ("parquet", "csv"))
    assert one.schema.task("tags").classes == ("fresh", "gift", "sale")
    for part, again in ((one.for_training().train, other.for_training().train), (one.open_test(), other.open_test())):
        assert (part.labels["tags"] == again.labels["tags"]).all()
        assert (part.mask["tags"] == again.mask["tags"]).all() and not part.mask["tags"].all()
    inferred = table.load(path=tmp_path / "kinds.parquet", tasks=["tags"], split="rows", exclude=options["exclude"])
    assert inferred.schema.task("tags").kind == "multilabel"
