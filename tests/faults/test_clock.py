"""A wall clock that is set back and forward by a day, again and again: durations and results do not notice."""

import datetime
import json
import sys
import time
import types

import pytest

from mtl_jax.errors import Interrupted
from mtl_jax.train.checkpoint import Checkpoints

DAY = 86_400.0


@pytest.fixture
def jumping_clock(monkeypatch):
    """Every look at the time of day is a day before or after the last one; returns the number of looks so far."""
    looks, true, true_ns = [], time.time, time.time_ns

    def jump():
        looks.append(None)
        return DAY if len(looks) % 2 else -DAY

    class Jumping(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return super().now(tz) + datetime.timedelta(seconds=jump())

    shim = types.SimpleNamespace(**{**vars(datetime), "datetime": Jumping})
    monkeypatch.setattr(time, "time", lambda: true() + jump())
    monkeypatch.setattr(time, "time_ns", lambda: true_ns() + int(jump() * 1e9))
    for name, module in list(sys.modules.items()):
        if name.startswith("mtl_jax") and getattr(module, "datetime", None) is datetime:
            monkeypatch.setattr(module, "datetime", shim)
    return lambda: len(looks)


def durations(content, path=""):
    """All numbers of seconds in a record or a line of the log, by their place."""
    found = {}
    for key, value in content.items():
        if isinstance(value, dict):
            found |= durations(value, f"{path}{key}/")
        elif "seconds" in key and value is not None:
            found[f"{path}{key}"] = value
    return found


def test_durations_and_resumption_do_not_notice(tmp_path, small_run, assert_as_undisturbed, jumping_clock):
    """The run is stopped in its second epoch and goes on, the clock jumping all the while."""
    folder, asked = tmp_path / "train" / "run", []
    started = time.perf_counter()
    overrides = ["trainer.checkpoint_seconds=3600"]  # longer than the test, shorter than the jumps
    with pytest.raises(Interrupted):
        small_run(folder, *overrides, should_stop=lambda: asked.append(None) or len(asked) == 5)
    checkpoints = Checkpoints(folder / "checkpoints")
    assert checkpoints.steps() == [3, 5], "no checkpoint but those of the epoch and of the end"
    first = checkpoints.progress(5)["train_seconds"]
    record = small_run(folder, *overrides)
    real = time.perf_counter() - started
    assert jumping_clock() > 10, "the clock was looked at"
    assert_as_undisturbed(folder)
    assert 0 < first < checkpoints.progress(9)["train_seconds"] < real
    assert {"compile_seconds", "wall_seconds"} <= set(durations(record["timing"]))
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    for content in (record["timing"], *lines):
        assert all(0 <= value < real for value in durations(content).values()), content
    advanced = [line["examples_per_second"] for line in lines if line["event"] == "advanced"]
    speeds = [record["timing"]["examples_per_second"], *advanced]
    rows = 9 * 100
    assert len(speeds) > 1 and all(speed > rows / 9 / real for speed in speeds)
