"""What makes one job of every arm of an ablation. Hydra takes sweepers from the package ``hydra_plugins`` only."""

from typing import Any

from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class ArmSweeper(Sweeper):
    """Hands the command line of ``experiments.ablate`` on to :mod:`experiments.sweep`."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        from experiments.sweep import Sweep  # here, because every application of Hydra loads all plugins

        Sweep(self.config, self.hydra_context.config_loader, self.launcher).run(arguments)
