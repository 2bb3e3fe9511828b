"""Balancing is usable alone: what importing it loads, in a fresh process."""

import subprocess
import sys

PROBE = """
import sys
import mtl_jax.balancing
print("\\n".join(sorted(sys.modules)))
"""
OTHERS = {"flax", "polars", "pandas", "hydra", "omegaconf", "orbax", "sklearn", "scipy.stats", "rich", "matplotlib"}
OWN = ("mtl_jax.balancing", "mtl_jax.errors")


def test_importing_it_loads_jax_optax_numpy_and_starts_no_device():
    """The platform does not exist: the first array made at import would raise."""
    probe = subprocess.run(
        [sys.executable, "-c", PROBE],
        env={"PATH": "", "PYTHONPATH": ":".join(path or "." for path in sys.path), "JAX_PLATFORMS": "nowhere"},
        capture_output=True,
        text=True,
    )
    assert probe.returncode == 0, probe.stderr
    loaded = set(probe.stdout.split())
    assert {"jax", "optax", "numpy"} <= loaded
    assert not OTHERS & loaded
    own = {name for name in loaded if name.startswith("mtl_jax.")}
    assert {name for name in own if not name.startswith(OWN)} == set()
