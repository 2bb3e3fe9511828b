"""One, two and eight devices, under jit and pmap: the same step."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from mtl_jax.errors import ConfigError
from mtl_jax.train.parallel import Devices

PROGRAM = pathlib.Path(__file__).with_name("devices_program.py")
FLAGS = "--xla_force_host_platform_device_count=8"


@pytest.fixture(scope="module", params=["some", pytest.param("all", marks=pytest.mark.slow)])
def folder(request, tmp_path_factory):
    """What the program left, for some balancers or for every one that has a config."""
    path = tmp_path_factory.mktemp("devices")
    run = subprocess.run(
        [sys.executable, PROGRAM, path / "outcomes.npz", request.param],
        env=os.environ | {"XLA_FLAGS": f"{FLAGS} {os.environ.get('XLA_FLAGS', '')}"}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return path


@pytest.fixture(scope="module")
def outcomes(folder):
    """Case -> (strategy, devices) -> array by name, of runs with labels spread unevenly over the devices."""
    cases = {}
    with np.load(folder / "outcomes.npz") as arrays:
        for key in arrays.files:
            case, strategy, count, name = key.split("|")
            cases.setdefault(case, {}).setdefault((strategy, int(count)), {})[name] = arrays[key]
    return cases


def test_parameters_do_not_depend_on_devices(outcomes, request):
    """To 1e-5, for balancers of every kind, every scope, dense and sparse tables, micro-batches and averages."""
    balancers = {path.stem for path in (PROGRAM.parents[2] / "conf" / "balancing").glob("*.yaml")}
    every = "all" in request.node.callspec.id
    assert outcomes.keys() >= balancers if every else len(outcomes.keys() & balancers) >= 6
    for case, by_place in outcomes.items():
        wanted = {("jit", 1), ("jit", 8), ("pmap", 8)}
        wanted |= {("jit", 2), ("pmap", 2)} if every and case in balancers else set()
        assert by_place.keys() == wanted, case
        alone = by_place["jit", 1]
        for place, arrays in by_place.items():
            assert arrays.keys() == alone.keys()
            for name, array in arrays.items():
                np.testing.assert_allclose(array, alone[name], rtol=1e-5, atol=1e-5, err_msg=f"{case} {place} {name}")


def test_balancers_differ(outcomes):
    """The agreement above is of different numbers: no two of these leave the same experts behind."""
    names = ("equal", "famo", "nash_mtl", "scope all", "weighted heads", "micro-batches")
    kernels = [outcomes[name]["jit", 1]["sharing/experts/layers/0/kernel"] for name in names]
    distances = [np.abs(one - other).max() for i, one in enumerate(kernels) for other in kernels[:i]]
    assert min(distances) > 1e-3


def test_a_run_moves_between_devices(folder):
    """Begun on eight devices, resumed on one and ended on two: the parameters of a run on one, staged and averaged."""
    with np.load(folder / "moved.npz") as arrays:
        paths = {key.split("|")[1] for key in arrays.files}
        assert len(paths) > 10
        for path in paths:
            np.testing.assert_allclose(arrays[f"moved|{path}"], arrays[f"alone|{path}"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [0, -1, 2.0, "all", 64])
def test_impossible_numbers_of_devices_are_refused(count):
    with pytest.raises(ConfigError, match=f"parallel.devices is {count}; expected a number from 1 to"):
        Devices("jit", count)
