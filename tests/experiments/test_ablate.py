"""The command line of ablations: from comma lists to reports, mistakes in one message, and ends in mid-flight."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import hydra
import pytest

from experiments import ablate
from experiments.cli import command_line
from mtl_jax.report.record import validate

ROOT = Path(__file__).parents[2]
DATA = ["data=synthetic", "data.num_rows=300", "data.dim=4"]
SMALL = [*DATA, "towers.units=[3]", "trainer.batch_size=50", "trainer.epochs=1", "seeds=1", "vectorize.axis=map"]
GRID = [
    *DATA, "towers.units=[3]", "trainer.batch_size=50", "trainer.epochs=1", "sharing=shared_bottom,mmoe", "seeds=2",
    "vectorize.axis=map", "name=grid",
]  # fmt: skip
RATES = "axis.optimizer.learning_rate=[0.001,0.01]"
PATIENCE = 600  # seconds, on a machine with much else to do


def start(*overrides, cwd):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    command = [sys.executable, "-m", "experiments.ablate", *overrides]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=cwd, env=environment, **pipes)


@pytest.fixture
def call(monkeypatch, capsys):
    """(*overrides, cwd) -> exit status, standard output, standard error; in this process, whose data are read once."""

    def run(*overrides, cwd):
        monkeypatch.chdir(cwd)
        overrides = [f"++{override}" if override.startswith("axis.") else override for override in overrides]
        monkeypatch.setattr(sys, "argv", ["ablate", *overrides])
        status = 0
        try:
            command_line(ablate.main, "ablate")
        except SystemExit as end:
            status = end.code
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


def plan(folder):
    return json.loads((folder / "ablation.json").read_text())


def records(folder):
    found = {path.parent.name: json.loads(path.read_bytes()) for path in folder.glob("runs/*/result.json")}
    for record in found.values():
        validate(record)
    return found


def times(folder):
    return {str(path): path.stat().st_mtime_ns for path in folder.glob("runs/**/*") if path.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Working folder of a grid that ended, and what it printed."""
    cwd = tmp_path_factory.mktemp("grid")
    process = start(*GRID, RATES, cwd=cwd)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    return cwd, out, err


def test_comma_lists_and_axes_become_runs(finished):
    cwd, _, _ = finished
    folder = cwd / "outputs/ablate/grid"
    content = plan(folder)
    assert content["baseline"] == "single_task" and content["id"] == "grid"
    assert content["command"].startswith("python -m experiments.ablate data=synthetic") and RATES in content["command"]
    rates = [{"optimizer.learning_rate": rate} for rate in (0.001, 0.01)]
    assert [(member["arm"], member["values"], member["seed"], member["data"]) for member in content["members"]] == [
        (arm, values, seed, "synthetic")
        for arm in ("single_task", "shared_bottom", "mmoe")
        for values in rates
        for seed in (0, 1)
    ]
    found = records(folder)
    assert found.keys() == {member["run_id"] for member in content["members"]}
    for member in content["members"]:
        record = found[member["run_id"]]
        assert (record["status"], record["method"]["sharing"], record["seed"]) == (
            "completed",
            member["arm"],
            member["seed"],
        )
        assert record["config"]["optimizer"]["learning_rate"] == member["values"]["optimizer.learning_rate"]


def test_it_ends_in_reports_and_reads_well_in_a_pipe(finished):
    cwd, out, err = finished
    report = cwd / "outputs/ablate/grid/report"
    assert {"report.md", "tables.tex", "members.parquet", "table.json", "report.html"} <= {
        p.name for p in report.iterdir()
    }
    assert list(report.glob("*.csv"))
    for arm in ("single_task", "shared_bottom", "mmoe"):
        assert arm in out
    lines = err.splitlines()
    assert lines[0].startswith("12 runs of 3 arms in ") and lines[0].endswith("outputs/ablate/grid")
    ended = [line.partition(":")[0] for line in lines[1:]]
    assert len(ended) == len(set(ended)) == 12, "each line names its run"
    assert "completed mmoe equal optimizer.learning_rate=0.01 seed 1" in ended and "mean_gain" in lines[-1]
    assert "\x1b" not in out + err and "Traceback" not in err


def test_the_same_command_trains_nothing_and_reports_again(finished, call):
    cwd, out, _ = finished
    folder = cwd / "outputs/ablate/grid"
    before, created = times(folder), plan(folder)["created"]
    page = folder / "report" / "report.html"
    page.unlink()
    status, again, err = call(*GRID, RATES, cwd=cwd)
    assert (status, again) == (0, out)
    assert times(folder) == before and "completed" not in err
    assert page.exists() and plan(folder)["created"] == created


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["trainer.epoch=3"], ["unknown option 'trainer.epoch'", "'epochs'"]),
        (["+surplus=1"], ["nothing reads 'surplus'"]),
        (["sharing=mmeo"], ["sharing/mmeo", "shared_bottom"]),
        (["sharing=mmoe,mmeo"], ["arm 'mmeo' cannot be composed", "sharing/mmeo", "shared_bottom"]),
        (
            ["sharing=mmoe,shared_bottom", "sharing.num_experts=2"],
            ["arm 'shared_bottom' cannot be composed", "num_experts"],
        ),
        (["axis.optimizer.rate=[1]"], ["axis.optimizer.rate names no key of any arm"]),
        (["axis.optimizer.learning_rate=0.1"], ["expected a list of values", "axis.optimizer.learning_rate=[...]"]),
        (
            ["axis.optimizer.learning_rate=0.1,0.2"],
            ["axis.optimizer.learning_rate has a comma list", "axis.<key>=[...]"],
        ),
        (["axis.optimizer.learning_rate=[0.1,-1]"], ["optimizer.learning_rate is -1"]),
        (["seeds=0"], ["seeds is 0"]),
        (["seeds=[1,1]"], ["seeds is [1, 1]", "different ones"]),
        (["seeds=1,2"], ["seeds has a comma list", "seeds=[0,1]"]),
        (["seed=1,2"], ["seed=1,2 is for one run", "seeds=[...]"]),
        (["seed=3"], ["seed=3 is for one run", "seeds=[...]"]),
        (["arms=[wide]"], ["arms has 'wide'", "name and overrides"]),
        (["arms={wide: 1}"], ["arms is {'wide': 1}", "a list of entries"]),
        (["arms=[{name: a, overrides: ['sharing=mmeo']}]"], ["arm 'a' cannot be composed", "sharing/mmeo"]),
        (
            ["arms=[{name: a, overrides: ['seed=4']}]", "baseline=none", "sharing=mmoe,shared_bottom"],
            ["same runs", "'a'"],
        ),
        (["+grid.sharing=mmoe"], ["grid.sharing is 'mmoe'", "expected a list"]),
        (["baseline=mmoe"], ["baseline is 'mmoe'", "none"]),
        (["vectorize.axis=x"], ["vectorize.axis is 'x'", "'vmap'"]),
        (["folds=3"], ["folds is 3"]),
        (["folder=occupied"], ["occupied", "expected a writable folder"]),
    ],
)
def test_a_mistake_is_one_message_and_leaves_nothing(overrides, words, call, tmp_path):
    (tmp_path / "occupied").write_text("by a file")
    given = [override.partition("=")[0] for override in overrides]
    small = [override for override in SMALL if override.partition("=")[0] not in given]
    status, out, err = call(*small, *overrides, cwd=tmp_path)
    assert (status, out) == (2, "") and "Traceback" not in err, err
    for word in words:
        assert word in err
    assert [path.name for path in tmp_path.iterdir()] == ["occupied"]


@pytest.mark.parametrize(("budget", "seeds"), [("quick", 5), ("full", 10)])
def test_a_budget_says_how_many_seeds(budget, seeds):
    """conf/ablate.yaml has keys with values of its own, which must not hide those of an experiment or a budget."""
    with hydra.initialize_config_module("conf", version_base="1.3"):
        assert hydra.compose("ablate", overrides=[f"budget={budget}"]).seeds == seeds
        assert hydra.compose("ablate", overrides=[f"budget={budget}", "seeds=3"]).seeds == 3


def test_the_folder_of_a_run_is_not_that_of_an_ablation(call, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text('{"run_id": "a"}')
    status, _, err = call(*SMALL, "folder=run", cwd=tmp_path)
    assert status == 2 and "is the folder of a run; expected that of an ablation" in err
    assert not (tmp_path / "run" / "ablation.json").exists()


EXPERIMENT = """# @package _global_
defaults:
  - override /data: synthetic

grid:
  sharing: [shared_bottom, mmoe]
  balancing: [equal, pcgrad]
arms:
  - name: narrow
    overrides: [sharing=shared_bottom, "sharing.units=[3]"]
  - name: wild
    overrides: [sharing=shared_bottom, optimizer=sgd, optimizer.learning_rate=1e30]
"""


def test_named_arms_failures_and_a_strange_folder(call, tmp_path):
    """An experiment file whose grid the command line narrows; one of its arms fails, alone, and runs again on demand."""
    (tmp_path / "own" / "experiment").mkdir(parents=True)
    (tmp_path / "own" / "experiment" / "mine.yaml").write_text(EXPERIMENT)
    name = "it's, a {strange} folder"
    command = [
        "hydra.searchpath=[file://own]", "experiment=mine", "sharing=shared_bottom", "balancing=equal", "baseline=none",
        *SMALL, 'folder="' + name + '"',
    ]  # fmt: skip
    status, _, err = call(*command, cwd=tmp_path)
    assert status == 1, err
    content, found = plan(tmp_path / name), records(tmp_path / name)
    assert content["baseline"] is None
    by_arm = {member["arm"]: found[member["run_id"]] for member in content["members"]}
    assert {arm: record["status"] for arm, record in by_arm.items()} == {"narrow": "completed", "wild": "failed"}
    assert by_arm["narrow"]["config"]["sharing"]["units"] == [3]
    assert (
        err.splitlines()[-2].startswith("failed: wild seed 0: TrainingError: ") and "not finite" in err.splitlines()[-2]
    )
    assert err.splitlines()[-1] == "1 of 2 runs failed; retry=true runs them again"
    assert "Traceback" not in err

    status, _, err = call(*command, cwd=tmp_path)
    assert status == 1 and "1 of 2 runs failed" in err and "\nfailed shared_bottom" not in err
    status, _, err = call(*command, "retry=true", cwd=tmp_path)
    assert status == 1 and "\nfailed shared_bottom" in err and "\ncompleted" not in err


def test_where_every_run_fails_there_is_nothing_to_report(call, tmp_path):
    rates = "axis.optimizer.learning_rate=[1e30,2e30]"
    options = ["optimizer=sgd", "sharing=shared_bottom", "sharing.units=[3]", "baseline=none", "folder=bad", rates]
    status, out, err = call(*SMALL, *options, cwd=tmp_path)
    assert (status, out) == (1, "") and not (tmp_path / "bad" / "report").exists()
    assert "failed: shared_bottom+equal optimizer.learning_rate=2e+30 seed 0: TrainingError: " in err
    assert err.splitlines()[-1] == "2 of 2 runs failed; retry=true runs them again" and "RunFolderError" not in err


@pytest.mark.slow
def test_stopped_by_sigterm_the_same_command_goes_on(call, tmp_path):
    long = [override for override in SMALL if not override.startswith("trainer.epochs")]
    command = [*long, "trainer.epochs=30", "trainer.patience=0", "sharing=shared_bottom", "baseline=none", "name=long"]
    process = start(*command, cwd=tmp_path)
    deadline = time.monotonic() + PATIENCE
    while not list(tmp_path.glob("outputs/ablate/long/runs/*/checkpoints/[0-9]*")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 143, err
    assert "stopping after a checkpoint" in err and "the same command goes on from there" in err
    assert "Traceback" not in err and out == ""
    folder = tmp_path / "outputs/ablate/long"
    assert [record["status"] for record in records(folder).values()] == ["interrupted"]
    status, out, err = call(*command, cwd=tmp_path)
    assert status == 0, err
    assert [record["status"] for record in records(folder).values()] == ["completed"]
    (log,) = folder.glob("runs/*/log.jsonl")
    begun = [event["step"] for event in map(json.loads, log.read_text().splitlines()) if event["event"] == "started"]
    assert len(begun) == 2 and 0 == begun[0] < begun[1] < 150


def test_help_and_the_configuration(call, tmp_path):
    status, out, err = call("--help", cwd=tmp_path)
    assert status == 0, err
    for words in ("experiments.ablate sharing=", "axis.<key>=[...]", "retry=true", "baseline=none", "seeds: 5"):
        assert words in out
    status, out, err = call("--cfg", "job", "sharing=shared_bottom", cwd=tmp_path)
    assert status == 0, err
    assert "mtl_jax.sharing.SharedBottom" in out and "vectorize:" in out
    assert not list(tmp_path.iterdir())
