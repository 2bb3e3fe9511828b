"""python -m experiments.train: one multi-task run, from data to a table (see --help)."""

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from experiments.cli import command_line, in_plain_words
from experiments.signals import StopRequest
from mtl_jax.config import plain
from mtl_jax.cross_validate import cross_validate
from mtl_jax.errors import ConfigError
from mtl_jax.job import METHOD
from mtl_jax.run import run, summarise


@hydra.main(version_base="1.3", config_path="pkg://conf", config_name="train")
@in_plain_words
def main(config: DictConfig, should_stop: StopRequest) -> None:
    one_run(config, should_stop)


def one_run(config: DictConfig, should_stop: StopRequest) -> None:
    """The run of a composed configuration."""
    job = HydraConfig.get()
    own_folder = any(override.startswith("hydra.run.dir=") for override in job.overrides.hydra)
    shared = {
        "names": {group: job.runtime.choices[group] for group in METHOD},
        "folder": job.runtime.output_dir if own_folder else None,
        "should_stop": should_stop,
    }
    settings = plain(config)
    summary = settings.pop("summary")
    if not isinstance(summary, bool):
        raise ConfigError(f"summary is {summary!r}; expected true or false. Change it")
    if summary:
        summarise(settings)
    elif settings["folds"] is None:
        run(settings, overrides=job.overrides.task, **shared)
    else:
        cross_validate(settings, **shared)


if __name__ == "__main__":
    command_line(main, "train")
