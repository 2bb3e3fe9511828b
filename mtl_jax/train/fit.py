"""fit: trains a model on a data set, from the first step to the selected parameters."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mtl_jax import metrics
from mtl_jax.balancing import Balancer, equal
from mtl_jax.data.batching import as_batch, epoch_order
from mtl_jax.data.dataset import Dataset, TrainingData
from mtl_jax.data.schema import Schema
from mtl_jax.errors import ConfigError, TrainingError
from mtl_jax.model import MultiTaskModel
from mtl_jax.train import tables
from mtl_jax.train.checkpoint import Checkpoints
from mtl_jax.train.gradients import BalancingOptions
from mtl_jax.train.loop import run_steps
from mtl_jax.train.monitor import Monitor, check_monitor
from mtl_jax.train.objective import Objective
from mtl_jax.train.optimizer import Optimizer, as_optimizer
from mtl_jax.train.parallel import compile_step
from mtl_jax.train.predict import flops_per_example, predict
from mtl_jax.train.progress import Observer, Quiet
from mtl_jax.train.result import Position, Result
from mtl_jax.train.state import Params, TrainState, count_parameters
from mtl_jax.train.step import Step, Sums


def fit(
    model: MultiTaskModel,
    dataset: Dataset | TrainingData,
    *,
    balancer: Balancer | None = None,
    optimizer: Optimizer | optax.GradientTransformation | None = None,
    seed: int = 0,
    epochs: int = 10,
    batch_size: int = 4096,
    patience: int = 2,
    monitor: str = "mean_gain",
    objective: Objective = Objective(),
    options: BalancingOptions = BalancingOptions(),
    table_updates: str | Mapping[str, str] = "auto",
    steps_per_call: int = 32,
    parallel: str = "jit",
    checkpoints: str | Path | None = None,
    checkpoint_seconds: float = 60.0,
    observer: Observer | None = None,
) -> Result:
    """Trains all tasks jointly, evaluates on validation after every epoch, and selects the best epoch.

    The test part is never seen: a ``Dataset`` is reduced to its training and validation parts first.

    Args:
      model: Built from the data's schema. Its arrays are the initial values and stay as they are.
      dataset: What to train and select on.
      balancer: How tasks are weighed; ``equal()`` by default.
      optimizer: An :class:`Optimizer` or an optax transform; Adam with rate 1e-3 by default.
      seed: Of data order, dropout and draws. The model brings its own initialisation.
      epochs: Most epochs.
      batch_size: Rows a step.
      patience: Epochs without a better monitor before training stops; 0 never stops early.
      monitor: ``mean_gain``, or ``<task>/<metric>`` on validation.
      objective: Reduction of the losses.
      options: Scope and head gradient of the balancer.
      table_updates: ``auto``, ``dense``, ``sparse``, or a choice by vocabulary.
      steps_per_call: Steps between two looks at the device. Results do not depend on it.
      parallel: Compilation strategy (see :func:`mtl_jax.train.parallel.compile_step`).
      checkpoints: Folder for checkpoints; a run that finds its own there goes on from the newest. None: no checkpoints.
      checkpoint_seconds: Longest time between two checkpoints inside an epoch; every epoch ends with one.
      observer: Is told about progress; see :class:`mtl_jax.train.progress.Bar`.

    Raises:
      ConfigError: An option is out of range, or options do not fit together; raised before anything is compiled.
      TrainingError: A loss or gradient is not finite; names step, task and the last good checkpoint.

    Example:
      >>> from flax import nnx
      >>> import mtl_jax
      >>> data = mtl_jax.data.load("synthetic", num_rows=600, dim=8)
      >>> model = mtl_jax.MultiTaskModel(data.schema, rngs=nnx.Rngs(0))
      >>> result = mtl_jax.train.fit(model, data, epochs=2, batch_size=128)
      >>> sorted(result.metrics["valid"]["y1"])
      ['mae', 'rmse']
    """
    started = time.perf_counter()
    data = dataset.for_training() if isinstance(dataset, Dataset) else dataset
    _check_numbers(epochs=(epochs, 1), batch_size=(batch_size, 1), patience=(patience, 0),
                   steps_per_call=(steps_per_call, 1), checkpoint_seconds=(checkpoint_seconds, 0))  # fmt: skip
    check_monitor(monitor, data.schema.tasks)
    batch_size = min(batch_size, data.train.num_rows)
    choices = _table_updates(model, data.schema, batch_size, table_updates)
    step, state = Step.of(
        model,
        data.schema.tasks,
        key=jax.random.key(seed),
        objective=objective,
        balancer=equal() if balancer is None else balancer,
        options=options,
        optimizer=as_optimizer(Optimizer() if optimizer is None else optimizer),
        table_updates=choices,
    )
    trivial = metrics.baselines.evaluate_baselines(data, data.valid, names=("global_mean",))["global_mean"]
    session = _Session(
        step=step,
        data=data,
        train=as_batch(data.train),
        valid=as_batch(data.valid),
        seed=seed,
        batch_size=batch_size,
        steps_per_call=steps_per_call,
        monitor=Monitor(monitor, tuple(data.schema.tasks), trivial),
        checkpoints=None if checkpoints is None else Checkpoints(checkpoints),
        checkpoint_seconds=checkpoint_seconds,
        observer=observer or Quiet(),
    )
    state, position = session.resume(state)
    steps_an_epoch = session.order(0).shape[0]
    session.observer.started(
        total_steps=epochs * steps_an_epoch, done_steps=position.epoch * steps_an_epoch + position.step
    )
    try:
        if not position.finished:
            session.compile(state, parallel)
        while not position.finished:
            state = session.run_epoch(state, position)
            session.close_epoch(state, position)
            out_of_patience = patience and position.stale >= patience
            position.finished = bool(out_of_patience or position.epoch >= epochs)
            session.save(state, position)
    finally:
        session.observer.finished()
    return session.result(state, position, choices, time.perf_counter() - started)


@dataclasses.dataclass
class _Session:
    """One run in one process: what does not change from epoch to epoch, and the compiled program."""

    step: Step
    data: TrainingData
    train: Mapping[str, Any]
    valid: Mapping[str, Any]
    seed: int
    batch_size: int
    steps_per_call: int
    monitor: Monitor
    checkpoints: Checkpoints | None
    checkpoint_seconds: float
    observer: Observer
    run: Callable[..., tuple[TrainState, Sums]] | None = None
    compile_seconds: float = 0.0
    saved: float = dataclasses.field(default_factory=time.perf_counter)
    best: tuple[Params, dict, dict] | None = None

    def order(self, epoch: int) -> np.ndarray:
        return epoch_order(self.data.train.num_rows, self.batch_size, seed=self.seed, epoch=epoch)

    def resume(self, state: TrainState) -> tuple[TrainState, Position]:
        """The newest checkpoint of this run, or the state as it is at the beginning."""
        found = self.checkpoints.latest(state) if self.checkpoints else None
        return (state, Position()) if found is None else (found[0], Position(**found[1]))

    def compile(self, state: TrainState, parallel: str) -> None:
        start = time.perf_counter()
        order = jax.device_put(np.zeros((self.steps_per_call, self.batch_size), np.int32))
        program = compile_step(run_steps(self.step), strategy=parallel)
        self.run = program.lower(state, self.train, order, jax.device_put(np.int32(0))).compile()
        self.compile_seconds = time.perf_counter() - start

    def run_epoch(self, state: TrainState, position: Position) -> TrainState:
        """The steps of one epoch, from wherever ``position`` stands in it."""
        order = self.order(position.epoch)
        while position.step < len(order):
            start = time.perf_counter()
            part = order[position.step : position.step + self.steps_per_call]
            padding = ((0, self.steps_per_call - len(part)), (0, 0))
            on_device = jax.device_put((np.pad(part, padding, constant_values=-1), np.int32(len(part))))
            state, sums = self.run(state, self.train, *on_device)
            sums, live = jax.device_get((sums, state.live))  # the only look at the device
            if not live:
                self._raise_nonfinite(sums, state, position)
            seconds = time.perf_counter() - start
            position.step += len(part)
            position.train_seconds += seconds
            position.examples += int((part >= 0).sum())
            position.add(sums)
            losses = dict(zip(self.data.schema.task_names, position.mean_losses(), strict=True))
            self.observer.advanced(
                steps=len(part), epoch=position.epoch + 1, losses=losses, examples_per_second=part.size / seconds
            )
            if position.step < len(order) and time.perf_counter() - self.saved >= self.checkpoint_seconds:
                self.save(state, position)
        return state

    def close_epoch(self, state: TrainState, position: Position) -> None:
        """Evaluates on validation, writes history, and remembers the best epoch."""
        functional = self.step.functional
        arrays = state.params | state.tables | state.rest
        outputs = predict(functional, arrays, self.valid)
        values, support = metrics.evaluate(self.data.schema.tasks, outputs, self.data.valid)
        value = self.monitor.value(values)
        score = self.monitor.score(value)
        at = int(jax.device_get(state.step))
        position.close_epoch(at, self.data.schema.task_names, values, self.monitor.name, value)
        best = position.best_step is None or score > self.monitor.score(position.best_value)
        position.stale = 0 if best else position.stale + 1
        if best:
            position.best_step, position.best_value = at, value
            copied = None if self.checkpoints else jax.tree.map(jnp.copy, arrays)
            self.best = (copied, values, support)
        shown = {f"{task.name} {task.metric}": values[task.name][task.metric] for task in self.data.schema.tasks}
        self.observer.evaluated(epoch=position.epoch, values=shown, monitor=value, best=best, history=position.history)

    def save(self, state: TrainState, position: Position) -> None:
        if self.checkpoints:
            at = int(jax.device_get(state.step))
            self.checkpoints.save(at, state, dataclasses.asdict(position), best=position.best_step)
        self.saved = time.perf_counter()

    def result(self, state: TrainState, position: Position, choices: dict[str, str], seconds: float) -> Result:
        """The model with the selected parameters, and everything that was measured."""
        functional = self.step.functional
        if self.checkpoints:
            chosen, _ = self.checkpoints.load(position.best_step, state)
            arrays = chosen.params | chosen.tables | chosen.rest
        else:
            arrays = self.best[0]
        if self.best is None:  # the run was finished before this process: evaluate the selection again
            outputs = predict(functional, arrays, self.valid)
            self.best = (None, *metrics.evaluate(self.data.schema.tasks, outputs, self.data.valid))
        _, values, support = self.best
        weighted = self.step.options.weighted_heads(self.step.balancer)
        return Result(
            model=functional.merge(arrays),
            metrics={"valid": values},
            support={"valid": support},
            history=position.history,
            monitor={"name": self.monitor.name, "value": position.best_value, "step": position.best_step},
            timing={
                "examples_per_second": position.examples / max(position.train_seconds, 1e-9),
                "compile_seconds": self.compile_seconds,
                "wall_seconds": seconds,
                "steps": int(jax.device_get(state.step)),
            },
            params=count_parameters({path: arrays[path] for path in functional.param_paths})
            | {"flops_per_example": flops_per_example(functional, arrays, self.valid)},
            diagnostics={
                "scope": self.step.options.scope,
                "head_gradient": "weighted" if weighted else "plain",
                "task_weights": position.last("weight"),
                "skipped_steps": position.skipped,
            },
            table_updates=choices,
        )

    def _raise_nonfinite(self, sums: Sums, state: TrainState, position: Position) -> None:
        at = int(jax.device_get(state.step)) + 1
        names = [n for n, bad in zip(self.data.schema.task_names, sums.nonfinite, strict=True) if bad]
        what = f"the loss of {names}" if names else "the gradient"
        good = self.checkpoints.steps() if self.checkpoints else []
        kept = (
            f"checkpoint of step {good[-1]} in '{self.checkpoints.path}'" if good else "no checkpoint was written yet"
        )
        raise TrainingError(
            f"{what} is not finite in step {at} (epoch {position.epoch + 1}); expected finite numbers. Last good state: "
            f"{kept}. Lower optimizer.learning_rate, set optimizer.clip_norm, or leave such steps out by "
            "objective.nonfinite=skip"
        )


def _table_updates(
    model: MultiTaskModel, schema: Schema, batch_size: int, override: str | Mapping[str, str]
) -> dict[str, str]:
    """How each table is updated, by its size and by the ids that one batch looks up in it."""
    lookups: dict[str, int] = {}
    for feature in model.features:
        length = getattr(feature, "max_len", 1)
        lookups[feature.vocabulary] = lookups.get(feature.vocabulary, 0) + batch_size * length
    return tables.choose({name: schema.vocabulary(name).size for name in lookups}, lookups, override)


def _check_numbers(**bounds: tuple[float, float]) -> None:
    for name, (value, least) in bounds.items():
        if not value >= least:
            raise ConfigError(f"trainer.{name} is {value}; expected a number >= {least}. Change it")
