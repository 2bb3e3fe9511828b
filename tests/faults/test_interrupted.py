"""Runs that are told to stop: at every kind of moment, and after training is over."""

import json

import pytest

from mtl_jax.errors import Interrupted
from mtl_jax.train.checkpoint import Checkpoints


def test_stopped_again_and_again(tmp_path, small_run, assert_as_undisturbed):
    """In an epoch, after the last step of one, after the last step of all, and between training and the test part."""
    folder = tmp_path / "train" / "run"
    moments = [
        (2, "epoch 1 after 2 of 3"),
        (3, "epoch 1 after 3 of 3"),
        (9, "epoch 3 after 3 of 3"),
        (9, "after training"),
    ]
    asked = 0
    for stop_at, words in moments:

        def should_stop():
            nonlocal asked
            asked += 1  # a step more, or in the last life the question after training
            return asked >= stop_at  # noqa: B023 (is called in this turn only)

        with pytest.raises(Interrupted, match=words):
            small_run(folder, should_stop=should_stop)
        assert Checkpoints(folder / "checkpoints").steps()[-1] == stop_at
        record = json.loads((folder / "result.json").read_text())
        assert record["status"] == "interrupted" and not record["test_openings"] and "error" not in record
    small_run(folder)
    assert_as_undisturbed(folder)
    assert json.loads((folder / "result.json").read_text())["test_openings"] == 1


def test_ctrl_c_without_a_handler(tmp_path, small_run, assert_as_undisturbed):
    """Whoever calls ``run`` from a program of their own gets the exception, and the same record."""
    folder, asked = tmp_path / "train" / "run", []

    def interrupt():
        asked.append(None)
        if len(asked) == 5:
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        small_run(folder, should_stop=interrupt)
    assert json.loads((folder / "result.json").read_text())["status"] == "interrupted"
    assert Checkpoints(folder / "checkpoints").steps() == [3], "the epoch under way is lost, no more"
    small_run(folder)
    assert_as_undisturbed(folder)
