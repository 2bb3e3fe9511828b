"""Watching a run: logs that a kill leaves whole, traces and event files, and the same numbers with and without."""

import datetime
import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import hydra
import polars as pl
import pytest

from mtl_jax.config import plain
from mtl_jax.errors import ConfigError
from mtl_jax.report.folder import RunFolder
from mtl_jax.run import run
from mtl_jax.watch import LOG, JsonLines, RunLog, check_options

SMALL = ["data=synthetic", "data.num_rows=300", "data.dim=3", "sharing=shared_bottom", "sharing.units=[4]",
         "towers.units=[3]", "trainer.batch_size=20", "trainer.epochs=2", "trainer.steps_per_call=3"]  # fmt: skip
ROWS = [
    {"step": 12, "part": "train", "task": "buy", "name": "loss", "value": 0.5},
    {"step": 12, "part": "train", "task": "buy", "name": "weight", "value": 1.0},
    {"step": 12, "part": "valid", "task": "buy", "name": "auc", "value": None},
]
EVALUATED = {"epoch": 1, "values": {"buy auc": None}, "monitor": None, "best": True, "history": ROWS}


@pytest.fixture
def home(tmp_path):
    with RunFolder.open(tmp_path / "run") as folder:
        yield folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folders of a run that is watched in every way, and of one that is not."""
    root = tmp_path_factory.mktemp("runs")
    for name, chosen in (("watched", ["trainer.tensorboard=true", "trainer.profile=true"]), ("plain", [])):
        with hydra.initialize_config_module("conf", version_base="1.3"):
            config = plain(hydra.compose("train", overrides=[*SMALL, *chosen]))
        run(config, folder=root / name)
    return root / "watched", root / "plain"


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_event_is_one_json_object(home):
    device = {"memory": [{"device": "host", "in_use": 1, "limit": 2}]}
    log = JsonLines(home, device=lambda: device, clock=iter([0.0, 0.5, 2.0]).__next__)
    log.started(total_steps=24, done_steps=4)
    for loss in (math.nan, 0.25, 0.125):
        log.advanced(steps=4, epoch=1, losses={"buy": loss}, examples_per_second=9.0, weights={"buy": 2.0})
    log.evaluated(**EVALUATED)
    log.saved(step=12)
    log.finished()
    found = lines(home.path / LOG)
    times = [datetime.datetime.fromisoformat(event.pop("time")) for event in found]
    assert times == sorted(times) and all(time.utcoffset() == datetime.timedelta(0) for time in times)
    call = {"event": "advanced", "epoch": 1, "examples_per_second": 9.0, "weights": {"buy": 2.0}, "device": device}
    assert found == [
        {"event": "started", "step": 4, "total_steps": 24, "device": device},
        call | {"step": 8, "losses": {"buy": None}},
        call | {"step": 16, "losses": {"buy": 0.125}},
        {
            "event": "evaluated",
            "step": 12,
            "epoch": 1,
            "values": {"buy auc": None},
            "monitor": None,
            "best": True,
            "losses": {"buy": 0.5},
            "weights": {"buy": 1.0},
        },
        {"event": "checkpoint", "step": 12},
        {"event": "finished", "step": 16},
    ]


def test_a_kill_leaves_whole_lines(tmp_path):
    program = f"""
from mtl_jax.report.folder import RunFolder
from mtl_jax.watch import JsonLines
with RunFolder.open({str(tmp_path)!r}) as home:
    log = JsonLines(home, seconds=0.0)
    log.started(total_steps=10**9, done_steps=0)
    while True:
        log.advanced(steps=1, epoch=1, losses={{"buy": 0.5}}, examples_per_second=1.0)
        print(flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    for _ in range(200):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    found = lines(tmp_path / LOG)
    assert len(found) >= 200 and [event["step"] for event in found] == list(range(len(found)))


def test_the_run_log_names_the_device(home):
    RunLog(home, device=lambda: "gpu:0 1.0/78.0 GiB 97 %").evaluated(**EVALUATED)
    text = (home.path / "run.log").read_text()
    assert "epoch 1  buy auc n/a  monitor n/a" in text and "device gpu:0 1.0/78.0 GiB 97 %" in text
    assert home.read_history().height == 3


def test_a_run_logs_its_course(runs):
    for folder in runs:
        events = lines(folder / LOG)
        assert {"started", "advanced", "evaluated", "finished"} <= {event["event"] for event in events}
        evaluated = [event for event in events if event["event"] == "evaluated"]
        assert [event["step"] for event in evaluated] == [13, 26]
        assert all(event["weights"].keys() == event["losses"].keys() == {"y1", "y2"} for event in evaluated)
        assert events[-1]["event"] == "finished" and events[-1]["step"] == 26
        first = next(event for event in events if event["event"] == "advanced")
        assert first["step"] == 3 and first["device"]["memory"][0]["in_use"] > 0


def test_watching_leaves_traces_and_event_files(runs):
    watched, other = runs
    traces = [path for path in (watched / "profile").rglob("*") if path.is_file()]
    assert any(path.name.endswith(".xplane.pb") for path in traces) and all(path.stat().st_size for path in traces)
    board = list((watched / "tensorboard").iterdir())
    assert board and all(path.stat().st_size > 1000 for path in board)
    content = b"".join(path.read_bytes() for path in board)
    for tag in (b"train/loss/y1", b"train/weight/y2", b"valid/rmse/y1", b"train/learning_speed/y2"):
        assert tag in content
    kernels = [path.name for path in other.iterdir()]
    assert "profile" not in kernels and "tensorboard" not in kernels


def test_watching_changes_no_number(runs):
    """Curves, metrics and the run id are the same to the last bit: the keys of watching are not hashed."""
    one, two = (json.loads((folder / "result.json").read_text()) for folder in runs)
    for key in ("metrics", "support", "baselines", "monitor", "run_id", "config_hash"):
        assert one[key] == two[key], key
    assert pl.read_parquet(runs[0] / "history.parquet").equals(pl.read_parquet(runs[1] / "history.parquet"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"progress": "often"}, "trainer.progress is 'often'; expected auto, true or false"),
        ({"progress": 1}, "trainer.progress is 1; expected auto"),
        ({"tensorboard": "yes"}, "trainer.tensorboard is 'yes'; expected true or false"),
        ({"profile": None}, "trainer.profile is None; expected true or false"),
    ],
)
def test_other_values_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        check_options({"progress": "auto", "tensorboard": False, "profile": False} | options)


def test_a_missing_package_ends_the_run_before_any_data_is_read(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with hydra.initialize_config_module("conf", version_base="1.3"):
        chosen = [*SMALL, "trainer.tensorboard=true", "data=table", "data.path=absent.csv"]
        config = plain(
            hydra.compose("train", overrides=[o for o in chosen if not o.startswith("data.num") and o != "data.dim=3"])
        )
    with pytest.raises(ConfigError, match="tensorboardX is not installed"):
        run(config | {"output_dir": str(tmp_path)})
    assert not list(Path(tmp_path).iterdir())
