"""fit: trains a model on a data set, from the first step to the selected parameters."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import optax

from mtl_jax import metrics
from mtl_jax.balancing import Balancer, equal
from mtl_jax.data.batching import as_batch
from mtl_jax.data.dataset import Dataset, TrainingData
from mtl_jax.data.schema import Schema
from mtl_jax.errors import ConfigError
from mtl_jax.model import MultiTaskModel
from mtl_jax.train import tables
from mtl_jax.train.checkpoint import Checkpoints
from mtl_jax.train.gradients import BalancingOptions
from mtl_jax.train.monitor import check_monitor
from mtl_jax.train.objective import Objective
from mtl_jax.train.optimizer import Optimizer, as_optimizer
from mtl_jax.train.parallel import Devices
from mtl_jax.train.progress import Observer, Quiet
from mtl_jax.train.result import Result
from mtl_jax.train.session import Session
from mtl_jax.train.stages import Stage, stages_of
from mtl_jax.train.state import TrainState
from mtl_jax.train.step import Step


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
    training: str = "joint",
    micro_batches: int = 1,
    precision: str = "float32",
    average: float | None = None,
    parallel: str = "jit",
    devices: int | None = None,
    checkpoints: str | Path | None = None,
    checkpoint_seconds: float = 60.0,
    observer: Observer | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Result:
    """Trains all tasks, evaluates on validation after every epoch, and selects the best epoch.

    The test part is never seen: a ``Dataset`` is reduced to its training and validation parts first.

    Args:
      model: Built from the data's schema. Its arrays are the initial values and stay as they are.
      dataset: What to train and select on.
      balancer: How tasks are weighed; ``equal()`` by default.
      optimizer: An :class:`Optimizer` or an optax transform; Adam with rate 1e-3 by default.
      seed: Of data order, dropout and draws. The model brings its own initialisation.
      epochs: Most epochs of a stage.
      batch_size: Rows a step.
      patience: Epochs without a better monitor before training stops; 0 never stops early.
      monitor: ``mean_gain``, or ``<task>/<metric>`` on validation.
      objective: Reduction of the losses.
      options: Scope and head gradient of the balancer.
      table_updates: ``auto``, ``dense``, ``sparse``, or a choice by vocabulary.
      steps_per_call: Steps between two looks at the device. Results do not depend on it.
      training: ``joint``; or ``staged``: joint training first, then tables and shared parameters stay as selected and each
        task's own parameters are trained on, stopped and selected by the task's own metric.
      micro_batches: Parts that each batch is computed in, one after the other, where memory is short. The step is the
        same but for the order of sums.
      precision: Of the network's arithmetic in training, ``float32`` or ``bfloat16``; parameters, tables, losses, Gramian,
        optimizer and evaluation stay in float32.
      average: Decay of a moving average of the parameters, which is then what is evaluated and selected. None: none.
      parallel: ``jit`` or ``pmap`` (see :class:`mtl_jax.train.parallel.Devices`).
      devices: How many of the visible devices share the rows of a step; None: all.
      checkpoints: Folder for checkpoints; a run that finds its own there goes on from the newest. None: no checkpoints.
      checkpoint_seconds: Longest time between two checkpoints inside an epoch; every epoch ends with one.
      observer: Is told about progress; see :class:`mtl_jax.train.progress.Bar`.
      should_stop: Is asked after every call to the device; True ends the run after a checkpoint.

    Raises:
      ConfigError: An option is out of range, or options do not fit together; raised before anything is compiled.
      TrainingError: A loss or gradient is not finite; names step, task and the last good checkpoint.
      Interrupted: ``should_stop`` said so.

    Example:
      >>> from flax import nnx
      >>> import mtl_jax
      >>> data = mtl_jax.data.load("synthetic", num_rows=600, dim=8)
      >>> model = mtl_jax.MultiTaskModel(data.schema, rngs=nnx.Rngs(0))
      >>> result = mtl_jax.train.fit(model, data, epochs=2, batch_size=128)
      >>> sorted(result.metrics["valid"]["y1"])
      ['mae', 'rmse']
    """
    data = dataset.for_training() if isinstance(dataset, Dataset) else dataset
    _check_numbers(epochs=(epochs, 1), batch_size=(batch_size, 1), patience=(patience, 0),
                   steps_per_call=(steps_per_call, 1), checkpoint_seconds=(checkpoint_seconds, 0),
                   micro_batches=(micro_batches, 1))  # fmt: skip
    check_monitor(monitor, data.schema.tasks)
    devices = Devices(parallel, devices)
    batch_size = min(batch_size, data.train.num_rows)
    if micro_batches > batch_size:
        raise ConfigError(
            f"trainer.micro_batches is {micro_batches} for batches of {batch_size} rows; expected at most one a row. "
            "Lower it"
        )
    choices = _table_updates(model, data.schema, batch_size, table_updates)
    optimizer = as_optimizer(Optimizer() if optimizer is None else optimizer)
    trivial = metrics.baselines.evaluate_baselines(data, data.valid, names=("global_mean",))["global_mean"]
    stages = stages_of(training, monitor, data.schema.tasks, trivial)

    balancer = equal() if balancer is None else balancer

    def build(stage: Stage, model: MultiTaskModel, start: int) -> tuple[Step, TrainState]:
        return Step.of(
            model,
            data.schema.tasks,
            key=jax.random.key(seed),
            objective=objective,
            balancer=equal() if stage.by_task else balancer,
            options=BalancingOptions() if stage.by_task else options,
            optimizer=optimizer,
            table_updates=choices,
            micro_batches=micro_batches,
            precision=precision,
            average=average,
            axis=devices.axis,
            trainable=stage.trainable,
            start=start,
        )

    weighted = options.weighted_heads(balancer)
    session = Session(
        build=build,
        stages=stages,
        model=model,
        data=data,
        train=devices.replicate(as_batch(data.train)),
        valid=devices.replicate(as_batch(data.valid)),
        seed=seed,
        epochs=epochs,
        batch_size=batch_size,
        padded_size=_padded(batch_size, devices.number * micro_batches),
        patience=patience,
        steps_per_call=min(steps_per_call, math.ceil(data.train.num_rows / batch_size)),
        devices=devices,
        checkpoints=None
        if checkpoints is None
        else Checkpoints(checkpoints, identity={"data": data.identity, "seed": str(seed)}),
        checkpoint_seconds=checkpoint_seconds,
        observer=observer or Quiet(),
        should_stop=should_stop,
        table_updates=choices,
        facts={"scope": options.scope, "head_gradient": "weighted" if weighted else "plain"},
    )
    return session.run()


def _padded(batch_size: int, parts: int) -> int:
    """Rows of a step that is computed in so many equal parts."""
    return math.ceil(batch_size / parts) * parts


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
