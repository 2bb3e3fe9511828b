"""Cross-validation from the command line to its table: sealed, resumable, and with the arithmetic of a textbook."""

import json
import math
import sys

import hydra
import numpy as np
import polars as pl
import pytest

from experiments import train
from experiments.cli import command_line
from mtl_jax.config import plain
from mtl_jax.cross_validate import RESULT, cross_validate, over_folds
from mtl_jax.errors import ConfigError, Interrupted, SchemaError
from mtl_jax.report.find import records
from mtl_jax.report.folder import LEDGER
from mtl_jax.report.record import validate
from mtl_jax.run import run

SMALL = ["data=synthetic", "data.num_rows=300", "data.dim=3", "sharing=shared_bottom", "sharing.units=[4]",
         "towers.units=[3]", "trainer.batch_size=20", "trainer.epochs=2", "trainer.steps_per_call=4",
         "folds=2"]  # fmt: skip
POISONED = """
import dataclasses, numpy, polars, mtl_jax

def load(**options):
    clean = mtl_jax.data.load(**options)
    is_test = polars.Series(numpy.isin(numpy.arange(clean.frame.height), clean.splits["test"]))
    poison = polars.when(is_test)
    columns = [poison.then(float("nan")).otherwise(polars.col(f.name)).alias(f.name) for f in clean.schema.numerics]
    columns += [poison.then(-9 - polars.col(t)).otherwise(polars.col(t)).alias(t) for t in clean.schema.task_names]
    return dataclasses.replace(clean, frame=clean.frame.with_columns(columns))
"""


def compose(*overrides):
    with hydra.initialize_config_module("conf", version_base="1.3"):
        return plain(hydra.compose("train", overrides=list(overrides)))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a cross-validation that the command line has run."""
    cwd = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        patch.setattr(sys, "argv", ["train", *SMALL])
        command_line(train.main, "train")
    (folder,) = (cwd / "outputs" / "cross_validation").iterdir()
    return folder


def again(finished, *overrides, output_dir, **options):
    config = compose(*SMALL, *overrides, f"output_dir={output_dir}")
    summary = cross_validate(config, names={"sharing": "shared_bottom", "balancing": "equal"}, **options)
    (folder,) = (output_dir / "cross_validation").iterdir()
    return summary, folder


def test_leaves_sealed_records_and_their_statistics(finished):
    summary = json.loads((finished / RESULT).read_text())
    found = records(finished)
    assert [folder.name for folder, _ in found] == ["fold-0", "fold-1"]
    rows = 0
    for folder, record in found:
        validate(record)
        assert record["status"] == "completed"
        assert record["metrics"]["test"] is None and "kept for the final choice" in record["sealed"]
        assert record["test_openings"] == 0 and not (folder / LEDGER).exists()
        assert record["data"]["summary"] == {}
        rows += record["data"]["rows"]["valid"]
    assert rows == 275  # 11 / 12 of the rows: train and valid of the split
    for task in ("y1", "y2"):
        values = [record["metrics"]["valid"][task]["rmse"] for _, record in found]
        facts = summary["metrics"][task]["rmse"]
        assert facts["n"] == 2
        assert facts["mean"] == pytest.approx(np.mean(values), abs=1e-12)
        assert facts["std"] == pytest.approx(abs(values[0] - values[1]) / math.sqrt(2), abs=1e-12)
        # t of one degree of freedom at .975 is the quantile of the Cauchy distribution, tan(.475 pi)
        half = math.tan(0.475 * math.pi) * abs(values[0] - values[1]) / 2
        assert facts["interval"] == pytest.approx([np.mean(values) - half, np.mean(values) + half], abs=1e-9)
    assert summary["metrics_test"] is None
    assert [fold["run_id"] for fold in summary["folds"]] == [record["run_id"] for _, record in found]
    assert len({record["config_hash"] for _, record in found}) == 1


def test_a_finished_one_is_printed_and_trains_nothing(finished, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file() and path.name != ".lock"}
    again(finished, output_dir=finished.parents[1])
    shown = capsys.readouterr().out
    assert "nothing to train" in shown and "2 folds of train and valid" in shown and "rmse" in shown
    assert {
        path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file() and path.name != ".lock"
    } == before


def test_an_interrupted_one_goes_on_in_the_fold_and_epoch_under_way(finished, tmp_path, capsys):
    def second_fold_has_run_three_calls():
        folder = next(tmp_path.glob("cross_validation/*/fold-1/log.jsonl"), None)
        return folder is not None and next(asked) >= 3

    asked = iter(range(1000))
    with pytest.raises(Interrupted):
        again(finished, output_dir=tmp_path, should_stop=second_fold_has_run_three_calls)
    (folder,) = (tmp_path / "cross_validation").iterdir()
    assert not (folder / RESULT).exists()
    first, second = (json.loads((folder / f"fold-{i}" / "result.json").read_text()) for i in (0, 1))
    assert (first["status"], second["status"]) == ("completed", "interrupted")
    before = (folder / "fold-0" / "history.parquet").stat().st_mtime_ns
    summary, _ = again(finished, output_dir=tmp_path)
    assert "fold 2/2" in capsys.readouterr().out
    assert (folder / "fold-0" / "history.parquet").stat().st_mtime_ns == before
    resumed = [json.loads(line) for line in (folder / "fold-1" / "log.jsonl").read_text().splitlines()]
    assert [event["step"] > 0 for event in resumed if event["event"] == "started"] == [False, True]
    assert summary["metrics"] == json.loads((finished / RESULT).read_text())["metrics"]
    assert summary["run_id"] == finished.name


def test_what_the_test_rows_hold_changes_not_a_bit(finished, tmp_path, monkeypatch):
    """NaN in every feature and other labels in the test part: the same curves, metrics and baselines, bit for bit."""
    (tmp_path / "poisoned_rows.py").write_text(POISONED)
    monkeypatch.syspath_prepend(tmp_path)
    chosen = ["data._target_=poisoned_rows.load", "allow=[poisoned_rows]"]
    summary, folder = again(finished, *chosen, output_dir=tmp_path / "outputs")
    undisturbed = json.loads((finished / RESULT).read_text())
    assert summary["metrics"] == undisturbed["metrics"]
    assert [fold["monitor"] for fold in summary["folds"]] == [fold["monitor"] for fold in undisturbed["folds"]]
    for fold in ("fold-0", "fold-1"):
        one, two = (pl.read_parquet(home / fold / "history.parquet") for home in (folder, finished))
        assert one.equals(two)
        here, there = (json.loads((home / fold / "result.json").read_text()) for home in (folder, finished))
        for key in ("metrics", "support", "slices", "baselines", "monitor", "params"):
            assert here[key] == there[key], key


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["folds=1"], ConfigError, "folds is 1; expected a whole number >= 2"),
        (["folds=2.5"], ConfigError, r"folds is 2\.5"),
        (["folds=true"], ConfigError, "folds is True"),
        (["data.split_fold=1"], ConfigError, "data.split_fold is 1 with folds=2; expected null"),
        (["folds=1000"], SchemaError, "275 rows for 1000 folds"),
    ],
)
def test_mistakes_are_said_before_anything_is_written(overrides, error, message, tmp_path):
    with pytest.raises(error, match=message):
        cross_validate(compose(*SMALL, *overrides, f"output_dir={tmp_path}"))
    assert not list(tmp_path.iterdir())


def test_one_run_is_not_a_cross_validation(tmp_path):
    with pytest.raises(ConfigError, match="folds is 2 in one run; expected null"):
        run(compose(*SMALL, f"output_dir={tmp_path}"))


def test_the_interval_is_that_of_student():
    """1 to 5: s^2 = 2.5 and t(.975, 4) = 2.776445, from a printed table."""
    facts = over_folds([1.0, 2.0, None, 3.0, 4.0, 5.0])
    assert (facts["mean"], facts["n"]) == (3.0, 5)
    assert facts["std"] == pytest.approx(math.sqrt(2.5))
    assert facts["interval"] == pytest.approx([3 - 2.776445 * math.sqrt(0.5), 3 + 2.776445 * math.sqrt(0.5)], abs=1e-5)
    assert over_folds([2.0, None]) == {"mean": 2.0, "std": None, "interval": None, "n": 1}
    assert over_folds([None]) == {"mean": None, "std": None, "interval": None, "n": 0}
