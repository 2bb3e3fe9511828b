"""TensorBoard: curves of every task and histograms of the parameters, by tensorboardX."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mtl_jax.errors import ConfigError
from mtl_jax.train.progress import History, Observer

MOST_VALUES = 1_000_000
"""Of an array in a histogram; larger tables are thinned out on the device, by rows at equal distances."""


class TensorBoard(Observer):
    r"""Writes event files: losses while an epoch runs; after it losses, weights, metrics and histograms.

    Tags are ``<part>/<name>/<task>``. ``train/learning_speed/<task>`` is the share of the first epoch's loss that is
    gone, :math:`1 - L_k(t) / L_k(1)`, so that tasks with losses of different scale compare.

    Args:
      path: Folder of the event files.

    Raises:
      ConfigError: tensorboardX is not installed.
    """

    wants_arrays = True

    def __init__(self, path: str | Path):
        check_installed()
        self.path = Path(path)
        self.step = 0

    def started(self, *, total_steps: int, done_steps: int) -> None:
        from tensorboardX import SummaryWriter

        # A resumed run repeats what came after its checkpoint: readers drop the first account of it.
        self.writer = SummaryWriter(str(self.path), purge_step=done_steps + 1 if done_steps else None)
        self.step = done_steps

    def advanced(self, *, steps: int, losses: Mapping[str, float], examples_per_second: float, **facts: Any) -> None:
        self.step += steps
        for task, loss in losses.items():
            self._scalar(f"train/loss_so_far/{task}", loss, self.step)
        self._scalar("train/examples_per_second", examples_per_second, self.step)

    def evaluated(self, *, history: History, **facts: Any) -> None:
        latest = history[-1]["step"]
        for row in history:
            if row["step"] == latest:
                tag = f"{row['part']}/{row['name']}"
                self._scalar(f"{tag}/{row['task']}" if row["task"] else tag, row["value"], latest)
        for task, speed in learning_speed(history).items():
            self._scalar(f"train/learning_speed/{task}", speed, latest)
        self.writer.flush()

    def parameters(self, step: int, arrays: Mapping[str, Any]) -> None:
        for path, array in arrays.items():
            if not str(array.dtype).startswith(("float", "bfloat")):
                continue  # keys and counters
            thinned = array if array.size <= MOST_VALUES else array[:: -(-array.size // MOST_VALUES)]
            values = np.asarray(thinned).astype(np.float32).ravel()
            values = values[np.isfinite(values)]
            if values.size:
                self.writer.add_histogram(path, values, step)

    def finished(self) -> None:
        self.writer.close()

    def _scalar(self, tag: str, value: float | None, step: int) -> None:
        if value is not None:
            self.writer.add_scalar(tag, value, step)


def learning_speed(history: History) -> dict[str, float]:
    """Task -> share of its training loss in the first epoch that is gone in the latest; without tasks of loss 0."""
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    for row in history:
        if (row["part"], row["name"]) == ("train", "loss") and row["value"] is not None:
            first.setdefault(row["task"], row["value"])
            last[row["task"]] = row["value"]
    return {task: 1 - last[task] / loss for task, loss in first.items() if loss}


def check_installed() -> None:
    """Raises the ConfigError of :class:`TensorBoard`."""
    if importlib.util.find_spec("tensorboardX") is None:
        raise ConfigError(
            "trainer.tensorboard is true, but tensorboardX is not installed; expected the package. Run "
            "pip install 'mtl_jax[tensorboard]', or set trainer.tensorboard=false"
        )
