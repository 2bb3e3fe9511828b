"""The command line end to end: what it prints, what it leaves, and that a killed run ends as if undisturbed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from experiments import train
from experiments.cli import command_line
from mtl_jax.report.record import validate

ROOT = Path(__file__).parents[2]
SMALL = ["data=synthetic", "data.num_rows=3000", "data.dim=10", "sharing.expert_units=[8]", "sharing.num_experts=2",
         "towers.units=[4]", "trainer.batch_size=50", "trainer.epochs=3", "trainer.steps_per_call=5"]  # fmt: skip


def command(*overrides):
    return [sys.executable, "-m", "experiments.train", *overrides]


def run(*overrides, cwd):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command(*overrides), cwd=cwd, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return done


@pytest.fixture
def fail(tmp_path, monkeypatch, capsys):
    """Runs the command line in this process, in ``tmp_path``, and returns what it says before it ends in failure."""

    def call(*overrides):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["train", *overrides])
        with pytest.raises(SystemExit) as stopped:
            command_line(train.main, "train")
        assert stopped.value.code in (1, 2)
        return capsys.readouterr().err

    return call


def only(cwd, pattern):
    (found,) = Path(cwd).glob(pattern)
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    cwd = tmp_path_factory.mktemp("finished")
    return cwd, run(*SMALL, cwd=cwd)


def test_leaves_a_valid_record_and_everything_to_inspect(finished):
    cwd, done = finished
    folder = only(cwd, "outputs/train/*")
    record = json.loads((folder / "result.json").read_text())
    validate(record)
    assert record["status"] == "completed"
    assert record["test_openings"] == 1
    assert record["method"]["sharing"] == "mmoe"
    assert {"global_mean", "median", "logistic"} <= set(record["baselines"])
    assert record["data"]["rows"] == {"train": 2500, "valid": 250, "test": 250}
    history = pl.read_parquet(folder / "history.parquet")
    assert history.filter(name="mean_gain")["step"].to_list() == [50, 100, 150]
    best = history.filter(name="mean_gain").sort("value")["step"].to_list()[-1]
    assert record["monitor"]["step"] == best
    assert {"config.yaml", "schema.json", "run.log", "result.png", "checkpoints"} <= {p.name for p in folder.iterdir()}
    assert str(folder.relative_to(cwd)) in done.stdout
    assert "python -m experiments.train" in done.stdout and "sharing=single_task" in done.stdout


def test_the_same_command_prints_a_finished_run_and_trains_nothing(finished):
    cwd, first = finished
    record = only(cwd, "outputs/train/*/result.json")
    before = record.read_bytes()
    again = run(*SMALL, cwd=cwd)
    assert "nothing to train" in again.stdout
    assert record.read_bytes() == before
    assert again.stdout.splitlines()[-1] == first.stdout.splitlines()[-1]


def test_a_single_task_record_gives_delta_m(finished):
    cwd, _ = finished
    small = [o for o in SMALL if not o.startswith("sharing")]
    run(*small, "sharing=single_task", "sharing.units=[8]", cwd=cwd)
    again = run(*SMALL, cwd=cwd)
    assert "% against single task" in again.stdout


@pytest.mark.slow
def test_a_killed_run_ends_as_the_undisturbed_one(finished, tmp_path):
    """kill -9 in the middle of an epoch, the same command again: bit for bit the same curves and parameters."""
    cwd, _ = finished
    overrides = [*SMALL, "trainer.checkpoint_seconds=0"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command(*overrides), cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:  # until a checkpoint inside the second epoch
        steps = [int(p.name) for p in tmp_path.glob("outputs/train/*/checkpoints/*") if p.name.isdecimal()]
        if any(50 < step < 100 for step in steps):
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not list(tmp_path.glob("outputs/train/*/result.json"))
    run(*overrides, cwd=tmp_path)
    resumed = only(tmp_path, "outputs/train/*")
    run(*overrides, "hydra.run.dir=whole", cwd=cwd)
    undisturbed = Path(cwd) / "whole"
    assert pl.read_parquet(resumed / "history.parquet").equals(pl.read_parquet(undisturbed / "history.parquet"))
    one, two = (json.loads((f / "result.json").read_text()) for f in (resumed, undisturbed))
    assert one["metrics"] == two["metrics"]
    assert one["run_id"] == two["run_id"]
    assert sorted(p.name for p in (resumed / "checkpoints").iterdir()) == sorted(
        p.name for p in (undisturbed / "checkpoints").iterdir()
    )


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["trainer.epoch=3"], ["unknown option 'trainer.epoch'", "'epochs'", "Did you mean"]),
        (["sharing=mmeo"], ["sharing/mmeo", "mmoe", "shared_bottom", "single_task"]),
        (["+surplus=1"], ["nothing reads 'surplus'", "'trainer'"]),
        (["data.tasks=[y9]"], ["unknown task 'y9'", "'y1'"]),
        (["trainer.monitor=y1/auc"], ["trainer.monitor is 'y1/auc'", "'y1/rmse'", "'mean_gain'"]),
        (["trainer.epochs=0"], ["trainer.epochs is 0", ">= 1"]),
        (["optimizer.learning_rate=-1"], ["optimizer.learning_rate is -1", "> 0"]),
        (["+sharing.experts=2"], ["option 'experts'", "num_experts"]),
        (["balancing=fixed"], ["balancing.weights"]),
        (["balancing=fixed", "balancing.weights=[1,2,3]"], ["3 values", "2"]),
        (["balancing.scope=whole"], ["balancing.scope is 'whole'", "'encoder'"]),
        (["sharing=single_task", "balancing=pcgrad"], ["shared parameters", "balancing=equal"]),
        (["sharing._target_=os.system"], ["_target_ 'os.system'", "allow="]),
        (["objective.reduction=max"], ["objective.reduction is 'max'", "'sum'"]),
        (["trainer.tables={nobody: sparse}"], ["trainer.tables names 'nobody'"]),
    ],
)
def test_a_mistake_is_one_clear_message_and_leaves_nothing_half_written(overrides, words, fail, tmp_path):
    small = [o for o in SMALL if not (o.startswith("sharing.") and "sharing=single_task" in overrides)]
    message = fail(*small, *overrides)
    assert "Traceback" not in message
    for word in words:
        assert word in message
    for record in tmp_path.glob("outputs/train/*/result.json"):
        written = json.loads(record.read_text())
        validate(written)
        assert written["status"] == "failed"


def test_a_diverging_run_stops_and_says_where(fail, tmp_path):
    overrides = ["optimizer=sgd", "optimizer.learning_rate=1e12"]
    message = fail(*SMALL, *overrides)
    assert "is not finite in step" in message and "y1" in message and "learning_rate" in message
    record = json.loads(only(tmp_path, "outputs/train/*/result.json").read_text())
    validate(record)
    assert record["status"] == "failed" and record["error"]["class"] == "TrainingError"


def test_a_module_of_ones_own(fail, tmp_path):
    """docs/own_module.md: a strategy outside the package, with a regulariser, behind allow=[...]."""
    (tmp_path / "mypaper.py").write_text(
        "import jax.numpy as jnp\n"
        "from flax import nnx\n"
        "from mtl_jax.nn import MLP\n"
        "from mtl_jax.sharing import Context, Strategy\n\n"
        "class HalfShared(Strategy):\n"
        "    def __init__(self, in_features, tasks, *, width=8, rngs):\n"
        "        self.tasks, self.out_features = tuple(tasks), width\n"
        "        self.bottom = MLP(in_features, (width,), rngs=rngs)\n"
        "        self.task = nnx.Dict({t: MLP(width, (width,), rngs=rngs) for t in tasks})\n\n"
        "    def common(self, x, context=Context()):\n"
        "        return self.bottom(x, context)\n\n"
        "    def head(self, task, common):\n"
        "        return self.task[task](common)\n\n"
        "    def regulariser(self):\n"
        "        return 1e-3 * jnp.sum(self.bottom.layers[0].kernel[...] ** 2)\n"
    )
    (tmp_path / "own" / "sharing").mkdir(parents=True)
    (tmp_path / "own" / "sharing" / "half.yaml").write_text("_target_: mypaper.HalfShared\n_partial_: true\nwidth: 6\n")
    small = [o for o in SMALL if not o.startswith("sharing")]
    chosen = ["hydra.searchpath=[file://own]", "sharing=half", "allow=[mypaper]"]
    done = run(*small, *chosen, cwd=tmp_path)
    assert "half + equal on synthetic" in done.stdout
    assert "allow=[mypaper]" in fail(*small, *chosen[:2])


def test_help_is_for_newcomers(tmp_path):
    shown = run("--help", cwd=tmp_path).stdout
    for words in (
        "run folder",
        "data=movielens_1m",
        "single_task, sluice",
        "resumes",
        "batch_size",
    ):
        assert words in shown


def test_a_table_of_ones_own(tmp_path):
    """The command of docs/own_data.md, on a CSV file."""
    rng = np.random.default_rng(0)
    customer = rng.integers(0, 100, 1500)
    price = rng.gamma(2.0, 10.0, 1500)
    buy = rng.random(1500) < 1 / (1 + np.exp(-(price - 20) / 14 - rng.normal(size=100)[customer]))
    columns = {"customer": customer, "day": np.sort(rng.integers(0, 60, 1500)), "price": price, "buy": buy.astype(int)}
    pl.DataFrame(columns | {"spend": price * rng.gamma(2.0, 1.0, 1500)}).write_csv(tmp_path / "orders.csv")
    chosen = ["data=table", "data.path=orders.csv", "data.tasks={buy: binary, spend: regression}"]
    small = [o for o in SMALL if not o.startswith("data")]
    run(*chosen, "data.user=customer", "data.time=day", *small, cwd=tmp_path)
    record = json.loads(only(tmp_path, "outputs/train/*/result.json").read_text())
    validate(record)
    assert record["data"]["split"] == "time"
    assert {name: facts["kind"] for name, facts in record["tasks"].items()} == {"buy": "binary", "spend": "regression"}
    assert record["metrics"]["test"]["buy"]["auc"] > 0.6
