"""From a command line to the arms of an ablation: its plan, its jobs, its report."""

import contextlib
import datetime
import hashlib
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.live import Live

from experiments import report
from experiments.cli import FAILURE, USAGE, stop
from mtl_jax.ablate import plan_of
from mtl_jax.arms import Arm, arms_of
from mtl_jax.config import plain
from mtl_jax.errors import MtlJaxError
from mtl_jax.job import Shared
from mtl_jax.report.ablation import PLAN
from mtl_jax.report.board import Board
from mtl_jax.report.folder import RunFolder

SHARED = Shared()
"""What the arms of this process have loaded; a launcher of other processes has one in each."""


class Sweep:
    """The arms of one command line.

    Args:
      config: Composed without the comma lists.
      loader: Composes each arm.
      launcher: Runs the jobs.
    """

    def __init__(self, config: DictConfig, loader: ConfigLoader, launcher: Launcher):
        self.config, self.loader, self.launcher = config, loader, launcher

    def run(self, arguments: list[str]) -> None:
        """Writes the plan, launches what is unfinished, and reports."""
        try:
            folder, plan, jobs = self.plan(arguments)
        except MtlJaxError as error:
            stop(f"{type(error).__name__}: {error}", USAGE)
        print(f"{len(plan['members'])} runs of {len(plan['arms'])} arms in {folder}", file=sys.stderr)
        board = Board(folder, plan["members"])
        terminal = sys.stderr.isatty()
        console = Console(stderr=True)
        live = Live(get_renderable=board.table, console=console, refresh_per_second=1, transient=False)
        with live if terminal else contextlib.nullcontext():
            for result in self.launcher.launch(jobs, initial_job_idx=0) if jobs else ():
                _ = result.return_value  # raises what ended the job
        failed = [m for m in plan["members"] if _status(folder, m["run_id"]) == "failed"]
        status = report.main([str(folder)]) if self.config.report else 0
        for member in failed:
            error = json.loads((folder / "runs" / member["run_id"] / "result.json").read_bytes())["error"]
            what = f"{member['arm']} seed {member['seed']} {member['values'] or ''}".strip()
            print(f"failed: {what}: {error['class']}: {error['message']}", file=sys.stderr)
        if failed:
            stop(f"{len(failed)} of {len(plan['members'])} runs failed; retry=true runs them again", FAILURE)
        if status:
            sys.exit(status)

    def plan(self, arguments: list[str]) -> tuple[Path, dict[str, Any], list[list[str]]]:
        """The folder, its plan as written there, and the overrides of each job that has something left to do."""
        sweeps, fixed = self.sweeps(arguments)
        named = OmegaConf.to_container(self.config.arms) if self.config.arms else None
        baseline = None if self.config.baseline == "none" else self.config.baseline
        arms = arms_of(sweeps, fixed=fixed, named=named, baseline=baseline)
        composed = [(arm, self.compose(arm)) for arm in arms]
        members = plan_of([named_arm for _, named_arm in composed], SHARED)
        name = self.config.name or plan_name(members)
        folder = Path(self.config.folder or Path(self.config.output_dir) / "ablate" / name).absolute()
        plan = {
            "id": name,
            "command": shlex.join(
                ["python", "-m", "experiments.ablate", *(a.removeprefix("++") for a in sys.argv[1:])]
            ),
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "baseline": baseline,
            "members": members,
        }
        with RunFolder.open(folder) as home:
            plan = merged(home.read_json(PLAN), plan)
            home.write_json(PLAN, plan)
        done = {m["run_id"] for m in members if self.ended(folder, m["run_id"])}
        jobs = [
            [*arm.overrides, f"folder='{folder}'"]
            for arm, (name, data, _) in composed
            if any(m["run_id"] not in done for m in members if (m["arm"], m["data"]) == (name, data))
        ]
        return folder, plan | {"arms": sorted({(m["data"], m["arm"]) for m in members})}, jobs

    def sweeps(self, arguments: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
        """Key -> values, from the configuration and from comma lists, and the other overrides."""
        sweeps = {
            key: [str(value) for value in values] for key, values in OmegaConf.to_container(self.config.grid).items()
        }
        fixed = []
        parser = OverridesParser.create(config_loader=self.loader)
        for override in parser.parse_overrides(list(arguments)):
            key = override.get_key_element()
            if override.is_sweep_override():
                sweeps[key] = list(override.sweep_string_iterator())
            else:
                sweeps.pop(key, None)  # one value on the command line takes the place of a list in an experiment
                fixed.append(override.input_line)
        return sweeps, fixed

    def compose(self, arm: Arm) -> tuple[str, str, dict[str, Any]]:
        """Name of the arm, name of its data, and its configuration."""
        config = self.loader.load_sweep_config(self.config, list(arm.overrides))
        choices = config.hydra.runtime.choices
        plain_config = plain(OmegaConf.masked_copy(config, [key for key in config if key != "hydra"]))
        name = arm.name or "+".join(choices[group] for group in ("sharing", "balancing"))
        return name, choices["data"], plain_config

    def ended(self, folder: Path, run_id: str) -> bool:
        status = _status(folder, run_id)
        return status == "completed" or (status == "failed" and not self.config.retry)


def plan_name(members: Sequence[Mapping[str, Any]]) -> str:
    """A name that stays when seeds are added: the data, and a hash over arms and configurations."""
    facts = sorted({(m["data"], m["arm"], m["run_id"].split("-")[0]) for m in members})
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:8]
    return "-".join([*sorted({m["data"] for m in members}), digest])


def merged(earlier: Mapping[str, Any] | None, plan: dict[str, Any]) -> dict[str, Any]:
    """The plan with the members of an earlier command of the same ablation, whose seeds may be others."""
    if earlier is None:
        return plan
    new = {m["run_id"] for m in plan["members"]}
    return plan | {"members": [*plan["members"], *(m for m in earlier["members"] if m["run_id"] not in new)]}


def _status(folder: Path, run_id: str) -> str | None:
    try:
        return json.loads((folder / "runs" / run_id / "result.json").read_bytes()).get("status")
    except (OSError, ValueError):
        return None
