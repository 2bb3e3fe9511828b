"""python -m experiments.ablate: methods against each other, over seeds, into tables and figures (see --help)."""

import sys
from collections.abc import Mapping
from typing import Any

import hydra
import jax
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from experiments.cli import command_line, in_plain_words
from experiments.signals import StopRequest
from experiments.sweep import SHARED
from mtl_jax.ablate import run_arm
from mtl_jax.config import plain


@hydra.main(version_base="1.3", config_path="pkg://conf", config_name="ablate")
@in_plain_words
def main(config: DictConfig, should_stop: StopRequest) -> None:
    """One arm; the sweeper makes a job of each (see :mod:`experiments.sweep`)."""
    names = HydraConfig.get().runtime.choices
    names = {group: names[group] for group in ("sharing", "balancing")}
    arm = plain(config)
    run_arm(arm, arm["folder"], names=names, shared=SHARED, should_stop=should_stop, told=_tell)
    jax.clear_caches()


def _tell(record: Mapping[str, Any]) -> None:
    if sys.stderr.isatty():  # where the table shows it
        return
    method, monitor = record["method"], record["monitor"]
    what = record["error"]["message"] if record["status"] == "failed" else f"{monitor['name']} {monitor['value']:.4f}"
    print(
        f"{record['status']} {method['sharing']} {method['balancing']} seed {record['seed']}: {what}", file=sys.stderr
    )


if __name__ == "__main__":
    # axis.<key>=[...] names keys that conf/ablate.yaml does not have
    sys.argv[1:] = [f"++{argument}" if argument.startswith("axis.") else argument for argument in sys.argv[1:]]
    command_line(main, "ablate")
