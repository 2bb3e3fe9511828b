"""Position: where a run stands. Result: what it ends in."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mtl_jax.data.dataset import Encoded
from mtl_jax.model import MultiTaskModel
from mtl_jax.train.predict import predict
from mtl_jax.train.state import Functional
from mtl_jax.train.step import Sums


@dataclasses.dataclass
class Position:
    """Where a run stands; saved with every checkpoint, so that a resumed run goes on as if nothing had happened.

    Attributes:
      epoch: Finished epochs.
      step: Finished steps of the epoch under way.
      history: Rows ``{step, part, task, name, value}`` of everything measured so far.
      sums: Name -> value of the epoch under way, per task where it has one (see :class:`mtl_jax.train.step.Sums`).
      skipped: Steps without an update, over the whole run.
      best_step: Step of the best evaluation.
      best_value: Its monitored value.
      stale: Evaluations since.
      finished: Whether training has ended.
      train_seconds: Time in compiled steps, without compilation and evaluation.
      examples: Rows trained on in that time.
    """

    epoch: int = 0
    step: int = 0
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    sums: dict[str, Any] = dataclasses.field(default_factory=dict)
    skipped: int = 0
    best_step: int | None = None
    best_value: float | None = None
    stale: int = 0
    finished: bool = False
    train_seconds: float = 0.0
    examples: int = 0

    def add(self, sums: Sums) -> None:
        """Adds what one call summed up, in float64."""
        for name, value in sums._asdict().items():
            total = np.asarray(value, np.float64) + np.asarray(self.sums.get(name, 0.0))
            self.sums[name] = total.tolist()
        self.skipped += int(sums.skipped)

    def mean_losses(self) -> np.ndarray:
        """Mean element loss of each task in the epoch under way; NaN for a task without a label so far."""
        denominator = np.asarray(self.sums["denominator"])
        return np.asarray(self.sums["numerator"]) / np.where(denominator > 0, denominator, np.nan)

    def close_epoch(
        self,
        at: int,
        tasks: Sequence[str],
        values: Mapping[str, Mapping[str, float | None]],
        monitor: str,
        value: float,
    ) -> None:
        """Ends the epoch at step ``at``: training losses, weights and validation metrics go into the history."""
        steps = max(self.sums["steps"], 1)
        for index, task in enumerate(tasks):
            self._record(at, "train", task, "loss", self.mean_losses()[index])
            self._record(at, "train", task, "weight", self.sums["weight"][index] / steps)
            for name, metric in values[task].items():
                self._record(at, "valid", task, name, metric)
        self._record(at, "train", None, "null_rows", self.sums["null_rows"])
        self._record(at, "valid", None, monitor, value)
        self.epoch, self.step, self.sums = self.epoch + 1, 0, {}

    def last(self, name: str) -> dict[str, float | None]:
        """The newest value of one name by task."""
        return {row["task"]: row["value"] for row in self.history if row["name"] == name and row["task"]}

    def _record(self, step: int, part: str, task: str | None, name: str, value: float | None) -> None:
        value = None if value is None or not math.isfinite(value) else float(value)
        self.history.append({"step": step, "part": part, "task": task, "name": name, "value": value})


@dataclasses.dataclass(frozen=True)
class Result:
    """A trained model and how it came about.

    Attributes:
      model: With the selected parameters.
      metrics: ``valid`` -> task -> metric -> value, at the selected step.
      support: ``valid`` -> task -> metric -> what the value was computed from.
      history: Rows ``{step, part, task, name, value}``.
      monitor: ``{name, value, step}`` of the selection.
      timing: ``{examples_per_second, compile_seconds, wall_seconds, steps}``.
      params: Numbers of parameters by kind of label, ``total`` and ``flops_per_example``.
      diagnostics: ``{scope, head_gradient, task_weights, skipped_steps}``.
      table_updates: Vocabulary -> ``dense`` or ``sparse``.
    """

    model: MultiTaskModel
    metrics: dict[str, Any]
    support: dict[str, Any]
    history: list[dict[str, Any]]
    monitor: dict[str, Any]
    timing: dict[str, Any]
    params: dict[str, Any]
    diagnostics: dict[str, Any]
    table_updates: dict[str, str]

    def predict(self, rows: Encoded) -> dict[str, np.ndarray]:
        """Outputs of every task: logits, or standardised predictions of regression tasks."""
        functional, params, rest = Functional.of(self.model)
        return predict(functional, params | rest, rows)
