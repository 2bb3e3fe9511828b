"""The direction of imports between rooms, and what importing costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mtl_jax

ROOT = Path(mtl_jax.__file__).parent
# What each room may import of mtl_jax. What is not named here may import everything.
ALLOWED = {
    "errors": (),
    "arguments": ("errors",),
    "tasks": ("errors", "arguments"),
    "data": ("errors", "arguments", "tasks"),
    "nn": ("errors", "arguments"),
    "losses": ("errors", "tasks"),
    "metrics": ("errors", "tasks"),
    "balancing": ("errors",),
    "sharing": ("errors", "arguments", "nn"),
    "model": ("errors", "arguments", "tasks", "data", "nn", "sharing"),
    "train": ("errors", "arguments", "tasks", "data", "nn", "losses", "metrics", "balancing", "sharing", "model"),
    "transfer": (
        "errors",
        "arguments",
        "tasks",
        "data",
        "nn",
        "losses",
        "metrics",
        "balancing",
        "sharing",
        "model",
        "train",
    ),
    "analysis": ("errors", "arguments", "balancing"),
    "report": ("errors", "tasks", "metrics"),
    "config": ("errors", "arguments"),
}
JAX = {"jax", "flax", "optax", "orbax"}


def modules(room):
    return sorted((ROOT / room).rglob("*.py")) or [ROOT / f"{room}.py"]


def imports(path):
    """Absolute names that a file imports anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            if node.module == "mtl_jax":
                yield from (f"mtl_jax.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("room", ALLOWED)
def test_a_room_imports_only_what_lies_below(room):
    for path in modules(room):
        for name in imports(path):
            parts = name.split(".")
            if parts[0] == "mtl_jax" and len(parts) > 1 and parts[1] != room:
                assert parts[1] in ALLOWED[room], f"{path.relative_to(ROOT)} imports {name}"
            assert parts[0] != "experiments", f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("room", ["errors", "arguments", "tasks", "data", "metrics", "report", "config"])
def test_rooms_without_jax(room):
    for path in modules(room):
        if path.name != "batching.py":
            assert not {name.split(".")[0] for name in imports(path)} & JAX, path


def test_the_list_is_complete():
    rooms = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    above = {
        "run",
        "run_config",
        "job",
        "arms",
        "plan",
        "ablate",
        "search",
        "stacks",
        "watch",
        "cross_validate",
        "summary",
        "source",
        "handover",
    }
    assert rooms - above - {"__init__", "__pycache__"} == set(ALLOWED)


def test_importing_initialises_no_backend():
    """In a fresh process: the package alone loads no JAX; all of its modules together start no device."""
    program = """
import os, pkgutil, importlib, sys
import mtl_jax
assert "jax" not in sys.modules and "polars" not in sys.modules
os.environ["JAX_PLATFORMS"] = "nowhere"  # the first use of a device would now raise
for module in pkgutil.walk_packages(mtl_jax.__path__, "mtl_jax."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
import jax
try:
    jax.devices()
except RuntimeError:
    print("untouched")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "untouched", done.stderr


def test_the_library_reads_no_environment_variable():
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("os.getenv", "os.environ.get"):
                raise AssertionError(f"{path}:{node.lineno} reads the environment")
