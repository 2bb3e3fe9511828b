"""Arms side by side: every launcher, with its local executor, gives the runs that one process gives."""

import importlib.util
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from experiments import extras
from mtl_jax.report.folder import RunFolder

ARMS = (
    "data=synthetic", "data.num_rows=300", "data.dim=4", "trainer.batch_size=50", "trainer.epochs=1",
    "sharing=shared_bottom", "sharing.units=[4]", "towers.units=[3]", "balancing=equal,uncertainty",
    "seeds=2", "baseline=none", "report=false",
    "vectorize.axis=map",  # a measurement would choose, and the two differ in the last digits
)  # fmt: skip
LAUNCHERS = {
    "joblib": ("joblib", "hydra_joblib_launcher", ["hydra.launcher.n_jobs=2"]),
    "submitit_local": ("slurm", "hydra_submitit_launcher", ["hydra.launcher.timeout_min=5"]),
    "ray": ("ray", "hydra_ray_launcher", ["+hydra.launcher.ray.init.num_cpus=2"]),
}


def present(plugin):
    return importlib.util.find_spec("hydra_plugins") and importlib.util.find_spec(f"hydra_plugins.{plugin}") is not None


def ablate(folder, *arguments):
    command = [sys.executable, "-m", "experiments.ablate", *ARMS, f"output_dir={folder}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def records(folder):
    """Run id -> what a launcher must not change of a record."""
    found = [json.loads(path.read_bytes()) for path in folder.glob("ablate/*/runs/*/result.json")]
    return {
        record["run_id"]: {key: record[key] for key in ("status", "metrics", "monitor", "baselines", "params", "seed")}
        for record in found
    }


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The records of the basic launcher."""
    folder = tmp_path_factory.mktemp("basic")
    done = ablate(folder)
    assert done.returncode == 0, done.stderr
    return records(folder)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_arms_side_by_side_are_the_runs_of_one_process(launcher, alone, tmp_path):
    extra, plugin, options = LAUNCHERS[launcher]
    if not present(plugin):
        pytest.skip(f"hydra/launcher={launcher} is not installed; run: pip install 'mtl_jax[{extra}]'")
    done = ablate(tmp_path, f"hydra/launcher={launcher}", *options)
    assert done.returncode == 0, done.stderr
    assert len(alone) == 4
    assert records(tmp_path) == alone


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["basic", "joblib", "submitit_local"])
def test_what_ends_one_job_ends_the_command_with_its_words(launcher, alone, tmp_path):
    """A run that another process holds; jobs beside it come to their end first."""
    if launcher != "basic" and not present(LAUNCHERS[launcher][1]):
        pytest.skip(f"hydra/launcher={launcher} is not installed; run: pip install 'mtl_jax[{LAUNCHERS[launcher][0]}]'")
    held = min(alone)
    with RunFolder.open(tmp_path / "runs" / held):
        done = ablate(tmp_path, f"hydra/launcher={launcher}", f"folder={tmp_path}")
    assert done.returncode == 1
    assert f"RunFolderError: run folder '{tmp_path / 'runs' / held}'" in done.stderr
    assert "Traceback" not in done.stderr
    finished = [json.loads(path.read_bytes())["status"] for path in tmp_path.glob("runs/*/result.json")]
    assert launcher == "basic" or finished.count("completed") >= 2


def test_a_launcher_that_is_not_installed_says_what_to_install(tmp_path):
    """Hydra finds plugins by import, so a process that cannot import them is a machine without them."""
    hide = f"""
import sys
sys.modules |= {{"hydra_plugins." + name: None for name in {[plugin for _, plugin, _ in LAUNCHERS.values()]}}}
from experiments.ablate import main
from experiments.cli import command_line
for launcher in {list(LAUNCHERS)}:
    sys.argv = ["ablate", f"hydra/launcher={{launcher}}"]
    try:
        command_line(main, "ablate")
    except SystemExit as end:
        print(launcher, end.code, end.__notes__)
"""
    done = subprocess.run([sys.executable, "-c", hide], capture_output=True, text=True, cwd=tmp_path)
    assert "Traceback" not in done.stderr
    for line, (launcher, (extra, _, _)) in zip(done.stdout.splitlines(), LAUNCHERS.items(), strict=True):
        assert line.startswith(f"{launcher} 2")
        assert f"pip install 'mtl_jax[{extra}]'" in line


def test_the_hints_name_extras_that_the_package_has():
    project = tomllib.loads((Path(extras.__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert set(extras.LAUNCHERS) == set(LAUNCHERS) | {"submitit_slurm"}
    assert {"search", *extras.LAUNCHERS.values()} <= set(project["optional-dependencies"])
