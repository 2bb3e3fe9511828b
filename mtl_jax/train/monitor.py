"""Model selection: the validation number that a run stops and chooses by."""

import dataclasses
from collections.abc import Mapping, Sequence

from mtl_jax import metrics
from mtl_jax.errors import ConfigError
from mtl_jax.metrics.kinds import LOWER_IS_BETTER, METRICS
from mtl_jax.tasks import Task

MEAN_GAIN = "mean_gain"
NOT_ORDERED = ("pcoc",)


@dataclasses.dataclass(frozen=True)
class Monitor:
    """A named number on validation, for which higher is better after :meth:`score`.

    Attributes:
      name: ``mean_gain`` (the mean relative gain of all tasks over the trivial predictor) or ``<task>/<metric>``.
      tasks: The tasks.
      trivial: Metrics of the trivial predictor ``global_mean`` on validation.
    """

    name: str
    tasks: tuple[Task, ...]
    trivial: Mapping[str, Mapping[str, float | None]]

    def __post_init__(self):
        check_monitor(self.name, self.tasks)

    def value(self, values: Mapping[str, Mapping[str, float | None]]) -> float | None:
        """The monitored number, in its own units."""
        if self.name == MEAN_GAIN:
            return metrics.mean_gain(self.tasks, values, self.trivial)
        task, metric = self.name.rsplit("/", 1)
        return values[task][metric]

    def score(self, value: float | None) -> float:
        """The number to maximise; a missing one is never the best."""
        if value is None:
            return float("-inf")
        return -value if self.name.rsplit("/", 1)[-1] in LOWER_IS_BETTER else value


def check_monitor(name: str, tasks: Sequence[Task]) -> None:
    """Raises a ConfigError that lists the valid names."""
    valid = [MEAN_GAIN] + [f"{t.name}/{m}" for t in tasks for m in METRICS[t.kind] if m not in NOT_ORDERED]
    if name not in valid:
        raise ConfigError(f"trainer.monitor is '{name}'; expected one of {valid}. Change it")
