"""A full disk in the middle of an ablation: one message, no run that counts as failed, and the same call goes on."""

import os

import hydra
import pytest

from mtl_jax.ablate import run_arm
from mtl_jax.config import plain
from mtl_jax.errors import RunFolderFull
from mtl_jax.job import Shared
from mtl_jax.report.folder import RunFolder

MB = 2**20
SMALL = (
    "data=synthetic", "data.num_rows=300", "data.dim=4", "sharing=shared_bottom", "sharing.units=[4]", "towers.units=[3]",
    "trainer.batch_size=50", "trainer.epochs=2", "trainer.patience=0", "trainer.steps_per_call=1",
    "trainer.checkpoint_seconds=0", "seeds=2",
)  # fmt: skip


@pytest.mark.parametrize("axis", ["map", pytest.param("vmap", marks=pytest.mark.slow)])
def test_an_arm_goes_on_when_there_is_room_again(small_disk, tmp_path, axis):
    with hydra.initialize_config_module("conf", version_base="1.3"):
        arm = plain(hydra.compose("ablate", overrides=[*SMALL, f"vectorize.axis={axis}"]))
    shared, disk, asked = Shared(programs={}), small_disk(8 * MB), 0
    filler = disk / "filler"

    def watch():
        nonlocal asked
        asked += 1
        if asked == 7:
            state = os.statvfs(disk)
            filler.write_bytes(bytes(state.f_bavail * state.f_frsize))
        return False

    with pytest.raises(RunFolderFull, match="no space to write.*run the same command again to resume"):
        run_arm(arm, disk / "ablation", shared=shared, should_stop=watch)
    assert asked == 7
    filler.unlink()
    records = run_arm(arm, disk / "ablation", shared=shared)
    undisturbed = run_arm(arm, tmp_path / "undisturbed", shared=shared)
    assert [record["status"] for record in records.values()] == 2 * ["completed"]
    for name, record in undisturbed.items():
        assert records[name]["metrics"] == record["metrics"] and records[name]["monitor"] == record["monitor"]
        curves = [
            RunFolder(folder / "runs" / name).read_history() for folder in (disk / "ablation", tmp_path / "undisturbed")
        ]
        assert curves[0].equals(curves[1])
    assert sorted(path.name for path in (disk / "ablation").iterdir()) == ["runs"]
    assert not [path for path in disk.rglob("*") if path.name.endswith(".partial")]
