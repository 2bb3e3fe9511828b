"""``python -m experiments.report``: what it writes, and how it answers mistakes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from experiments import report

ROOT = Path(__file__).parents[2]
TEXT = ["md", "tex", "csv", "json", "parquet"]


@pytest.fixture
def folder(write_ablation):
    seeds = [{"click": 0.8 + seed / 1000, "rating": 0.9} for seed in range(3)]
    return write_ablation({"single_task": seeds, "mmoe+equal": [*seeds[:2], ValueError("loss is nan")]})


def refused(capsys, *arguments, status=2):
    assert report.main([str(argument) for argument in arguments]) == status
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return captured.err


def test_the_command_line(folder):
    """In a fresh process, as a user would."""
    command = [sys.executable, "-m", "experiments.report", folder, "--baseline", "single_task"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Results on movielens_1m" in done.stdout and "mmoe+equal: 2 of 3 seeds finished" in done.stdout
    names = {
        "report.md",
        "tables.tex",
        "results.csv",
        "differences.csv",
        "table.json",
        "members.parquet",
        "report.html",
    }
    assert {path.name for path in (folder / "report").iterdir()} == names
    assert "ValueError: loss is nan" in (folder / "report" / "report.md").read_text()


def test_formats_and_place_are_chosen(folder, tmp_path, capsys):
    assert report.main([str(folder), "--out", str(tmp_path / "deep" / "out"), "--formats", "json", "parquet"]) == 0
    assert {path.name for path in (tmp_path / "deep" / "out").iterdir()} == {"table.json", "members.parquet"}
    assert not (folder / "report").exists()
    (table,) = json.loads((tmp_path / "deep" / "out" / "table.json").read_text())["comparisons"]
    assert table["baseline"] == "single_task"
    assert pl.read_parquet(tmp_path / "deep" / "out" / "members.parquet")["run_id"].n_unique() == 6


def test_the_same_records_give_the_same_files(folder):
    contents = []
    for _ in range(2):
        assert report.main([str(folder), "--formats", *TEXT]) == 0
        contents.append({path.name: path.read_bytes() for path in (folder / "report").iterdir()})
    assert contents[0] == contents[1]


def test_mistakes_are_answered_without_a_traceback(folder, write_ablation, tmp_path, capsys):
    assert "'single_task', 'mmoe+equal'" in refused(capsys, folder, "--baseline", "ple")
    assert "is not a folder" in refused(capsys, tmp_path / "nowhere")
    assert "has no ablation.json" in refused(capsys, tmp_path)
    assert "ordinary runs" in refused(capsys, folder / "runs")
    unfinished = write_ablation({"single_task": [None, None]}, name="unfinished")
    assert "has finished (of 2)" in refused(capsys, unfinished)
    taken = tmp_path / "taken"
    taken.write_text("")
    assert "Choose another with --out" in refused(capsys, folder, "--out", taken, status=1)


def test_unknown_formats_are_a_usage_mistake(folder, capsys):
    with pytest.raises(SystemExit) as stopped:
        report.main([str(folder), "--formats", "docx"])
    assert stopped.value.code == 2
    assert "'docx'" in capsys.readouterr().err
