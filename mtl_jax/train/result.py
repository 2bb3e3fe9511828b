"""Position: where a run stands. Result: what it ends in."""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mtl_jax.data.dataset import Encoded
from mtl_jax.model import MultiTaskModel
from mtl_jax.train.gate_use import Use, gate_use
from mtl_jax.train.monitor import Monitor
from mtl_jax.train.predict import outputs_of
from mtl_jax.train.state import Functional, Params
from mtl_jax.train.step import Sums


@dataclasses.dataclass
class Position:
    """Where a run stands; saved with every checkpoint, so that a resumed run goes on as if nothing had happened.

    Attributes:
      stage: Number of the stage of training.
      epoch: Finished epochs of the stage.
      step: Finished steps of the epoch under way.
      history: Rows ``{step, part, task, name, value}`` of everything measured so far.
      sums: Name -> value of the epoch under way, per task where it has one (see :class:`mtl_jax.train.step.Sums`).
      skipped: Steps without an update, over the whole run.
      best: Monitor of the stage -> ``{step, value, stale}``: its best evaluation, and how many that
        count came since.
      start_step: Step of what the stage began with, selected by the one before; None in the first.
      finished: Whether the stage has ended.
      train_seconds: Time in compiled steps, without compilation and evaluation.
      examples: Rows trained on in that time.
    """

    stage: int = 0
    epoch: int = 0
    step: int = 0
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    sums: dict[str, Any] = dataclasses.field(default_factory=dict)
    skipped: int = 0
    best: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    start_step: int | None = None
    finished: bool = False
    train_seconds: float = 0.0
    examples: int = 0

    def judge(self, monitor: Monitor, values: Mapping[str, Mapping[str, float | None]], at: int, patience: int) -> bool:
        """Whether an evaluation at step ``at`` is the best so far of a monitor that has not run out of patience."""
        value = monitor.value(values)
        best = self.best.setdefault(monitor.name, {"step": None, "value": None, "stale": 0})
        if self.out_of_patience(monitor, patience):
            return False
        if best["step"] is None or monitor.score(value) > monitor.score(best["value"]):
            best.update(step=at, value=value, stale=0)
            return True
        best["stale"] += patience > 0
        return False

    def out_of_patience(self, monitor: Monitor, patience: int) -> bool:
        return patience > 0 and self.best[monitor.name]["stale"] >= patience

    def next_stage(self) -> None:
        """Begins the next stage; history and totals go on."""
        self.start_step = self.best_step
        self.stage, self.epoch, self.step, self.sums = self.stage + 1, 0, 0, {}
        self.best, self.finished = {}, False

    def add(self, sums: Sums) -> None:
        """Adds what one call summed up, in float64."""
        for name, value in sums._asdict().items():
            if isinstance(value, Mapping):
                known = self.sums.get(name, {})
                self.sums[name] = {key: float(number) + known.get(key, 0.0) for key, number in value.items()}
            else:
                total = np.asarray(value, np.float64) + np.asarray(self.sums.get(name, 0.0))
                self.sums[name] = total.tolist()
        self.skipped += int(sums.skipped)

    def mean_losses(self) -> np.ndarray:
        """Mean element loss of each task in the epoch under way; NaN for a task without a label so far."""
        denominator = np.asarray(self.sums["denominator"])
        return np.asarray(self.sums["numerator"]) / np.where(denominator > 0, denominator, np.nan)

    def mean_weights(self) -> np.ndarray:
        """Mean balancing weight of each task in the epoch under way."""
        return np.asarray(self.sums["weight"]) / max(self.sums["steps"], 1)

    def close_epoch(
        self,
        at: int,
        tasks: Sequence[str],
        values: Mapping[str, Mapping[str, float | None]],
        monitor: Monitor,
        *,
        weighted: bool = True,
    ) -> None:
        """Ends the epoch at step ``at``: training losses, weights and validation metrics go into the history."""
        for index, task in enumerate(tasks):
            self._record(at, "train", task, "loss", self.mean_losses()[index])
            if weighted:
                self._record(at, "train", task, "weight", self.mean_weights()[index])
            for name, metric in values[task].items():
                self._record(at, "valid", task, name, metric)
        self._record(at, "train", None, "null_rows", self.sums["null_rows"])
        for one, other in itertools.combinations(range(len(tasks)), 2):
            compared = self.sums["compared"][one][other]
            if compared:
                mean = self.sums["cosines"][one][other] / compared
                self._record(at, "train", None, f"cosine {tasks[one]} {tasks[other]}", mean)
        for name, total in self.sums["diagnostics"].items():
            if name != "negative_weights" or total:
                self._record(at, "train", None, name, total / max(self.sums["steps"], 1))
        self._record(at, "valid", None, monitor.name, monitor.value(values))
        self.epoch, self.step, self.sums = self.epoch + 1, 0, {}

    @property
    def best_step(self) -> int | None:
        """Step that a stage with one monitor selects; None before its first evaluation."""
        return next(iter(self.best.values()), {"step": None})["step"]

    def selection(
        self, monitor: Monitor, values: Mapping[str, Mapping[str, float | None]], *, by_task: bool
    ) -> dict[str, Any]:
        """``{name, value, step}`` of the selection, whose metrics are ``values``; after staged training by task too."""
        if not by_task:
            best = self.best[monitor.name]
            return {"name": monitor.name, "value": best["value"], "step": best["step"]}
        tasks = {
            name.rsplit("/", 1)[0]: {"name": name, "value": best["value"], "step": best["step"]}
            for name, best in self.best.items()
        }
        step = max(best["step"] for best in self.best.values())
        return {"name": monitor.name, "value": monitor.value(values), "step": step, "tasks": tasks}

    def last(self, name: str) -> dict[str, float | None]:
        """The newest value of one name by task."""
        return {row["task"]: row["value"] for row in self.history if row["name"] == name and row["task"]}

    def open(self, at: int, values: Mapping[str, Mapping[str, float | None]], monitor: Monitor) -> None:
        """Writes down what a run begins with: validation metrics before the first step."""
        for task, of_task in values.items():
            for name, metric in of_task.items():
                self._record(at, "valid", task, name, metric)
        self._record(at, "valid", None, monitor.name, monitor.value(values))

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
      monitor: ``{name, value, step}`` of the selection; after staged training also ``tasks``: the same by task.
      timing: ``{examples_per_second, compile_seconds, wall_seconds, steps}``.
      params: Numbers of parameters by kind of label, ``total`` and ``flops_per_example``.
      diagnostics: ``{scope, head_gradient, task_weights, skipped_steps}``.
      table_updates: Vocabulary -> ``dense`` or ``sparse``.
      aux: ``aux/<name>/...`` -> array, of what was trained in place of arrays of the model, which were made of it (LoRA's
        factors).
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
    aux: Params = dataclasses.field(default_factory=dict)

    def predict(self, rows: Encoded) -> dict[str, np.ndarray]:
        """Outputs of every task: logits, or standardised predictions of regression tasks."""
        return outputs_of(self.model, rows)

    def gate_use(self, rows: Encoded, domains: Sequence[str] = ()) -> Use:
        """What the gates of the model weigh (see :func:`mtl_jax.train.gate_use.gate_use`)."""
        functional, params, rest = Functional.of(self.model)
        return gate_use(functional, params | rest, rows, domains)
