"""From a command line to the arms of an ablation: its plan, its jobs, its report."""

import contextlib
import datetime
import hashlib
import json
import re
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.live import Live

from experiments import report
from experiments.cli import FAILURE, USAGE, stop
from experiments.launch import launch
from experiments.search import search_name, searched, settled
from experiments.signals import STATUS
from mtl_jax.arguments import shown
from mtl_jax.arms import Arm, arms_of
from mtl_jax.config import plain
from mtl_jax.errors import ConfigError, MtlJaxError, RunFolderError
from mtl_jax.job import Shared
from mtl_jax.plan import plan_of
from mtl_jax.report.ablation import PLAN, read_ablation
from mtl_jax.report.board import Board
from mtl_jax.report.folder import RunFolder
from mtl_jax.report.selection import settings

SHARED = Shared()
"""What the arms of this process have loaded; a launcher of other processes has one in each."""
ONE_VALUE = (
    "allow", "arms", "axis", "baseline", "budget", "experiment", "folder", "folds", "grid", "hydra", "keep_checkpoints",
    "name", "output_dir", "report", "retry", "search", "search_seeds", "searching", "seed", "seeds", "trials",
    "vectorize", "loading", "select", "tuning_artefact",
)  # fmt: skip
"""Keys that are no choice between arms."""


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
        except KeyboardInterrupt:
            stop("interrupted before anything was run", STATUS + signal.SIGINT)
        print(f"{len(plan['members'])} runs of {len(plan['arms'])} arms in {folder}", file=sys.stderr)
        board = Board(folder, plan["members"])
        terminal = sys.stderr.isatty()
        console = Console(stderr=True)
        live = Live(get_renderable=board.table, console=console, refresh_per_second=1, transient=False)
        with live if terminal else contextlib.nullcontext():
            launch(self.launcher, jobs)
        ended = {member["run_id"]: _status(folder, member["run_id"]) for member in plan["members"]}
        failed = [member for member in plan["members"] if ended[member["run_id"]] == "failed"]
        status = 0
        if self.config.report and "completed" in ended.values():  # or there is nothing to compare
            status = report.main([str(folder)])
        for member in failed:
            error = json.loads((folder / "runs" / member["run_id"] / "result.json").read_bytes())["error"]
            what = " ".join(filter(None, (member["arm"], settings(member["values"]), f"seed {member['seed']}")))
            print(f"failed: {what}: {error['class']}: {error['message']}", file=sys.stderr)
        if failed:
            stop(f"{len(failed)} of {len(plan['members'])} runs failed; retry=true runs them again", FAILURE)
        if status:
            sys.exit(status)

    def plan(self, arguments: list[str]) -> tuple[Path, dict[str, Any], list[list[str]]]:
        """The folder, its plan as written there, and the overrides of each job that has something left to do.

        A search is launched here, because the values that it finds belong to the plan.
        """
        sweeps, fixed = self.sweeps(arguments)
        named = OmegaConf.to_container(self.config.arms) if self.config.arms else None
        baseline = None if self.config.baseline == "none" else self.config.baseline
        arms = arms_of(sweeps, fixed=fixed, named=named, baseline=baseline)
        composed = [(arm, self.compose(arm)) for arm in arms]
        members = plan_of([named_arm for _, named_arm in composed], SHARED)
        name = self.config.name or plan_name(members)
        search = OmegaConf.to_container(self.config.search)
        if search and not self.config.name:
            name = f"{name}-{search_name(search, self.config.search_seeds)}"
        folder = Path(self.config.folder or Path(self.config.output_dir) / "ablate" / name).absolute()
        about = {}
        if search:
            arms, about["search"] = searched(arms, self.compose, self.launcher, folder, written)
            composed = [(arm, self.compose(arm)) for arm in arms]
            members = plan_of([named_arm for _, named_arm in composed], SHARED)
        plan = {
            "id": name,
            "command": shlex.join(
                ["python", "-m", "experiments.ablate", *(a.removeprefix("++") for a in sys.argv[1:])]
            ),
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "baseline": baseline,
            "members": members,
            **about,
        }
        with RunFolder.open(folder) as home:
            earlier = _planned_before(home)
            plan = merged(settled(earlier, members) if search else earlier, plan)
            home.write_json(PLAN, plan)
        done = {m["run_id"] for m in members if self.ended(folder, m["run_id"])}
        jobs = [
            [*arm.overrides, f"folder={written(str(folder))}"]
            for arm, (name, data, _) in composed
            if any(m["run_id"] not in done for m in members if (m["arm"], m["data"]) == (name, data))
        ]
        return folder, plan | {"arms": sorted({(m["data"], m["arm"]) for m in members})}, jobs

    def sweeps(self, arguments: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
        """Key -> values, from the configuration and from comma lists, and the other overrides."""
        sweeps = {}
        for key, values in OmegaConf.to_container(self.config.grid).items():
            if not isinstance(values, list) or not values:
                raise ConfigError(
                    f"grid.{key} is {shown(values)}; expected a list of values. Write grid.{key}=[...], or {key}=..."
                )
            sweeps[key] = [written(value) for value in values]
        fixed = []
        parser = OverridesParser.create(config_loader=self.loader)
        for override in parser.parse_overrides(list(arguments)):
            key = override.get_key_element()
            _check_override(override)
            if override.is_sweep_override():
                sweeps[key] = list(override.sweep_string_iterator())
            else:
                sweeps.pop(key, None)  # one value on the command line takes the place of a list in an experiment
                fixed.append(override.input_line)
        for key in sweeps:
            _check_swept(key)
        return sweeps, fixed

    def compose(self, arm: Arm) -> tuple[str, str, dict[str, Any]]:
        """Name of the arm, name of its data, and its configuration."""
        try:
            config = self.loader.load_sweep_config(self.config, list(arm.overrides))
            choices = config.hydra.runtime.choices
            plain_config = plain(OmegaConf.masked_copy(config, [key for key in config if key != "hydra"]))
        except (HydraException, OmegaConfBaseException, ValueError) as error:  # Hydra does not keep to its own classes
            raise ConfigError(
                f"arm '{arm.name or ' '.join(arm.overrides)}' cannot be composed: {str(error).strip()}\nexpected options "
                "that --help shows. Correct the lists, or the overrides of the arm"
            ) from error
        name = arm.name or "+".join(choices[group] for group in ("sharing", "balancing"))
        return name, choices["data"], plain_config

    def ended(self, folder: Path, run_id: str) -> bool:
        status = _status(folder, run_id)
        return status == "completed" or (status == "failed" and not self.config.retry)


def written(value: Any) -> str:
    """A value as in an override on the command line."""
    if isinstance(value, list):
        return f"[{','.join(map(written, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{written(inner)}' for key, inner in value.items())}}}"
    if isinstance(value, str) and not re.fullmatch(r"[\w.+-]+", value):
        return QuotedString(value.replace("${", "\\${"), Quote.single).with_quotes()
    return "null" if value is None else str(value)


def plan_name(members: Sequence[Mapping[str, Any]]) -> str:
    """A name that stays when seeds are added: the data, and a hash over arms and configurations."""
    facts = sorted({(m["data"], m["arm"], m["run_id"].split("-")[0]) for m in members})
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:8]
    return "-".join([*sorted({m["data"] for m in members}), digest])


def merged(earlier: Mapping[str, Any] | None, plan: dict[str, Any]) -> dict[str, Any]:
    """The plan with the members of an earlier command in the same folder: other seeds, or other arms.

    Runs of an arm that is configured otherwise now are no members any more; their folders stay.
    """
    if earlier is None:
        return plan

    def point(member: Mapping[str, Any]) -> str:
        return json.dumps([member["arm"], member["data"], member["values"]], sort_keys=True)

    def configuration(member: Mapping[str, Any]) -> str:
        return member["run_id"].rpartition("-s")[0]

    known = {point(member): configuration(member) for member in plan["members"]}
    new = {member["run_id"] for member in plan["members"]}
    kept = [
        member
        for member in earlier["members"]
        if member["run_id"] not in new and known.get(point(member), configuration(member)) == configuration(member)
    ]
    return plan | {"created": earlier.get("created", plan["created"]), "members": [*plan["members"], *kept]}


def _check_override(override: Override) -> None:
    if override.get_key_element().lstrip("+") == "seed":
        raise ConfigError(f"{override.input_line} is for one run; expected seeds, of all arms. Write seeds=[...]")


def _check_swept(key: str) -> None:
    if re.split(r"[.@/]", key.lstrip("+~"))[0] in ONE_VALUE:
        raise ConfigError(
            f"{key} has a comma list, which would make arms; expected one value, as all arms share it. A list in brackets "
            "is one value, like seeds=[0,1] and axis.<key>=[...]"
        )


def _planned_before(home: RunFolder) -> dict[str, Any] | None:
    """The plan of an earlier command in this folder."""
    if (home.path / PLAN).exists():
        return read_ablation(home.path).facts
    if (home.path / "run.json").exists():
        raise RunFolderError(f"'{home.path}' is the folder of a run; expected that of an ablation. Choose another one")
    return None


def _status(folder: Path, run_id: str) -> str | None:
    try:
        return json.loads((folder / "runs" / run_id / "result.json").read_bytes()).get("status")
    except (OSError, ValueError):
        return None
