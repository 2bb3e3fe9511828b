"""Options and markers of the whole suite."""

import os
import shutil
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.data import fetch, sources

LARGE = ("inst_eval",)
"""Data that the slow suite fetches, and the fast one does not ask for."""
XLA = ("--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1")
"""Half of what building a small program costs is saved by these, in releases that know them."""
JAX = {
    "jax_disable_most_optimizations": True,
    "jax_persistent_cache_min_compile_time_secs": 0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
    "jax_persistent_cache_enable_xla_caches": "none",
}


def pytest_addoption(parser):
    parser.addoption("--download-data", action="store_true", help="fetch the data that tests need, once")


def pytest_configure(config):
    """Fetches once, before tests are handed to several processes.

    Programs run once or twice here: what counts is that they are quick to build, and that processes, those that tests
    start, too, build each of them once: they share a folder of compiled programs, which ends with the session.
    """
    if "XLA_FLAGS" not in os.environ:
        os.environ["XLA_FLAGS"] = " ".join(filter(_is_known, XLA))
    options = dict(JAX)
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        options["jax_compilation_cache_dir"] = folder = tempfile.mkdtemp(prefix="mtl_jax_programs_")
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    for name, value in options.items():
        if name.upper() not in os.environ:  # else JAX has read it
            os.environ[name.upper()] = str(value)
            jax.config.update(name, value)
    if config.getoption("--download-data") and not hasattr(config, "workerinput"):
        for name in sources.datasets():
            if name not in LARGE or config.option.markexpr != "not slow":
                fetch.fetch(sources.source_of(name))


def _is_known(flag: str) -> bool:
    """Asked in a process of its own, which XLA ends over a flag that it does not know."""
    program = [sys.executable, "-c", "import jax; jax.devices('cpu')"]
    return subprocess.run(program, env=os.environ | {"XLA_FLAGS": flag}, capture_output=True).returncode == 0


def pytest_collection_modifyitems(items):
    """Tests marked ``data`` need the real tables, or those of the sets that the marker names.

    Without them they are skipped, with the command that fetches them.
    """
    usual = tuple(name for name in sources.datasets() if name not in LARGE)
    unfetched: dict[str, bool] = {}
    for item in items:
        if marker := item.get_closest_marker("data"):
            for name in (needed := marker.args or usual):
                unfetched.setdefault(name, not _present(name))
            if absent := [name for name in needed if unfetched[name]]:
                command = f"python -m mtl_jax.data fetch {' '.join(absent)}"
                item.add_marker(pytest.mark.skip(reason=f"data not fetched; run: {command}"))


def _present(dataset: str) -> bool:
    cache = fetch.open_cache(sources.source_of(dataset))
    return not cache.missing(cache.choose(None))


def _values_and_gradient(loss):
    @jax.jit
    def both(outputs, labels):
        values, pull = jax.vjp(lambda a: loss(a, labels), outputs)
        return values, pull(jnp.ones_like(values))[0]

    return both


@pytest.fixture
def assert_loss_matches():
    """(loss, reference, outputs, labels): values and gradients of an element-wise loss in float64 are the reference's."""

    def compare(loss, reference, outputs, labels):
        with jax.enable_x64(True):
            values, gradient = jax.device_get(_values_and_gradient(loss)(outputs, labels))
        assert values.dtype == np.float64
        np.testing.assert_allclose(values, [reference(a, y) for a, y in zip(outputs, labels, strict=True)], rtol=1e-10)

        differences = np.zeros_like(outputs)
        for index in np.ndindex(outputs.shape):
            step = np.zeros_like(outputs)
            step[index] = 1e-5
            up, down = (reference((outputs + s)[index[0]], labels[index[0]]) for s in (step, -step))
            differences[index] = (up - down) / 2e-5
        np.testing.assert_allclose(gradient, differences, rtol=1e-6, atol=1e-8)

    return compare
