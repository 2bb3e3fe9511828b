"""Event files as another reader of their format sees them."""

import struct
import sys

import jax
import jax.numpy as jnp
import pytest
from tensorboardX.proto.event_pb2 import Event

from mtl_jax.errors import ConfigError
from mtl_jax.train.tensorboard import MOST_VALUES, TensorBoard, learning_speed


def events(folder):
    """All events in a folder, by the framing of TFRecord: length, checksum, content, checksum."""
    found = []
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            found.append(Event.FromString(content[12 : 12 + length]))
            content = content[16 + length :]
    return found


def scalars(folder):
    return {
        (value.tag, event.step): value.simple_value
        for event in events(folder)
        for value in event.summary.value
        if value.HasField("simple_value")
    }


def histograms(folder):
    return {v.tag: (e.step, v.histo) for e in events(folder) for v in e.summary.value if v.HasField("histo")}


def history(*epochs):
    """Training losses by epoch, ten steps each."""
    return [
        {"step": 10 * number, "part": "train", "task": task, "name": "loss", "value": loss}
        for number, losses in enumerate(epochs, 1)
        for task, loss in losses.items()
    ]


def test_curves_of_every_task(tmp_path):
    board = TensorBoard(tmp_path)
    board.started(total_steps=20, done_steps=0)
    board.advanced(steps=10, epoch=1, losses={"buy": 0.75, "spend": 4.0}, examples_per_second=100.0, weights=None)
    rows = history({"buy": 0.75, "spend": 4.0})
    rows += [
        {"step": 10, "part": "train", "task": "buy", "name": "weight", "value": 0.25},
        {"step": 10, "part": "valid", "task": "buy", "name": "auc", "value": None},
        {"step": 10, "part": "valid", "task": None, "name": "mean_gain", "value": 0.5},
    ]
    board.evaluated(epoch=1, values={}, monitor=0.5, best=True, history=rows)
    board.evaluated(epoch=2, values={}, monitor=0.5, best=True, history=rows + history({}, {"buy": 0.5, "spend": 1.0}))
    board.finished()
    found = scalars(tmp_path)
    assert found["train/loss_so_far/spend", 10] == 4.0 and found["train/examples_per_second", 10] == 100.0
    assert found["train/weight/buy", 10] == 0.25 and found["valid/mean_gain", 10] == 0.5
    assert found["train/loss/buy", 20] == 0.5
    assert found["train/learning_speed/buy", 20] == pytest.approx(1 / 3)
    assert found["train/learning_speed/spend", 20] == 0.75
    assert not any(tag == "valid/auc/buy" for tag, _ in found)


def test_histograms_of_what_is_a_parameter(tmp_path):
    board = TensorBoard(tmp_path)
    assert board.wants_arrays
    board.started(total_steps=1, done_steps=0)
    arrays = {
        "kernel": jnp.array([[1.0, 2.0], [3.0, jnp.nan]]),
        "half": jnp.array([4.0, 4.0], jnp.bfloat16),
        "table": jnp.ones((MOST_VALUES // 2, 3)),
        "broken": jnp.array([jnp.nan]),
        "count": jnp.array([1]),
        "key": jax.random.key(0),
    }
    board.parameters(7, arrays)
    board.finished()
    found = histograms(tmp_path)
    assert found.keys() == {"kernel", "half", "table"}
    step, kernel = found["kernel"]
    assert (step, kernel.num, kernel.min, kernel.max, kernel.sum) == (7, 3, 1.0, 3.0, 6.0)
    assert found["half"][1].sum == 8.0
    assert 0.7 * MOST_VALUES <= found["table"][1].num <= MOST_VALUES


def test_a_resumed_run_withdraws_what_it_repeats(tmp_path):
    board = TensorBoard(tmp_path)
    board.started(total_steps=20, done_steps=8)
    board.advanced(steps=2, epoch=1, losses={"buy": 0.5}, examples_per_second=1.0)
    board.finished()
    (start,) = [e for e in events(tmp_path) if e.HasField("session_log")]
    assert start.step == 9
    assert scalars(tmp_path)["train/loss_so_far/buy", 10] == 0.5


def test_learning_speed_needs_a_loss():
    rows = history({"buy": 0.0, "spend": 2.0}, {"buy": 0.0, "spend": 3.0})
    rows.append({"step": 20, "part": "train", "task": "spend", "name": "weight", "value": 9.0})
    assert learning_speed(rows) == {"spend": -0.5}


def test_without_the_package_it_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ConfigError, match=r"tensorboardX is not installed; .* pip install 'mtl_jax\[tensorboard\]'"):
        TensorBoard(tmp_path)
    assert not list(tmp_path.iterdir())
