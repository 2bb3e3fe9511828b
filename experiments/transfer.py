"""python -m experiments.transfer: from a source to a target, from data to a table (see --help)."""

import hydra
from omegaconf import DictConfig

from experiments.cli import command_line, in_plain_words
from experiments.signals import StopRequest
from experiments.train import one_run


@hydra.main(version_base="1.3", config_path="pkg://conf", config_name="transfer")
@in_plain_words
def main(config: DictConfig, should_stop: StopRequest) -> None:
    one_run(config, should_stop)


if __name__ == "__main__":
    command_line(main, "transfer")
