"""Files of a run folder that were damaged between two runs: what still stands is used, and the run says so."""

import json
import shutil

import pytest

from mtl_jax.errors import Interrupted, RunFolderError
from mtl_jax.train.checkpoint import Checkpoints

EVERY_STEP = "trainer.checkpoint_seconds=0"


@pytest.fixture(scope="module")
def stopped_once(tmp_path_factory, small_run):
    folder, asked = tmp_path_factory.mktemp("stopped") / "train" / "run", []
    with pytest.raises(Interrupted):
        small_run(folder, EVERY_STEP, should_stop=lambda: asked.append(None) or len(asked) == 5)
    assert Checkpoints(folder / "checkpoints").steps() == [3, 4, 5]
    return folder


@pytest.fixture
def stopped(tmp_path, stopped_once):
    """A run of nine steps that was stopped after the fifth; the best epoch ended with step 3."""
    return shutil.copytree(stopped_once, tmp_path / "train" / "run")


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def largest(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def cut(path):
    path.write_bytes(path.read_bytes()[:10])


@pytest.mark.parametrize("damage", [flip, cut, lambda path: path.unlink()], ids=["flipped", "cut short", "missing"])
def test_the_checkpoint_before_is_used(stopped, small_run, assert_as_undisturbed, capsys, damage):
    """Told on the terminal and in run.log; the end is the same to the last bit."""
    file = largest(stopped / "checkpoints" / "5")
    damage(file)
    small_run(stopped, EVERY_STEP)
    assert_as_undisturbed(stopped)
    shown, log = capsys.readouterr().err, (stopped / "run.log").read_text()
    for text in (shown, log):
        assert (
            f"warning: checkpoint '{stopped}/checkpoints/5' is damaged: '{file.relative_to(stopped / 'checkpoints' / '5')}'"
            in text
        )
        assert "warning: going on from the checkpoint of step 4 instead" in text


def test_nothing_to_fall_back_to(stopped, small_run, assert_as_undisturbed):
    """Refused, with the way out; following it gives the same end."""
    for step in ("3", "4", "5"):
        flip(largest(stopped / "checkpoints" / step))
    message = f"all 3 checkpoints are damaged.*remove '{stopped}/checkpoints' so that the same command trains"
    with pytest.raises(RunFolderError, match=message):
        small_run(stopped, EVERY_STEP)
    assert Checkpoints(stopped / "checkpoints").steps() == [3, 4, 5]
    assert json.loads((stopped / "result.json").read_text())["error"]["class"] == "DamagedCheckpoint"
    for path in sorted((stopped / "checkpoints").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    small_run(stopped, EVERY_STEP)
    assert_as_undisturbed(stopped)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["sharing.units=[5]"], r"params/sharing/.*kernel is float32\[\d+,4\] there and float32\[\d+,5\] here"),
        (["data.tasks=[y1]"], "params/task/y2/.* is there and not here"),
        (["optimizer=sgd"], "opt/.* is there and not here"),
        (["data.dim=5"], r"float32\[4,4\] there and float32\[5,4\] here"),
    ],
    ids=["another model", "another task", "another optimizer", "another schema"],
)
def test_checkpoints_of_another_run(stopped, small_run, overrides, words):
    """A run folder admits one run; and where its checkpoints are another's, nothing of them is touched."""
    with pytest.raises(RunFolderError, match="holds run .*; expected .* or an empty folder") as refused:
        small_run(stopped, EVERY_STEP, *overrides)
    other = stopped.parent / "other"
    other.mkdir()
    (other / "run.json").write_text(json.dumps({"run_id": str(refused.value).split("'")[5]}))
    shutil.copytree(stopped / "checkpoints", other / "checkpoints")
    before = {path: path.read_bytes() for path in (other / "checkpoints").rglob("*") if path.is_file()}
    with pytest.raises(
        RunFolderError, match=f"'{other}/checkpoints/5' is of another model, schema or optimizer: .*{words}"
    ):
        small_run(other, EVERY_STEP, *overrides)
    assert {path: path.read_bytes() for path in before} == before
