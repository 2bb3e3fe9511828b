"""The live table of an ablation, from folders as runs leave them in mid-flight."""

import io
import json
import os

import pytest
from rich.console import Console

from mtl_jax.report.board import Board

MEMBERS = [
    {"run_id": f"{data}-{arm}-{seed}", "arm": arm, "values": {}, "seed": seed, "data": data}
    for data in ("clicks", "stars")
    for arm in ("single_task", "units=[a]")
    for seed in (0, 1)
]


@pytest.fixture
def write(tmp_path):
    """(run id, file, content): what a run writes."""

    def put(run_id, name, content):
        folder = tmp_path / "runs" / run_id
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))

    return put


@pytest.fixture
def rows(tmp_path):
    """Of the table as of now: its title, and (data, arm) -> (style, runs, best, now)."""

    def read(board=None):
        table = (board or Board(tmp_path, MEMBERS)).table()
        columns = [[str(cell) for cell in column.cells] for column in table.columns]
        styles = [row.style for row in table.rows]
        found = {
            (row[0], row[1].replace("\\", "")): (style, *row[2:]) for style, *row in zip(styles, *columns, strict=True)
        }
        return table.title, found

    return read


def done(value, name="mean_gain", status="completed"):
    return {"status": status, "monitor": {"name": name, "value": value, "step": 9}}


def going(steps, value=None, name="mean_gain"):
    return {"steps": steps, "total": 10, "epoch": 2, "monitor": value, "name": name}


FAILED = {"status": "failed", "error": {"class": "TrainingError", "message": "not finite"}}


def test_nothing_has_begun(rows):
    title, found = rows()
    assert title.startswith("0.0 of 8 runs") and "left" not in title
    assert list(found.values()) == 4 * [(None, "0/2", "", "")]


def test_a_folder_in_mid_flight(rows, write):
    write("clicks-single_task-0", "result.json", done(0.25))
    write("clicks-single_task-1", "progress.json", going(5, 0.5))
    write("clicks-units=[a]-0", "result.json", FAILED)
    write("clicks-units=[a]-1", "result.json", '{"status": "comp')  # on its way
    write("stars-single_task-0", "result.json", {"status": "interrupted"})
    write("stars-single_task-0", "progress.json", going(2))
    title, found = rows()
    assert title.startswith("2.7 of 8 runs")
    assert found == {
        ("clicks", "single_task"): ("bold", "1/2", "0.5000", "seed 1: epoch 2, 5/10 steps"),
        ("clicks", "units=[a]"): (None, "1/2", "", "seed 0: FAILED TrainingError"),
        ("stars", "single_task"): (None, "0/2", "", "seed 0: epoch 2, 2/10 steps"),
        ("stars", "units=[a]"): (None, "0/2", "", ""),
    }


@pytest.mark.parametrize(("name", "best"), [("y1/rmse", "0.2000"), ("y1/auc", "0.9000"), ("mean_gain", "0.9000")])
def test_the_best_is_the_lowest_where_lower_is_better(rows, write, name, best):
    write("clicks-single_task-0", "result.json", done(0.9, name))
    write("clicks-single_task-1", "progress.json", going(5, 0.2, name))
    write("clicks-units=[a]-0", "result.json", done(0.4, name))
    _, found = rows()
    assert found["clicks", "single_task"][:3] == ("bold", "1/2", best)
    assert found["clicks", "units=[a]"][:3] == (None, "1/2", "0.4000")


def test_the_best_is_one_of_each_data_set(rows, write):
    """Numbers of different data sets have nothing to say about each other."""
    for data, values in (("clicks", (0.1, 0.2)), ("stars", (0.9, 0.8))):
        for arm, value in zip(("single_task", "units=[a]"), values, strict=True):
            write(f"{data}-{arm}-0", "result.json", done(value))
    _, found = rows()
    assert [key for key, (style, *_) in found.items() if style] == [("clicks", "units=[a]"), ("stars", "single_task")]


def test_a_run_without_a_monitored_number_is_not_the_best(rows, write):
    write("clicks-single_task-0", "result.json", done(None))
    write("clicks-single_task-1", "result.json", done(-2.0))
    assert rows()[1]["clicks", "single_task"] == ("bold", "2/2", "-2.0000", "")


def test_a_failed_run_that_runs_again_is_under_way(tmp_path, rows, write):
    """Its record stays until there is a new one; what tells is which file is newer."""
    board, run_id = Board(tmp_path, MEMBERS), "clicks-single_task-0"
    write(run_id, "progress.json", going(9))
    write(run_id, "result.json", FAILED)
    files = [tmp_path / "runs" / run_id / name for name in ("progress.json", "result.json")]
    for path, second in zip(files, (1, 2), strict=True):
        os.utime(path, (second, second))
    assert rows(board)[1]["clicks", "single_task"] == (None, "1/2", "", "seed 0: FAILED TrainingError")
    os.utime(files[0], (3, 3))
    assert rows(board)[1]["clicks", "single_task"] == (None, "0/2", "", "seed 0: epoch 2, 9/10 steps")
    write(run_id, "result.json", done(0.5))
    assert rows(board)[1]["clicks", "single_task"] == ("bold", "1/2", "0.5000", "")


def test_time_left_counts_from_what_this_sitting_has_done(tmp_path, rows, write, monkeypatch):
    """Six runs were there before; one in a minute makes one more minute for the last one."""
    for member in MEMBERS[:6]:
        write(member["run_id"], "result.json", done(0.5))
    now = [0.0]
    monkeypatch.setattr("mtl_jax.report.board.time.monotonic", lambda: now[0])
    board = Board(tmp_path, MEMBERS)
    assert rows(board)[0] == "6.0 of 8 runs, 0 s"
    now[0] = 60.0
    write(MEMBERS[6]["run_id"], "result.json", done(0.5))
    assert rows(board)[0] == "7.0 of 8 runs, 1 min 0 s, about 1 min 0 s left"
    now[0] = 3661.0
    write(MEMBERS[7]["run_id"], "result.json", done(0.5))
    assert rows(board)[0] == "8.0 of 8 runs, 1 h 1 min"


def test_it_is_readable(tmp_path, write):
    write("clicks-units=[a]-0", "progress.json", going(5, 0.5))
    console = Console(record=True, width=100, file=io.StringIO())
    console.print(Board(tmp_path, MEMBERS).table())
    lines = [line.split() for line in console.export_text().splitlines() if line.strip()]
    assert lines[1] == ["data", "arm", "runs", "best", "on", "valid", "now"]
    assert ["clicks", "units=[a]", "0/2", "0.5000", "seed", "0:", "epoch", "2,", "5/10", "steps"] in lines
