"""SIGTERM and Ctrl-C: a checkpoint, an honest record, the shell's exit status, and the same command goes on."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import polars as pl
import pytest

from experiments.signals import StopRequest
from mtl_jax.report.record import validate

ROOT = Path(__file__).parents[2]
OVERRIDES = [
    "data=synthetic", "data.num_rows=3000", "data.dim=10", "sharing.expert_units=[8]", "sharing.num_experts=2",
    "towers.units=[4]", "trainer.batch_size=100", "trainer.epochs=4", "trainer.patience=0", "trainer.steps_per_call=1",
    "hydra.run.dir=run",
]  # fmt: skip
STEPS = 100
PATIENCE = 600  # seconds, on a machine with much else to do
PROGRAM = """
import os, signal, sys, time
from experiments.signals import StopRequest
with StopRequest() as stop:
    if sys.argv[1] == "asked":
        stop()
    try:
        print("ready", flush=True)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and not (sys.argv[2] == "heeds" and stop()):
            time.sleep(0.01)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    sys.exit(stop.status)
"""


def start(cwd, *more):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    command = [sys.executable, "-m", "experiments.train", *OVERRIDES, *more]
    return subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def newest(cwd):
    """Step of the newest checkpoint."""
    return max((int(path.name) for path in cwd.glob("run/checkpoints/*") if path.name.isdecimal()), default=0)


def in_training(process, cwd, after):
    """Waits until a checkpoint beyond step ``after`` was written, then stops the process in its tracks."""
    deadline = time.monotonic() + PATIENCE
    while newest(cwd) <= after:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGSTOP)
    assert newest(cwd) < STEPS, "the run was over before it could be interrupted"


def record(cwd):
    content = json.loads((cwd / "run" / "result.json").read_text())
    validate(content)
    return content


@pytest.mark.slow
def test_interrupted_twice_a_run_ends_as_if_undisturbed(tmp_path):
    """SIGTERM, then Ctrl-C, each after a checkpoint of its own life; meanwhile the folder admits nobody else."""
    cwd, whole = tmp_path / "interrupted", tmp_path / "whole"
    cwd.mkdir()
    whole.mkdir()
    undisturbed = start(whole, "trainer.checkpoint_seconds=1000")
    after = 0
    for number, status in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        process = start(cwd, "trainer.checkpoint_seconds=0")
        in_training(process, cwd, after + 2)  # the first checkpoint is older than the first question
        if status == 143:
            second = start(cwd, "trainer.checkpoint_seconds=0")
            _, complaint = second.communicate(timeout=PATIENCE)
            assert second.returncode == 1 and "Traceback" not in complaint
            assert "/interrupted/run' is in use by another process; expected one process a run folder" in complaint
        process.send_signal(number)
        process.send_signal(signal.SIGCONT)
        _, words = process.communicate(timeout=PATIENCE)
        assert process.returncode == status, words
        assert "stopping after a checkpoint" in words and "the same command goes on from there" in words
        assert "Traceback" not in words
        assert record(cwd)["status"] == "interrupted"
        after = newest(cwd)
        assert 0 < after < STEPS and not list(cwd.glob("run/checkpoints/.*"))
    process = start(cwd, "trainer.checkpoint_seconds=0")
    for one in (process, undisturbed):
        _, words = one.communicate(timeout=PATIENCE)
        assert one.returncode == 0, words
    assert record(cwd)["status"] == "completed"
    for name in ("metrics", "monitor", "support"):
        assert record(cwd)[name] == record(whole)[name]
    curves = [pl.read_parquet(folder / "run" / "history.parquet") for folder in (cwd, whole)]
    assert curves[0].equals(curves[1])
    log = [line.split(" ", 1)[1] for line in (cwd / "run" / "run.log").read_text().splitlines()]
    assert [line for line in log if line.startswith("end")] == ["end interrupted", "end interrupted", "end completed"]


@pytest.mark.parametrize(
    ("asked", "heeds", "sent", "status", "printed"),
    [
        ("asked", "heeds", [signal.SIGTERM], 143, "ready\n"),
        ("asked", "heeds", [signal.SIGINT], 130, "ready\n"),
        ("not asked", "busy", [signal.SIGTERM], 143, "ready\ninterrupted\n"),
        ("not asked", "busy", [signal.SIGINT], 130, "ready\ninterrupted\n"),
        ("asked", "busy", [signal.SIGINT, signal.SIGINT], -signal.SIGINT, "ready\n"),
        ("asked", "busy", [signal.SIGTERM, signal.SIGINT], -signal.SIGINT, "ready\n"),
    ],
    ids=["SIGTERM", "Ctrl-C", "SIGTERM early", "Ctrl-C early", "Ctrl-C twice", "SIGTERM, Ctrl-C"],
)
def test_what_a_signal_does(asked, heeds, sent, status, printed):
    """Before anybody asks it interrupts; then it is a request; a second Ctrl-C ends a process that does not heed it."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROGRAM, asked, heeds]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=environment, **pipes)
    first = process.stdout.readline()
    for number, more in zip(sent, [*sent[1:], None], strict=True):
        process.send_signal(number)
        if more:
            assert process.stderr.readline() == "\n" and "Ctrl-C ends at once" in process.stderr.readline()
    rest, _ = process.communicate(timeout=60)
    assert (process.returncode, first + rest) == (status, printed)


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(KeyboardInterrupt), StopRequest() as stop:
        assert signal.getsignal(signal.SIGTERM) not in before
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)  # is cut short
    assert stop.signal == signal.SIGTERM and stop.status == 143
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_a_second_sigterm_changes_nothing():
    """As launchers send it to a process and to its group."""
    with StopRequest() as stop:
        assert not stop()
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop() and stop.status == 143


def test_ignored_signals_stay_ignored():
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopRequest():
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, previous)


def test_another_thread_installs_nothing():
    before, inside = signal.getsignal(signal.SIGTERM), []

    def work():
        with StopRequest() as stop:
            inside.append((signal.getsignal(signal.SIGTERM), stop()))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert inside == [(before, False)]
