"""A full disk: one clear message, nothing lost, nothing half-written, and the same command goes on once there is room."""

import logging
import os
import subprocess
import sys
import textwrap

import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.errors import NoSpace, RunFolderError, RunFolderFull
from mtl_jax.train.checkpoint import Checkpoints
from mtl_jax.train.storage import unwritable, write_arrays

MB = 2**20


def arrays(value, size=100_000):
    noise = np.random.default_rng(0).normal(size=size)  # does not compress
    return {"a": jnp.asarray(noise + value, jnp.float32)}


def fill(disk, *, leave=0):
    """Fills the disk but for so many bytes, and returns what must be removed to free it."""
    state = os.statvfs(disk)
    filler = disk / "filler"
    filler.write_bytes(bytes(max(state.f_bavail * state.f_frsize - leave, 0)))
    return filler


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_that_does_not_fit(small_disk, capfd):
    disk = small_disk(3 * MB)
    checkpoints = Checkpoints(disk / "checkpoints")
    checkpoints.save(1, arrays(1), {"step": 1}, best=None)
    filler = fill(disk, leave=300_000)
    message = (
        r"no space to write a checkpoint to '.*' \(0.3 MB free\); expected at least 0.7 MB. The checkpoints that were "
        "there are as before: free space or choose another output folder, and run the same command again to resume"
    )
    with pytest.raises(RunFolderFull, match=message) as caught:
        checkpoints.save(2, arrays(2), {"step": 2}, best=None)
    assert isinstance(caught.value, RunFolderError) and isinstance(caught.value, NoSpace)
    assert names(checkpoints.path) == ["1"]
    np.testing.assert_array_equal(checkpoints.latest(arrays(0))[0]["a"], arrays(1)["a"])
    filler.unlink()
    checkpoints.save(2, arrays(2), {"step": 2}, best=None)
    assert checkpoints.latest(arrays(0))[1] == {"step": 2}
    assert capfd.readouterr() == ("", ""), "no tracebacks from the storage's threads"


def test_a_disk_without_room_for_files(small_disk):
    """Bytes are free, names are not."""
    disk = small_disk(3 * MB, files=80)
    checkpoints = Checkpoints(disk / "checkpoints")
    checkpoints.save(1, arrays(1), {"step": 1}, best=None)
    with pytest.raises(RunFolderFull, match=r"room for \d\d files\); expected at least 64"):
        checkpoints.save(2, arrays(2), {"step": 2}, best=None)
    assert names(checkpoints.path) == ["1"]
    assert checkpoints.latest(arrays(0))[1] == {"step": 1}


@pytest.mark.parametrize("leave", [0, 20_000, 200_000])
def test_what_the_storage_says_of_a_full_disk_is_understood(small_disk, leave):
    """Where the room vanishes between the question and the write; and no thread outlives the failure."""
    disk = small_disk(MB)
    fill(disk, leave=leave)
    with pytest.raises(Exception) as caught:
        write_arrays(disk / "state", arrays(1))
    error = unwritable(disk / "state", caught.value)
    assert isinstance(error, RunFolderFull) and "(No space left on device); expected room" in str(error)
    assert logging.getLogger("absl").level < logging.CRITICAL, "the storage's log is heard again"


def test_a_limit_to_the_size_of_files(tmp_path):
    """Where nothing can be mounted: the system refuses files above 100 kB, and the process ends by itself at once."""
    pytest.importorskip("resource")
    code = """
        import resource, sys
        import jax.numpy as jnp, numpy as np
        from mtl_jax.errors import RunFolderFull
        from mtl_jax.train.checkpoint import Checkpoints

        arrays = lambda step: {"a": jnp.asarray(np.random.default_rng(step).normal(size=100_000), jnp.float32)}
        checkpoints = Checkpoints(sys.argv[1])
        checkpoints.save(1, arrays(1), {"step": 1}, best=None)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        try:
            checkpoints.save(2, arrays(2), {"step": 2}, best=None)
        except RunFolderFull as error:
            print(error)
        print([path.name for path in checkpoints.path.iterdir()], checkpoints.latest(arrays(0))[1])
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        checkpoints.save(2, arrays(2), {"step": 2}, best=None)
        print(checkpoints.latest(arrays(0))[1])
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    message, before, after = done.stdout.splitlines()
    assert "no space to write a checkpoint" in message and "(File too large)" in message
    assert (before, after) == ("['1'] {'step': 1}", "{'step': 2}")


# Questions that a run of nine steps asks: one after each, and one after training. What is written next meets a full disk.
@pytest.mark.parametrize(
    ("after", "next_file"),
    [(4, "a checkpoint"), (6, "log.jsonl|history.parquet"), (10, "history.parquet")],
    ids=["in an epoch", "at the end of an epoch", "at the end of the run"],
)
def test_a_run_goes_on_when_there_is_room_again(small_disk, small_run, assert_as_undisturbed, after, next_file):
    disk = small_disk(4 * MB)
    folder, asked, filler = disk / "train" / "run", 0, None

    def watch():
        nonlocal asked, filler
        asked += 1
        if asked == after:
            filler = fill(disk)
        return False

    overrides = ["trainer.checkpoint_seconds=0"]
    with pytest.raises(RunFolderFull, match=f"no space to write.*({next_file}).*run the same command again to resume"):
        small_run(folder, *overrides, should_stop=watch)
    assert asked == after
    assert not [path for path in folder.rglob("*") if path.name.endswith(".partial")]
    kept = Checkpoints(folder / "checkpoints").steps()
    assert kept[-1] >= min(after, 9) - 1
    filler.unlink()
    small_run(folder, *overrides)
    assert_as_undisturbed(folder)


def test_a_full_disk_still_leaves_a_record_where_one_fits(small_disk, small_run):
    disk = small_disk(4 * MB)
    folder, asked = disk / "train" / "run", 0

    def watch():
        nonlocal asked
        asked += 1
        if asked == 2:
            fill(disk, leave=100_000)
        return False

    with pytest.raises(RunFolderFull, match="0.1 MB free"):
        small_run(folder, "trainer.checkpoint_seconds=0", should_stop=watch)
    text = (folder / "result.json").read_text()
    assert '"status": "failed"' in text and '"class": "RunFolderFull"' in text and "0.1 MB free" in text
    assert (folder / "run.log").read_text().endswith("end failed\n")
