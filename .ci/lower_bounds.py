"""Prints the lower bound of every declared requirement as a pip constraint: python .ci/lower_bounds.py > FILE.

``name>=1.2`` becomes ``name==1.2``. A requirement without a lower bound ends the script: pip would take the newest.
"""

import itertools
import re
import sys
import tomllib
from pathlib import Path

REQUIREMENT = re.compile(r"(?P<name>[A-Za-z0-9._-]+)(\[[^\]]*\])?>=(?P<bound>[0-9][0-9.]*)(,.*)?")


def lower_bounds(project: dict) -> dict[str, str]:
    """Name -> least version, of the dependencies and all extras.

    Raises:
      SystemExit: A requirement states none, or two state different ones.
    """
    found: dict[str, str] = {}
    for requirement in itertools.chain(project["dependencies"], *project["optional-dependencies"].values()):
        match = REQUIREMENT.fullmatch(requirement.replace(" ", ""))
        if not match:
            sys.exit(f"'{requirement}' has no lower bound; expected name>=version. Add one in pyproject.toml")
        name, bound = match["name"], match["bound"]
        if found.setdefault(name, bound) != bound:
            sys.exit(f"'{name}' has the bounds {found[name]} and {bound}; expected one. Make them equal")
    return found


if __name__ == "__main__":
    pyproject = Path(__file__).resolve().parents[1] / "pyproject.toml"
    for name, bound in sorted(lower_bounds(tomllib.loads(pyproject.read_text())["project"]).items()):
        print(f"{name}=={bound}")
