"""A configured run of a second, and a disk of a few megabytes."""

import io
import shutil
import subprocess

import hydra
import pytest
from rich.console import Console

from mtl_jax.report.folder import RunFolder
from mtl_jax.run import run

OVERRIDES = (
    "data=synthetic", "data.num_rows=360", "data.dim=4", "sharing=shared_bottom", "sharing.units=[4]", "towers.units=[3]",
    "trainer.batch_size=100", "trainer.epochs=3", "trainer.patience=0", "trainer.steps_per_call=1",
    "trainer.progress=false",
)  # fmt: skip


@pytest.fixture(scope="module")
def small_run():
    """(folder, *overrides, should_stop) -> record. Three epochs of three steps; the same bits for all of a module."""

    def call(folder, *overrides, should_stop=lambda: False):
        with hydra.initialize_config_module("conf", version_base="1.3"):
            config = hydra.compose("train", overrides=[*OVERRIDES, f"output_dir={folder.parent}", *overrides])
        return run(config, folder=folder, console=Console(file=io.StringIO()), should_stop=should_stop)

    return call


@pytest.fixture(scope="module")
def undisturbed(small_run, tmp_path_factory):
    """The folder of such a run to which nothing happened."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    small_run(folder)
    return folder


@pytest.fixture
def assert_as_undisturbed(undisturbed):
    """Curves, selection and metrics of a finished run equal those of the undisturbed one; nothing half-written is left."""

    def check(folder):
        one, other = RunFolder(folder), RunFolder(undisturbed)
        assert one.read_history().equals(other.read_history())
        records = [place.read_json("result.json") for place in (one, other)]
        for name in ("status", "metrics", "support", "monitor", "baselines", "params"):
            assert records[0][name] == records[1][name], name
        assert not [path for path in folder.rglob("*") if path.name.endswith(".partial")]

    return check


@pytest.fixture
def small_disk(tmp_path):
    """(bytes, files) -> a file system of that size, mounted under tmp_path."""
    mounted = []

    def mount(size, files=10_000):
        place = tmp_path / f"disk{len(mounted)}"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size},nr_inodes={files}", "tmpfs", str(place)]
        if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a file system is not permitted here")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", str(place)], check=True)
