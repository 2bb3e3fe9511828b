"""Checkpoints: what was written comes back to the last bit, damage falls back, other states are refused."""

import logging
import shutil
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.balancing import uncertainty
from mtl_jax.errors import DamagedCheckpoint, RunFolderError
from mtl_jax.train import Step
from mtl_jax.train.checkpoint import KEEP, Checkpoints
from mtl_jax.train.storage import write_arrays

PROGRESS = {"epoch": 2, "best": None, "history": [{"step": 3, "task": None, "value": 0.1}], "sums": {"n": [1.5, 0.1]}}


@pytest.fixture
def state(small_schema, make_model):
    """A whole train state: typed key, moments, table rows, balancer."""
    return Step.of(
        make_model(small_schema),
        small_schema.tasks,
        key=jax.random.key(5),
        balancer=uncertainty(),
        table_updates={"user": "sparse"},
    )[1]


WAYS = {
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "a bit flipped": lambda path: path.write_bytes(flipped(path.read_bytes())),
    "missing": lambda path: path.unlink(),
}


def flipped(content, *, at=None):
    """One bit in the middle, or in the byte of the given number, turned round."""
    at = len(content) // 2 if at is None else at
    return content[:at] + bytes([content[at] ^ 16]) + content[at + 1 :]


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def arrays(value):
    return {"a": jnp.full(2, value, jnp.int32), "b": {"c": jnp.full((2, 3), value / 3)}}


def write(path, *steps, best=None):
    checkpoints = Checkpoints(path)
    for step in steps:
        checkpoints.save(step, arrays(step), {"step": step}, best=best)
    return checkpoints


def holds(checkpoints, step):
    """Whether the newest checkpoint is the one of ``step``, every value of it."""
    loaded, progress = checkpoints.latest(arrays(0))
    jax.tree.map(np.testing.assert_array_equal, loaded, arrays(progress["step"]))
    return progress == {"step": step}


def test_round_trip(tmp_path, state):
    state = state._replace(step=jnp.int32(3), live=jnp.array(False))
    Checkpoints(tmp_path / "c").save(3, state, PROGRESS, best=None)
    other = jax.tree.map(lambda leaf: leaf, state)._replace(key=jax.random.key(9), step=jnp.int32(0))
    loaded, progress = Checkpoints(tmp_path / "c").latest(other)
    assert progress == PROGRESS
    assert jax.random.key_data(loaded.key).tolist() == jax.random.key_data(state.key).tolist()
    plain = [tree._replace(key=jnp.zeros(())) for tree in (loaded, state)]
    jax.tree.map(np.testing.assert_array_equal, *plain)
    assert jax.tree.map(lambda leaf: leaf.dtype, plain[0]) == jax.tree.map(lambda leaf: leaf.dtype, plain[1])


def test_arrays_without_an_entry_come_back_too(tmp_path):
    """Such as the numeric features of rows that have none."""
    state = {"dense": jnp.zeros((4, 0)), "ids": jnp.arange(4)}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state, PROGRESS, best=None)
    found, _ = checkpoints.latest(jax.tree.map(jnp.zeros_like, state))
    assert found["dense"].shape == (4, 0) and found["dense"].dtype == state["dense"].dtype
    np.testing.assert_array_equal(found["ids"], state["ids"])
    with pytest.raises(RunFolderError, match=r"dense is float32\[4,0\] there and float32\[3,0\] here"):
        checkpoints.latest(state | {"dense": jnp.zeros((3, 0))})


def test_without_any(tmp_path, state):
    assert Checkpoints(tmp_path / "new" / "folder").latest(state) is None


def test_keeps_the_newest_and_the_best(tmp_path):
    checkpoints = write(tmp_path, 2, 4, 10, 20, 30, best=4)
    assert checkpoints.steps() == [4, 20, 30]
    assert len(checkpoints.steps()) == KEEP + 1


def test_an_older_one_keeps_its_best_too(tmp_path):
    """Where the newest is the best so far and gets damaged, the one before is of use only with its own best."""
    checkpoints = write(tmp_path, 4, 8, best=4)
    checkpoints.save(12, arrays(12), {"step": 12}, best=12)
    assert checkpoints.steps() == [4, 8, 12]
    WAYS["missing"](files(tmp_path / "12")[0])
    assert holds(checkpoints, 8)
    checkpoints.save(12, arrays(12), {"step": 12}, best=12)
    checkpoints.save(16, arrays(16), {"step": 16}, best=12)
    assert checkpoints.steps() == [12, 16]


@pytest.mark.parametrize("way", WAYS)
def test_damage_to_any_file_is_noticed_and_the_one_before_is_used(tmp_path, caplog, way):
    write(tmp_path / "whole", 1, 2)
    names = [path.relative_to(tmp_path / "whole") for path in files(tmp_path / "whole" / "2")]
    assert len(names) >= 8
    for number, name in enumerate(names):
        if way != "missing" and not (tmp_path / "whole" / name).stat().st_size:
            continue  # an empty mark
        shutil.copytree(tmp_path / "whole", tmp_path / str(number))
        WAYS[way](tmp_path / str(number) / name)
        checkpoints = Checkpoints(tmp_path / str(number))
        caplog.clear()
        with caplog.at_level(logging.WARNING, "mtl_jax"):
            assert holds(checkpoints, 1), name
        damage, resumption = [record.getMessage() for record in caplog.records]
        assert f"checkpoint '{tmp_path}/{number}/2' is damaged" in damage and name.name in damage
        assert resumption == "going on from the checkpoint of step 1 instead"
        assert checkpoints.steps() == [1, 2], "nothing is removed"
        checkpoints.save(2, arrays(2), {"step": 2}, best=None)  # the rerun writes over it
        assert holds(checkpoints, 2)


def test_every_bit_of_position_and_manifest_counts(tmp_path):
    checkpoints = write(tmp_path, 1, 2)
    for name in ("progress.json", "manifest.json"):
        path = tmp_path / "2" / name
        content = path.read_bytes()
        for at in range(0, len(content), 1 if name == "progress.json" else 97):
            path.write_bytes(flipped(content, at=at))
            with pytest.raises(DamagedCheckpoint, match="is damaged"):
                checkpoints.progress(2)
        path.write_bytes(content)
    assert checkpoints.progress(2) == {"step": 2}


def test_all_damaged(tmp_path):
    checkpoints = write(tmp_path, 1, 2)
    for step in ("1", "2"):
        WAYS["cut short"](tmp_path / step / "progress.json")
    message = (
        f"all 2 checkpoints are damaged.*'{tmp_path}/2' is damaged: 'progress.json' has 10 bytes instead of 11; .*"
        f"expected one that is whole. Restore one from a copy, or remove '{tmp_path}'"
    )
    with pytest.raises(RunFolderError, match=message):
        checkpoints.latest(arrays(0))
    assert checkpoints.steps() == [1, 2], "nothing is removed"


def test_a_damaged_best_is_told_before_the_rest_is_trained(tmp_path):
    """The newest two are whole, and of no use: at the end of the run the selected parameters would be missing."""
    checkpoints = write(tmp_path, 4, 8, 12, best=4)
    assert holds(checkpoints, 12)
    WAYS["a bit flipped"](max(files(tmp_path / "4"), key=lambda path: path.stat().st_size))
    with pytest.raises(RunFolderError, match=f"'{tmp_path}/4' is damaged: .*remove '{tmp_path}'"):
        checkpoints.latest(arrays(0))
    with pytest.raises(DamagedCheckpoint, match=f"'{tmp_path}/4' is damaged: .*remove '{tmp_path}' so that the same"):
        checkpoints.load(4, arrays(0))


def test_an_unfinished_write_is_not_a_checkpoint(tmp_path):
    checkpoints = write(tmp_path, 1)
    shutil.copytree(tmp_path / "1", tmp_path / ".2.partial")
    assert checkpoints.steps() == [1]
    assert holds(checkpoints, 1)
    checkpoints.save(3, arrays(3), {"step": 3}, best=None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "3"]


def test_a_kill_at_any_moment_of_a_write_leaves_the_old_or_the_new(tmp_path):
    """The folder as it is before every change to the file system, which is what a process killed there would leave."""
    checkpoints = write(tmp_path / "run", 1, 2)
    moments = tmp_path / "moments"
    changes = {"open", "os.rename", "os.mkdir", "os.rmdir", "os.remove"}
    copying = True

    def before(event, details):
        nonlocal copying
        inside = event in changes and str(tmp_path / "run") in str(details[0])
        if copying or not inside or threading.current_thread() is not threading.main_thread():
            return
        copying = True
        with_suffix = moments / str(len(list(moments.iterdir())))
        try:
            shutil.copytree(tmp_path / "run", with_suffix)
        except shutil.Error:
            pass  # a file of the storage's own threads came and went
        copying = False

    moments.mkdir()
    sys.addaudithook(before)  # cannot be taken out again
    copying = False
    for step in (3, 3):  # a new one, and one over itself
        checkpoints.save(step, arrays(step), {"step": step}, best=None)
    copying = True
    found = []
    for moment in sorted(moments.iterdir(), key=lambda path: int(path.name)):
        left = Checkpoints(moment)
        found.append(next(step for step in (3, 2, 1) if step in left.steps()))
        assert holds(left, found[-1]), moment
        left.save(4, arrays(4), {"step": 4}, best=None)
        assert not list(moment.glob(".*")), "a later save tidies up"
    assert set(found) == {2, 3} and len(found) > 20


def test_a_template_may_depend_on_the_position(tmp_path):
    checkpoints = write(tmp_path, 1, 2)
    seen = []

    def like(progress):
        seen.append(progress)
        return arrays(0)

    loaded, progress = checkpoints.latest(like)
    assert seen == [progress] == [{"step": 2}] and loaded["a"].tolist() == [2, 2]
    assert checkpoints.progress(1) == {"step": 1}


def test_containers_without_arrays_do_not_count(tmp_path):
    checkpoints = write(tmp_path, 1)
    loaded, _ = checkpoints.latest(arrays(0) | {"selected": {}})
    assert loaded["selected"] == {} and loaded["a"].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("like", "words"),
    [
        pytest.param({"a": jnp.zeros(3, jnp.int32)}, r"a is int32\[2\] there and int32\[3\] here", id="shape"),
        pytest.param({"a": jnp.zeros(2)}, r"a is int32\[2\] there and float32\[2\] here", id="type"),
        pytest.param({"b": jnp.zeros(2)}, r"a int32\[2\] is there and not here, b float32\[2\] is here", id="name"),
        pytest.param({"a": jnp.zeros(2, jnp.int32), "b": [jnp.zeros(4)]}, r"b/0 float32\[4\] is here", id="more"),
        pytest.param({}, r"a int32\[2\] is there and not here", id="fewer"),
        pytest.param(
            {f"p{i}": jnp.zeros(1) for i in range(9)},
            "a .* there and not here, p0 .* p2 .* here and not there, and 6 more;",
            id="many",
        ),
    ],
)
def test_another_state_is_refused(tmp_path, like, words, recwarn):
    """By name and shape, before the storage is asked, and without falling back to an older one of the same run."""
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, {"a": jnp.ones(2, jnp.int32)}, {}, best=None)
    before = {path: path.read_bytes() for path in files(tmp_path)}
    with pytest.raises(
        RunFolderError,
        match=f"'{tmp_path}/2' is of another model, schema or optimizer: {words}.*start in a new run folder",
    ) as caught:
        checkpoints.latest(like)
    assert not isinstance(caught.value, DamagedCheckpoint)
    assert {path: path.read_bytes() for path in files(tmp_path)} == before
    assert not recwarn.list


def test_another_identity_is_refused(tmp_path):
    """Two numeric columns that changed places leave all shapes alike."""
    here = Checkpoints(tmp_path, identity={"schema": "aa", "seed": "0"})
    here.save(1, arrays(1), {"step": 1}, best=None)
    assert holds(here, 1)
    other = Checkpoints(tmp_path, identity={"schema": "bb", "seed": "0"})
    with pytest.raises(RunFolderError, match="its schema is 'aa' there and 'bb' here; expected"):
        other.latest(arrays(0))


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(
        RunFolderError, match="cannot write checkpoint .*taken' .*File exists.*; expected a writable folder"
    ):
        Checkpoints(tmp_path / "taken")


def test_a_save_that_cannot_make_its_folder_fails_at_once(tmp_path):
    """The storage's threads used to wait twenty minutes for the folder, and the interpreter for them."""
    (tmp_path / "taken").write_text("")
    before = set(threading.enumerate())
    with pytest.raises(OSError):
        write_arrays(tmp_path / "taken" / "state", {"a": jnp.ones(2)})
    assert set(threading.enumerate()) <= before
