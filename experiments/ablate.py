"""python -m experiments.ablate: methods against each other, over seeds, into tables and figures (see --help)."""

import functools
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import hydra
import jax
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from experiments import sweep  # the module, because a launcher would send all of SHARED along with the function
from experiments.cli import command_line, in_plain_words
from experiments.launch import sends_back
from experiments.search import tell
from experiments.signals import StopRequest
from mtl_jax.ablate import run_arm
from mtl_jax.config import plain
from mtl_jax.job import METHOD
from mtl_jax.plan import flat_axis, has_key, settings_tried
from mtl_jax.report.selection import settings
from mtl_jax.search import search_arm, space_of


@hydra.main(version_base="1.3", config_path="pkg://conf", config_name="ablate")
@sends_back
@in_plain_words
def main(config: DictConfig, should_stop: StopRequest) -> None:
    """One arm; the sweeper makes a job of each (see :mod:`experiments.sweep`)."""
    names = HydraConfig.get().runtime.choices
    names = {group: names[group] for group in METHOD}
    arm = plain(config)
    common = {"names": names, "shared": sweep.SHARED, "should_stop": should_stop}
    if label := arm["searching"]:
        search_arm(arm, arm["folder"], label, told=lambda study: tell(label, study, arm["trials"]), **common)
    else:
        tried = arm["trials"] if arm["search"] and space_of(arm) else settings_tried(arm)
        told = functools.partial(_tell, list(flat_axis(arm["axis"])))
        run_arm(arm, arm["folder"], told=told, tuning_trials=tried, **common)
    jax.clear_caches()


def _tell(axes: Sequence[str], record: Mapping[str, Any]) -> None:
    if sys.stderr.isatty():  # where the table shows it
        return
    method, monitor = record["method"], record["monitor"]
    value = "n/a" if monitor["value"] is None else f"{monitor['value']:.4f}"
    what = record["error"]["message"] if record["status"] == "failed" else f"{monitor['name']} {value}"
    config = record["config"]
    values = {key: functools.reduce(dict.__getitem__, key.split("."), config) for key in axes if has_key(config, key)}
    run = [method[group] for group in METHOD if method[group]]
    run += [*([settings(values)] if values else []), f"seed {record['seed']}"]
    print(f"{record['status']} {' '.join(run)}: {what}", file=sys.stderr)


if __name__ == "__main__":
    # axis.<key>=[...] and search.<key>={...} name keys that conf/ablate.yaml does not have
    sys.argv[1:] = [
        f"++{argument}" if argument.startswith(("axis.", "search.")) else argument for argument in sys.argv[1:]
    ]
    command_line(main, "ablate")
