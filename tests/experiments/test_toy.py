"""The command line of the toy: one figure for all methods, and mistakes in one message."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import toy
from experiments.cli import command_line

ROOT = Path(__file__).parents[2]
SHORT = ["steps=200", "every=50", "starts=[[9,-1],[0,0]]"]


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """(*overrides) -> exit status, standard output, standard error; in this process, in an empty folder."""

    def run(*overrides):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["toy", *overrides])
        status = 0
        try:
            command_line(toy.main, "toy")
        except SystemExit as end:
            status = end.code
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


@pytest.mark.slow
def test_a_comma_list_makes_one_figure(tmp_path):
    """In a fresh process, as a user would; the option goes to the method that has it."""
    command = [sys.executable, "-m", "experiments.toy", "balancing=equal,famo,fixed", "balancing.weight_decay=0.5"]
    command += ["balancing.weights=[1,2]", *SHORT]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    (folder,) = (tmp_path / "outputs" / "toy").iterdir()
    assert {"toy.png", "toy.json"} <= {path.name for path in folder.iterdir()}
    assert (folder / "toy.png").read_bytes().startswith(b"\x89PNG")
    content = json.loads((folder / "toy.json").read_text())
    assert list(content["methods"]) == ["equal", "famo", "fixed"]
    assert content["methods"]["famo"]["config"]["weight_decay"] == 0.5
    assert content["methods"]["fixed"]["config"]["weights"] == [1, 2]
    assert "weight_decay" not in content["methods"]["equal"]["config"]
    for method in content["methods"].values():
        assert method["kept"] == [0, 50, 100, 150, 200]
        assert [len(method[name]) for name in ("points", "losses", "outcomes")] == [2, 2, 4]
        assert method["points"][0][0][0] == [9.0, -1.0]
    rows = [cells[:2] for cells in map(str.split, done.stdout.splitlines()) if cells and cells[0] in content["methods"]]
    assert rows == [[name, kappa] for name in ("equal", "famo", "fixed") for kappa in ("1", "1", "0.1", "0.1")]
    assert str(folder.relative_to(tmp_path)) in done.stdout


def test_one_method_in_a_folder_of_ones_own(call, tmp_path):
    status, out, _ = call("balancing=equal", "balancing.reduction=mean", "hydra.run.dir=here", "kappas=[1]", *SHORT)
    assert status == 0 and "equal" in out
    content = json.loads((tmp_path / "here" / "toy.json").read_text())
    assert content["methods"]["equal"]["config"]["reduction"] == "mean"
    assert content["kappas"] == [1] and len(content["pareto_set"]) > 100
    assert (tmp_path / "here" / "toy.png").exists() and not (tmp_path / "outputs").exists()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["balancing=nash"], ["balancing/nash", "nash_mtl"]),
        (["balancing=[equal,nobody]"], ["balancing/nobody", "--help"]),
        (["balancing=equal", "balancing.c=1"], ["unknown option 'balancing.c'"]),
        (["stepz=1"], ["unknown option 'stepz'", "'steps'"]),
        (["balancing=dwa"], ["waits for the end of an epoch", "period"]),
        (["balancing=krum"], ["got 2 tasks", "4"]),
        (["balancing=fixed"], ["balancing.weights"]),
        (["balancing=cagrad", "balancing.c=-1"], ["cagrad(c)", "-1"]),
        (["kappas=[0]"], ["toy.kappas is 0"]),
        (["steps=many"], ["toy.steps", "many", "whole number"]),
        (["balancing._target_=os.system"], ["os.system", "allow="]),
    ],
)
def test_a_mistake_is_one_clear_message_and_leaves_no_figure(overrides, words, call, tmp_path):
    status, _, message = call(*SHORT[1:], *overrides)
    assert status in (1, 2) and "Traceback" not in message
    for word in words:
        assert word in message
    assert not list(tmp_path.glob("**/toy.*"))


def test_help_is_for_newcomers(tmp_path):
    command = [sys.executable, "-m", "experiments.toy", "--help"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    for words in ("one figure", "balancing=equal,mgda", "nash_mtl", "kappas", "docs/balancing.md"):
        assert words in done.stdout
