"""Stages of training: which parameters are trained, and what each is selected by."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from mtl_jax.errors import ConfigError
from mtl_jax.model import label
from mtl_jax.tasks import Task
from mtl_jax.train.adaptation import Adaptation
from mtl_jax.train.monitor import Monitor

TRAININGS = ("joint", "staged")


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of training that ends by its own monitors.

    Attributes:
      trainable: Whether a parameter, named by its path, is trained.
      monitors: What is watched. One monitor selects all parameters together; several select the parameters of one task
        each, named before the slash.
      by_task: Whether it is one monitor a task.
    """

    trainable: Callable[[str], bool]
    monitors: tuple[Monitor, ...]
    by_task: bool = False

    def selects(self, monitor: Monitor, path: str) -> bool:
        """Whether the parameter follows this monitor in a stage that selects by task."""
        return label(path) == f"task/{monitor.name.rsplit('/', 1)[0]}"


def stages_of(
    training: str,
    monitor: str,
    tasks: Sequence[Task],
    trivial: Mapping[str, Mapping[str, float | None]],
    adaptation: Adaptation | None = None,
) -> tuple[Stage, ...]:
    """The stages of a way of training.

    ``joint`` trains everything together. ``staged`` does so first; then tables and shared parameters stay as selected,
    and each task's own parameters are trained on, and selected by the task's own metric.

    Args:
      training: ``joint`` or ``staged``.
      monitor: Of the joint stage: ``mean_gain`` or ``<task>/<metric>``.
      tasks: The tasks.
      trivial: Metrics of the trivial predictor on validation.
      adaptation: Its phases are the stages, each selected by the monitor.

    Raises:
      ConfigError: Unknown training or monitor.
    """
    check_training(training)
    tasks = tuple(tasks)
    joint = Stage(lambda path: True, (Monitor(monitor, tasks, trivial),))
    if adaptation is not None:
        return tuple(dataclasses.replace(joint, trainable=trainable) for trainable in adaptation.phases())
    if training == "joint":
        return (joint,)
    own = tuple(Monitor(f"{task.name}/{task.metric}", tasks, trivial) for task in tasks)
    return joint, Stage(lambda path: label(path).startswith("task/"), own, by_task=True)


def check_training(training: str) -> None:
    """Raises a ConfigError that lists the ways of training."""
    if training not in TRAININGS:
        raise ConfigError(f"training is {training!r}; expected one of {list(TRAININGS)}. Change it")
