"""python -m experiments.train: one multi-task run, from data to a table (see --help)."""

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from experiments.cli import command_line, in_plain_words
from mtl_jax.run import run


@hydra.main(version_base="1.3", config_path="pkg://conf", config_name="train")
@in_plain_words
def main(config: DictConfig) -> None:
    job = HydraConfig.get()
    own_folder = any(override.startswith("hydra.run.dir=") for override in job.overrides.hydra)
    run(
        config,
        names={group: job.runtime.choices[group] for group in ("sharing", "balancing")},
        folder=job.runtime.output_dir if own_folder else None,
        overrides=job.overrides.task,
    )


if __name__ == "__main__":
    command_line(main, "train")
