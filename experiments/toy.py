"""python -m experiments.toy: methods of balancing on two losses over a plane, in one figure (see --help)."""

import re
import sys
from pathlib import Path
from typing import Any

import hydra
from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from experiments.cli import command_line, in_plain_words, stop
from experiments.signals import StopRequest
from mtl_jax.analysis.toy import pareto_set, trajectories, values_at
from mtl_jax.config import build, plain
from mtl_jax.plan import has_key
from mtl_jax.report.folder import RunFolder, config_hash
from mtl_jax.report.toy import toy_table, write_toy

PROBLEM = ("starts", "kappas", "steps", "learning_rate", "every", "bounds", "seed")
PLAIN_WIDTH = 120
DIGITS = 5


@hydra.main(version_base="1.3", config_path="pkg://conf", config_name="toy")
@in_plain_words
def main(config: DictConfig, should_stop: StopRequest) -> None:
    job = HydraConfig.get()
    nodes = _methods(job)
    common = plain(OmegaConf.masked_copy(config, [key for key in config if key != "balancing"]))
    problem = {key: common[key] for key in PROBLEM}
    balancers = {name: build(node, allow=common["allow"], place="balancing") for name, node in nodes.items()}
    methods = {}
    try:
        for name, balancer in balancers.items():
            found = trajectories(balancer, **problem)
            methods[name] = {
                "config": nodes[name],
                "outcomes": found.outcomes(),
                "kept": found.steps,
                "points": found.points.round(DIGITS),
                "losses": found.losses.round(DIGITS),
            }
    except KeyboardInterrupt:
        stop("interrupted before anything was written", should_stop.status)
    content = problem | {"pareto_set": pareto_set(), "methods": methods}
    own_folder = any(override.startswith("hydra.run.dir=") for override in job.overrides.hydra)
    name = config_hash({"problem": problem, "balancing": nodes})
    folder = Path(job.runtime.output_dir if own_folder else Path(common["output_dir"]) / "toy" / name)
    with RunFolder.open(folder) as home:
        write_toy(content, values_at, home)
    console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    console.print(toy_table(content))
    console.print(f"figure and trajectories in {folder}", highlight=False, soft_wrap=True)


def _methods(job: HydraConf) -> dict[str, Any]:
    """The node of each method by its name, an option of balancing in those that have it."""
    overrides = OverridesParser.create().parse_overrides(list(job.overrides.task))
    chosen = [override for override in overrides if override.key_or_group == "balancing"]
    names = chosen[-1].value() if chosen else job.runtime.choices["balancing"]
    others = [override for override in overrides if override not in chosen]
    nodes = {}
    for name in names if isinstance(names, list) else [names]:
        known = hydra.compose("toy", [*job.overrides.hydra, f"balancing={name}"])
        fitting = [
            override.input_line
            for override in others
            if override.type.name != "CHANGE"
            or not override.key_or_group.startswith("balancing.")
            or has_key(OmegaConf.to_container(known), override.key_or_group)
        ]
        composed = hydra.compose("toy", [*job.overrides.hydra, f"balancing={name}", *fitting])
        nodes[name] = plain(composed.balancing)
    return nodes


if __name__ == "__main__":
    # a comma list of methods is one job, which Hydra writes in brackets
    sys.argv[1:] = [re.sub(r"^balancing=(\w+(?:,\w+)+)$", r"balancing=[\1]", argument) for argument in sys.argv[1:]]
    command_line(main, "toy")
