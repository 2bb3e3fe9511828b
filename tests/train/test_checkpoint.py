"""Checkpoints: what was written comes back to the last bit, damage falls back, other states are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.balancing import uncertainty
from mtl_jax.errors import RunFolderError
from mtl_jax.train import Step
from mtl_jax.train.checkpoint import KEEP, Checkpoints

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


def damage(folder):
    """Cuts every file in the folder to half."""
    for path in folder.rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


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


def test_without_any(tmp_path, state):
    assert Checkpoints(tmp_path / "new" / "folder").latest(state) is None


def test_keeps_the_newest_and_the_best(tmp_path):
    checkpoints, state = Checkpoints(tmp_path), {"a": jnp.arange(2)}
    for step in (2, 4, 10, 20, 30):
        checkpoints.save(step, state, {}, best=4)
    assert checkpoints.steps() == [4, 20, 30]
    assert len(checkpoints.steps()) == KEEP + 1


def test_damaged_newest_falls_back(tmp_path):
    checkpoints, like = Checkpoints(tmp_path), {"a": jnp.zeros(2, jnp.int32)}
    for step in (1, 2):
        checkpoints.save(step, {"a": jnp.full(2, step, jnp.int32)}, {"step": step}, best=None)
    damage(tmp_path / "2")
    loaded, progress = checkpoints.latest(like)
    assert (loaded["a"].tolist(), progress) == ([1, 1], {"step": 1})
    checkpoints.save(2, {"a": jnp.full(2, 7, jnp.int32)}, {"step": 2}, best=None)  # the rerun writes over it
    assert checkpoints.latest(like)[0]["a"].tolist() == [7, 7]


def test_an_unfinished_write_is_not_a_checkpoint(tmp_path):
    checkpoints, like = Checkpoints(tmp_path), {"a": jnp.zeros(2, jnp.int32)}
    checkpoints.save(1, like, {"step": 1}, best=None)
    (tmp_path / "2.orbax-checkpoint-tmp").mkdir()
    assert checkpoints.steps() == [1]
    assert checkpoints.latest(like)[1] == {"step": 1}


@pytest.mark.parametrize(
    "like",
    [
        pytest.param({"a": jnp.zeros(3, jnp.int32)}, id="another shape"),
        pytest.param({"b": jnp.zeros(2, jnp.int32)}, id="another name"),
        pytest.param({"a": jnp.zeros(2, jnp.int32), "b": jnp.zeros(2)}, id="more arrays"),
        pytest.param({}, id="fewer arrays"),
    ],
)
def test_another_state_is_refused(tmp_path, like):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"a": jnp.ones(2, jnp.int32)}, {}, best=None)
    with pytest.raises(RunFolderError, match=f"'{tmp_path}/1' cannot be read.*start in a new run folder"):
        checkpoints.latest(like)


def test_all_damaged(tmp_path):
    checkpoints, state = Checkpoints(tmp_path), {"a": jnp.ones(2)}
    checkpoints.save(1, state, {}, best=None)
    damage(tmp_path / "1")
    with pytest.raises(RunFolderError, match="undamaged"):
        checkpoints.latest(state)
