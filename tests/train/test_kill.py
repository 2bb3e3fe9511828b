"""A run that is killed, without a chance to clean up, goes on as if nothing had happened."""

import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from mtl_jax.train.checkpoint import Checkpoints
from mtl_jax.train.state import Functional

PROGRAM = """
import functools
import os
import signal
import sys
import threading

from flax import nnx

import mtl_jax
from mtl_jax.balancing import pcgrad
from mtl_jax.nn import Tower
from mtl_jax.sharing import SharedBottom
from mtl_jax.train import Quiet, fit

CHANGES = {"open", "os.rename", "os.mkdir", "os.rmdir", "os.remove"}


class Announcing(Quiet):
    def __init__(self):
        self.done = 0

    def started(self, *, total_steps, done_steps):
        self.done = done_steps
        print("from", done_steps, flush=True)

    def advanced(self, *, steps, **facts):
        self.done += steps
        print("step", self.done, flush=True)


def run(checkpoints, epochs, observer=None):
    data = mtl_jax.data.load("synthetic", num_rows=300, dim=4)
    model = mtl_jax.MultiTaskModel(
        data.schema,
        sharing=functools.partial(SharedBottom, units=(4,), dropout=0.2),
        towers=functools.partial(Tower, units=(3,)),
        rngs=nnx.Rngs(0),
    )
    options = {"epochs": epochs, "batch_size": 24, "steps_per_call": 1, "patience": 0, "checkpoint_seconds": 0}
    return fit(model, data, balancer=pcgrad(), checkpoints=checkpoints, observer=observer or Announcing(), **options)


def run_until_killed(checkpoints, epochs, steps, change):
    # With `change`, dies by its own hand right before that change to the checkpoints' folder, some steps after its start.
    observer, left = Announcing(), [change]

    def before(event, details):
        if event in CHANGES and checkpoints in str(details[0]) and threading.current_thread() is threading.main_thread():
            if change is not None and observer.done >= observer.begun + steps:
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

    started = observer.started

    def begin(*, total_steps, done_steps):
        observer.begun = done_steps
        started(total_steps=total_steps, done_steps=done_steps)
        sys.addaudithook(before)

    observer.started = begin
    run(checkpoints, epochs, observer)
"""


def kill(checkpoints, epochs, *, steps, change=None, delay=None):
    """Starts the run, has it killed so many steps after its start, and returns the step from which it started.

    Either by itself before change number ``change`` of the folder of checkpoints, which is in the middle of a write, or
    from outside, ``delay`` seconds after the step was announced.
    """
    program = PROGRAM + f"\nrun_until_killed({str(checkpoints)!r}, {epochs}, {steps}, {change})\n"
    environment = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environment)
    begun = None
    for line in process.stdout:
        word, number = line.split()
        begun = int(number) if word == "from" else begun
        if delay is not None and int(number) >= begun + steps:
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
            break
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL
    return begun


def assert_goes_on(checkpoints, epochs, capfd):
    """The same program, in this process: it starts from the newest checkpoint and ends as a run without checkpoints."""
    namespace = {}
    exec(PROGRAM, namespace)
    kept = Checkpoints(checkpoints).steps()[-1]
    capfd.readouterr()
    resumed, undisturbed = namespace["run"](checkpoints, epochs), namespace["run"](None, epochs)
    announced = [line for line in capfd.readouterr().out.splitlines() if line.startswith("from")]
    assert announced == [f"from {kept}", "from 0"]
    one, other = (Functional.of(result.model)[1] for result in (resumed, undisturbed))
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert resumed.history == undisturbed.history
    assert resumed.monitor == undisturbed.monitor and resumed.metrics == undisturbed.metrics
    assert not list(checkpoints.glob(".*")), "nothing half-written stays"
    return kept


def test_killed_after_a_step_and_during_a_write(tmp_path, capfd):
    """Once from outside, once right before the eighth change that writing a checkpoint makes to its folder."""
    checkpoints = tmp_path / "checkpoints"
    assert kill(checkpoints, 3, steps=4, delay=0.0) == 0
    begun = kill(checkpoints, 3, steps=9, change=8)
    assert 3 <= begun <= 7, "a checkpoint after every step, give or take those of the race"
    assert list(checkpoints.glob(".*.partial")), "the second one died while it wrote"
    assert assert_goes_on(checkpoints, 3, capfd) == begun + 8


@pytest.mark.slow
def test_ten_kills_at_random_moments(tmp_path, capfd):
    """Every other one during a write. Each life gets further than the one before or starts where it did."""
    checkpoints, rng = tmp_path / "checkpoints", np.random.default_rng(7)
    begun = []
    for number in range(10):
        moment = {"change": int(rng.integers(60))} if number % 2 else {"delay": rng.uniform(0, 0.05)}
        begun.append(kill(checkpoints, 12, steps=int(rng.integers(1, 8)), **moment))
    assert begun == sorted(begun) and begun[-1] > 10
    assert assert_goes_on(checkpoints, 12, capfd) > begun[-1]
