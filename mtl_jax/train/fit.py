"""fit: trains a model on a data set, from the first step to the selected parameters."""

from collections.abc import Callable, Mapping
from pathlib import Path

import optax

from mtl_jax.balancing import Balancer
from mtl_jax.data.dataset import Dataset, Encoded, TrainingData
from mtl_jax.model import MultiTaskModel
from mtl_jax.train.adaptation import Adaptation, Origin
from mtl_jax.train.gradients import BalancingOptions
from mtl_jax.train.objective import Objective
from mtl_jax.train.optimizer import Optimizer
from mtl_jax.train.progress import Observer
from mtl_jax.train.result import Result
from mtl_jax.train.session import Session
from mtl_jax.train.setup import Member, Setup


def fit(
    model: MultiTaskModel,
    dataset: Dataset | TrainingData,
    *,
    balancer: Balancer | None = None,
    optimizer: Optimizer | optax.GradientTransformation | None = None,
    seed: int = 0,
    order_seed: int | None = None,
    epochs: int = 10,
    batch_size: int = 4096,
    patience: int = 2,
    monitor: str = "mean_gain",
    objective: Objective = Objective(),
    options: BalancingOptions = BalancingOptions(),
    table_updates: str | Mapping[str, str] = "auto",
    steps_per_call: int = 32,
    epoch_steps: int | None = None,
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
    adaptation: Adaptation | None = None,
    origin: Origin | None = None,
    source: Encoded | None = None,
) -> Result:
    """Trains all tasks, evaluates on validation after every epoch, and selects the best epoch.

    The test part is never seen: a ``Dataset`` is reduced to its training and validation parts first.

    Args:
      model: Built from the data's schema. Its arrays are the initial values and stay as they are.
      dataset: What to train and select on.
      balancer: How tasks are weighed; ``equal()`` by default.
      optimizer: An :class:`Optimizer` or an optax transform; Adam with rate 1e-3 by default.
      seed: Of data order, dropout and draws. The model brings its own initialisation.
      order_seed: Of the data order alone; None: ``seed``.
      epochs: Most epochs of a stage.
      batch_size: Rows a step.
      patience: Epochs without a better monitor before training stops; 0 never stops early.
      monitor: ``mean_gain``, or ``<task>/<metric>`` on validation.
      objective: Reduction of the losses.
      options: Scope and head gradient of the balancer.
      table_updates: ``auto``, ``dense``, ``sparse``, or a choice by vocabulary.
      steps_per_call: Steps between two looks at the device. Results do not depend on it.
      epoch_steps: Least steps from one evaluation to the next: small data are passed over several times. None: one pass.
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
      adaptation: What training owes to a source, one of :mod:`mtl_jax.transfer`; the model then has the values that were
        loaded from there, which are the first candidate of the selection. None: nothing.
      origin: What of these came from the source (:attr:`mtl_jax.transfer.Loading.origin`).
      source: Rows of the source, encoded by the schema of ``dataset``, for an adaptation that reads any.

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
    setup = Setup.of(
        dataset,
        epochs=epochs,
        batch_size=batch_size,
        patience=patience,
        monitor=monitor,
        objective=objective,
        options=options,
        table_updates=table_updates,
        steps_per_call=steps_per_call,
        epoch_steps=epoch_steps,
        training=training,
        micro_batches=micro_batches,
        precision=precision,
        average=average,
        parallel=parallel,
        devices=devices,
        checkpoint_seconds=checkpoint_seconds,
        should_stop=should_stop,
        adaptation=adaptation,
        source=source,
    )
    member = Member(
        lambda: model,
        seed=seed,
        balancer=balancer,
        optimizer=optimizer,
        order_seed=order_seed,
        adaptation=adaptation,
        origin=origin,
        checkpoints=checkpoints,
        observer=observer,
    )
    return Session(setup, member).run()
