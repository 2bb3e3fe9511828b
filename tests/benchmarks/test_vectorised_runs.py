import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks import vectorised_runs, vectorised_summary, vectorised_worker, worker

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = [sys.executable, "benchmarks/vectorised_runs.py"]


def run_of(way, seeds, seconds, *, turn=0, whole=None, steps=10, value=0.5, device=None):
    return {
        "model": "small",
        "seeds": seeds,
        "way": way,
        "round": turn,
        "whole_seconds": whole or seconds + 2.0,
        "seconds": seconds,
        "compile_seconds": 0.5 * seconds,
        "train_seconds": 0.4 * seconds,
        "peak_rss_bytes": 2**20 * seeds,
        "device_peak_bytes": device,
        "steps": [steps] * seeds,
        "values": [value] * seeds,
        "busy_elsewhere": 0.01,
        "device": "cpu: cpu",
        "versions": {"jax": "0"},
    }


@pytest.fixture
def runs():
    """Two rounds, the second on a machine that is ten times slower for a while; and one seed."""
    return [
        *(run_of("fit", 4, 20.0 * slow, turn=turn) for turn, slow in enumerate((1.0, 10.0))),
        *(run_of("map", 4, 8.0 * slow, turn=turn, value=0.5001) for turn, slow in enumerate((1.0, 10.0))),
        *(run_of("vmap", 4, 16.0 * slow, turn=turn) for turn, slow in enumerate((1.0, 10.0))),
        *(run_of("process", 4, 24.0 * slow, turn=turn, whole=30.0 * slow) for turn, slow in enumerate((1.0, 10.0))),
        run_of("vmap", 1, 6.0),
    ]


def test_help_needs_no_training_environment():
    heavy = ["jax", "polars", "hydra", "mtl_jax"]
    code = f"import benchmarks.vectorised_runs, sys; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"
    done = subprocess.run([*SCRIPT, "--help"], capture_output=True, text=True, cwd=ROOT, check=True)
    for option in ("--quick", "--json", "--seeds", "--models", "--ways"):
        assert option in done.stdout


@pytest.mark.parametrize("arguments", [["--seeds", "0"], ["--repeats", "0"], ["--rows", "-1"], ["--models", "huge"]])
def test_impossible_options_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        vectorised_runs.parse(arguments)
    assert arguments[0] in capsys.readouterr().err


def test_every_way_leads_once_in_as_many_rounds_and_one_seed_has_no_pairs_of_processes():
    options = vectorised_runs.parse(["--seeds", "1", "4", "--repeats", "5"])
    planned = list(vectorised_runs.measurements(options))
    assert {way for count, _, way in planned if count == 1} == {"vmap", "map", "fit", "process"}
    leaders = [next(way for count, r, way in planned if (count, r) == (4, turn)) for turn in range(5)]
    assert sorted(leaders) == sorted(vectorised_summary.WAYS)


def test_speeds_are_quotients_within_a_round(runs):
    record = vectorised_summary.summary(runs)
    rows = {(row["way"], row["seeds"]): row for row in record["rows"]}
    assert rows["map", 4]["speed_work"] == pytest.approx(2.5)
    assert rows["vmap", 4]["speed_work"] == pytest.approx(1.25)
    assert rows["fit", 4]["speed_whole"] == 1.0
    assert rows["map", 4]["seconds"] == pytest.approx(44.0)
    assert rows["vmap", 1]["speed_work"] is None  # nothing to compare with
    [better] = record["better_axis"]
    assert (better["axis"], better["speed_work"]) == ("map", pytest.approx(2.5))
    assert better["speed_of_processes"] == pytest.approx(165.0 / 46.0)
    assert record["growth"] == {
        "small": {"seeds": 4, "whole_seconds": 90.0 / 8, "seconds": 88.0 / 6, "train_seconds": pytest.approx(88.0 / 6)}
    }
    assert record["largest_difference"] == pytest.approx(1e-4)


def test_unequal_steps_are_not_compared(runs):
    with pytest.raises(ValueError, match=r"the runs of 'small' made \[9, 10\] steps"):
        vectorised_summary.summary([*runs, run_of("map", 1, 1.0, steps=9)])


def test_processes_add_up_their_times_and_the_memory_of_those_that_run_together():
    parts = [run_of("fit", 1, float(seconds), device=100 * seconds) for seconds in (1, 2, 3)]
    one, two = (vectorised_summary.combined(parts, at_a_time) for at_a_time in (1, 2))
    assert one["seconds"] == two["seconds"] == 6.0
    assert (one["device_peak_bytes"], two["device_peak_bytes"]) == (300, 500)
    assert two["peak_rss_bytes"] == 2 * 2**20
    assert vectorised_summary.combined([run_of("fit", 1, 1.0)], 1)["device_peak_bytes"] is None


def test_table_and_sentences(runs):
    facts = {"machine": {"cpu": "a cpu"}, "threads": 2, "gemm_gflops": 90.0, "device": "cpu: cpu", "commit": None}
    record = vectorised_summary.summary(runs) | facts | {"date": "today"}
    rows = [dict(zip(vectorised_summary.COLUMNS, row, strict=True)) for row in vectorised_summary.table(record)]
    by_way = {row["way"]: row for row in rows if row["seeds"] == "4"}
    assert by_way["run axis, map"]["of work"] == "2.50 x"
    assert by_way["a process each"]["of work"] == ""  # its work may overlap
    assert by_way["fit after fit"]["on device"] == ""
    text = "\n".join(vectorised_summary.caption(record))
    assert "4 seeds of the small model, on map: 2.50 x fit after fit, 3.59 x a process each" in text
    assert "quiet machine" not in text
    record["rows"][0]["busy_elsewhere"] = 0.4
    assert "40%" in "\n".join(vectorised_summary.caption(record))


@pytest.mark.parametrize("model", vectorised_worker.CASES)
def test_generated_arrays_are_what_the_worker_reads_and_can_be_learned(model, tmp_path):
    case = vectorised_worker.CASES[model]
    np.savez(tmp_path / "data.npz", **vectorised_worker.generate(case, 2000))
    data = worker.load(tmp_path / "data.npz")
    assert data["train_ids"].shape == (2000, len(case.table_sizes))
    assert data["train_dense"].shape == (2000, case.num_dense)
    x, y = np.hstack([data["train_dense"], np.ones((2000, 1))]), data["train_labels"]
    explained = x @ np.linalg.lstsq(x, y, rcond=None)[0]
    assert np.corrcoef(explained[:, 0], y[:, 0])[0, 1] > 0.1
    assert (abs(y.mean(axis=0) - 0.5) < 0.3).all()


def test_compile_time_counts_nested_reports_once():
    clock = vectorised_worker.CompileClock()
    clock.intervals = [(0.0, 4.0), (1.0, 2.0), (3.0, 5.0), (7.0, 8.0)]
    assert clock.seconds == 6.0
    with vectorised_worker.CompileClock() as clock:
        jax.jit(lambda x: x * 2.0 + 1.0)(1.0)
        heard = len(clock.intervals)
    assert heard and clock.seconds > 0
    jax.jit(lambda x: x * 3.0 + 1.0)(1.0)
    assert len(clock.intervals) == heard


@pytest.mark.slow
def test_a_tiny_run_measures_every_way(tmp_path):
    arguments = [
        "--models",
        "small",
        "--seeds",
        "2",
        "--rows",
        "300",
        "--epochs",
        "1",
        "--json",
        str(tmp_path / "out.json"),
    ]
    done = subprocess.run([*SCRIPT, *arguments], cwd=ROOT, check=True, capture_output=True, text=True)
    record = json.loads((tmp_path / "out.json").read_text())
    assert {(row["way"], row["seeds"]) for row in record["rows"]} == {(way, 2) for way in vectorised_summary.WAYS}
    assert record["settings"] == {"small": {"train_rows": 300, "epochs": 1, "batch_size": 256}}
    assert {"commit", "machine", "versions", "command", "date", "device"} <= record.keys()
    for run in record["runs"]:
        assert run["steps"] == [2, 2]
        assert 0 < run["train_seconds"] + run["compile_seconds"] < run["seconds"]
        assert run["peak_rss_bytes"] > 2**20
    assert record["largest_difference"] < 1e-4
    assert "2 seeds of the small model, on" in done.stdout
    assert len(done.stderr.splitlines()) == len(record["runs"]) == 5


def test_the_worker_trains_without_polars(tmp_path):
    """One seed on the run axis; a machine that trains on arrays may lack polars."""
    np.savez(tmp_path / "data.npz", **vectorised_worker.generate(vectorised_worker.CASES["small"], 60))
    arguments = ["--model", "small", "--way", "map", "--seeds", "3", "--epochs", "2"]
    code = f"""
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name == "polars" else find(name, *more)
from benchmarks import vectorised_worker
vectorised_worker.main({[str(tmp_path / "data.npz"), *arguments, "--json", str(tmp_path / "out.json")]})
assert type(sys.modules["polars"]).__name__ == "MagicMock"
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["steps"] == [2]
    assert result["seconds"] > result["compile_seconds"] > 0
    assert result["train_seconds"] > 0
