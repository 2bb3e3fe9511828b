"""A run that is killed, without a chance to clean up, goes on as if nothing had happened."""

import signal
import subprocess
import sys

import jax
import numpy as np

from mtl_jax.train.checkpoint import Checkpoints
from mtl_jax.train.state import Functional

PROGRAM = """
import functools
import sys

from flax import nnx

import mtl_jax
from mtl_jax.balancing import pcgrad
from mtl_jax.nn import Tower
from mtl_jax.sharing import SharedBottom
from mtl_jax.train import Quiet, fit


class Announcing(Quiet):
    def __init__(self):
        self.done = 0

    def started(self, *, total_steps, done_steps):
        self.done = done_steps
        print("from", done_steps, flush=True)

    def advanced(self, *, steps, epoch, losses, examples_per_second):
        self.done += steps
        print("step", self.done, flush=True)


def run(checkpoints):
    data = mtl_jax.data.load("synthetic", num_rows=300, dim=4)
    model = mtl_jax.MultiTaskModel(
        data.schema,
        sharing=functools.partial(SharedBottom, units=(4,), dropout=0.2),
        towers=functools.partial(Tower, units=(3,)),
        rngs=nnx.Rngs(0),
    )
    options = {"epochs": 3, "batch_size": 24, "steps_per_call": 1, "patience": 0}
    observer = Announcing()
    result = fit(
        model, data, balancer=pcgrad(), checkpoints=checkpoints, checkpoint_seconds=0, observer=observer, **options
    )
    return result
"""


def test_killed_between_and_during_writes(tmp_path, capfd):
    """SIGKILL right after steps 4 and 15 were announced, which is while their checkpoint is being written."""
    checkpoints = tmp_path / "checkpoints"
    program = PROGRAM + f"\nrun({str(checkpoints)!r})\n"
    begun = -1
    for last in (4, 15):
        process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
        lines = []
        for line in process.stdout:
            lines.append(line.split())
            if lines[-1] == ["step", str(last)]:
                process.send_signal(signal.SIGKILL)
                break
        process.stdout.close()
        assert process.wait() == -signal.SIGKILL
        assert lines[0][0] == "from" and int(lines[0][1]) > begun
        begun = int(lines[0][1])
        kept = Checkpoints(checkpoints).steps()[-1]
        assert last - 1 <= kept <= last + 2, "a checkpoint after every step, give or take those of the race"

    namespace = {}
    exec(PROGRAM, namespace)  # the same program in this process
    resumed, undisturbed = namespace["run"](checkpoints), namespace["run"](None)
    announced = [line for line in capfd.readouterr().out.splitlines() if line.startswith("from")]
    assert announced == [f"from {kept}", "from 0"]
    one, other = (Functional.of(result.model)[1] for result in (resumed, undisturbed))
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert resumed.history == undisturbed.history
    assert resumed.monitor == undisturbed.monitor and resumed.metrics == undisturbed.metrics
