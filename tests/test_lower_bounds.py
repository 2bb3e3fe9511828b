"""The constraints of make test-lowest: every declared requirement, at its bound."""

import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / ".ci" / "lower_bounds.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("lower_bounds", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_requirement_of_the_project_is_pinned_to_its_bound():
    printed = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, check=True).stdout.split()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    names = {re.match(r"[\w.-]+", requirement)[0] for requirement in declared}
    assert {line.split("==")[0] for line in printed} == names
    for line in printed:
        name, bound = line.split("==")
        assert any(r.startswith(name) and f">={bound}" in r for r in declared), line


def test_extras_and_upper_bounds_are_left_out(script):
    project = {"dependencies": ["a[x]>=1.2", "b >= 3, <4"], "optional-dependencies": {"more": ["a>=1.2", "c>=0.1"]}}
    assert script.lower_bounds(project) == {"a": "1.2", "b": "3", "c": "0.1"}


@pytest.mark.parametrize(
    ("dependencies", "message"),
    [(["a"], "'a' has no lower bound"), (["a==1"], "'a==1' has no lower bound"), (["a>=1", "a>=2"], "bounds 1 and 2")],
)
def test_what_has_no_single_bound_is_refused(script, dependencies, message):
    with pytest.raises(SystemExit, match=message):
        script.lower_bounds({"dependencies": dependencies, "optional-dependencies": {}})
