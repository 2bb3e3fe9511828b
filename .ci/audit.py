"""Asks a public advisory service about every installed package and every declared lower bound: python .ci/audit.py.

Ends with 1 where a package has a known advisory, and with 2 where the service could not be asked about all of them, because
no answer is not a good answer.
"""

import json
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from lower_bounds import lower_bounds

SERVICES = ("pypi", "osv")
OURS = "mtl-jax"


def audit(arguments: list[str]) -> list[dict]:
    """What pip-audit says about each package, from the first service that answers for all of them.

    Raises:
      SystemExit: 2, no service does.
    """
    faults = []
    for service in SERVICES:
        command = [sys.executable, "-m", "pip_audit", "--format", "json", "--progress-spinner", "off", "-s", service]
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
        try:
            packages = json.loads(done.stdout)["dependencies"]
        except (ValueError, KeyError):
            faults.append(f"{service}: {(done.stderr.strip().splitlines() or ['no answer'])[-1][:200]}")
            continue
        unanswered = [p["name"] for p in packages if "skip_reason" in p and p["name"].replace("_", "-") != OURS]
        if not unanswered:
            return packages
        faults.append(f"{service}: no answer for {len(unanswered)} of {len(packages)} packages ({unanswered[0]}, ...)")
    print(
        "NOT AUDITED: no advisory service could be asked about all packages; expected PyPI or OSV within reach.\n  "
        + "\n  ".join(faults)
        + "\nRun make audit on a machine that reaches pypi.org or api.osv.dev",
        file=sys.stderr,
    )
    sys.exit(2)


def advisories(packages: list[dict]) -> list[str]:
    """One line for every advisory."""
    return [
        f"{p['name']} {p['version']}: {one['id']}, fixed in {', '.join(one['fix_versions']) or 'no release yet'}"
        for p in packages
        for one in p.get("vulns", ())
    ]


def main() -> None:
    pyproject = Path(__file__).resolve().parents[1] / "pyproject.toml"
    bounds = lower_bounds(tomllib.loads(pyproject.read_text())["project"])
    with tempfile.TemporaryDirectory() as folder:
        pinned = Path(folder) / "lowest.txt"
        pinned.write_text("".join(f"{name}=={bound}\n" for name, bound in bounds.items()))
        audited = {
            "installed": audit(["--local"]),
            "lower bounds": audit(["-r", str(pinned), "--no-deps", "--disable-pip"]),
        }
    found = {what: advisories(packages) for what, packages in audited.items()}
    for what, lines in found.items():
        print(f"{what}: {len(audited[what])} packages, {len(lines)} advisories")
        for line in lines:
            print(f"  {line}")
    if any(found.values()):
        sys.exit("Upgrade what is installed, or raise the lower bound in pyproject.toml")


if __name__ == "__main__":
    main()
