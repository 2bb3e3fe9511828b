"""Setup: what runs on the same data and with the same options have in common. Member: what is one run's own."""

import dataclasses
import math
import time
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mtl_jax import metrics
from mtl_jax.balancing import Balancer, equal
from mtl_jax.data.batching import as_batch, epoch_order, take
from mtl_jax.data.dataset import Dataset, Encoded, TrainingData, concatenated
from mtl_jax.data.schema import Schema
from mtl_jax.errors import ConfigError
from mtl_jax.model import MultiTaskModel
from mtl_jax.train import tables
from mtl_jax.train.adaptation import Adaptation, Origin
from mtl_jax.train.checkpoint import Checkpoints
from mtl_jax.train.gradients import BalancingOptions
from mtl_jax.train.monitor import check_monitor
from mtl_jax.train.objective import Objective, label_weights
from mtl_jax.train.optimizer import Optimizer, as_optimizer
from mtl_jax.train.parallel import Devices
from mtl_jax.train.predict import flops_per_example
from mtl_jax.train.progress import Observer, Quiet
from mtl_jax.train.result import Position, Result
from mtl_jax.train.stages import Stage, stages_of
from mtl_jax.train.state import Functional, Params, TrainState, count_parameters, shapes_of
from mtl_jax.train.step import Step, check_adaptation

DEPLOYED, STUDIED = 2**31, 2**31 + 1
"""Numbers of the streams that batches for deployment and for a study are drawn from, which no epoch has."""


@dataclasses.dataclass
class Member:
    """One run among several that share a :class:`Setup`.

    Attributes:
      model: Makes the model with its initial values; called when the run begins.
      seed: Of data order, dropout and draws.
      balancer: How tasks are weighed; ``equal()`` by default.
      optimizer: As for :func:`mtl_jax.train.fit`.
      order_seed: Of the data order alone; None: ``seed``. With one for all members, all see the same batches.
      name: Of the run; tells it from others with its seed.
      adaptation: What it owes to a source; None: nothing.
      origin: What of the model's values came from the source.
      checkpoints: Folder for checkpoints of this run; runs that are trained together have a common one instead.
      observer: Is told about its progress.
    """

    model: Callable[[], MultiTaskModel]
    seed: int = 0
    balancer: Balancer | None = None
    optimizer: Optimizer | optax.GradientTransformation | None = None
    order_seed: int | None = None
    name: str = ""
    adaptation: Adaptation | None = None
    origin: Origin | None = None
    checkpoints: str | Path | None = None
    observer: Observer | None = None

    def __post_init__(self):
        self.balancer = equal() if self.balancer is None else self.balancer
        self.optimizer = as_optimizer(Optimizer() if self.optimizer is None else self.optimizer)
        self.order_seed = self.seed if self.order_seed is None else self.order_seed
        self.observer = self.observer or Quiet()


@dataclasses.dataclass
class Setup:
    """Data on the devices, options, and the programs that were compiled so far.

    Attributes:
      data: Training and validation parts.
      train: The training part on the devices, followed by rows of the source where the adaptation reads any.
      valid: The validation part on the devices.
      stages: Of training, in their order.
      objective: Reduction of the losses.
      options: Scope and head gradient of the balancers.
      epochs: Most epochs of a stage.
      batch_size: Rows of a step.
      patience: Evaluations without a better monitor before a stage ends; 0: never.
      steps_per_call: Steps between two looks at the device.
      micro_batches: Parts of a step.
      precision: Of the network's arithmetic.
      average: Decay of the moving average; None: none.
      devices: Where.
      checkpoint_seconds: Longest time between two checkpoints inside an epoch.
      table_updates: ``auto``, ``dense``, ``sparse``, or a choice by vocabulary.
      should_stop: Is asked after every call to the device.
      epoch_steps: Least steps of an epoch, which passes over the rows several times for it.
      adaptation: Of the members, but for their numbers.
      num_source: Rows of the source.
      num_trained: Rows that an epoch passes over, those of a pooled source among them.
      programs: Compiled programs by what they were compiled for.
      compile_seconds: What they took, as far as no result has reported it.
    """

    data: TrainingData
    train: Mapping[str, Any]
    valid: Mapping[str, Any]
    stages: tuple[Stage, ...]
    objective: Objective
    options: BalancingOptions
    epochs: int
    batch_size: int
    patience: int
    steps_per_call: int
    micro_batches: int
    precision: str
    average: float | None
    devices: Devices
    checkpoint_seconds: float
    table_updates: str | Mapping[str, str]
    should_stop: Callable[[], bool]
    epoch_steps: int | None = None
    adaptation: Adaptation | None = None
    num_source: int = 0
    num_trained: int = 0
    programs: dict[Hashable, Any] = dataclasses.field(default_factory=dict)
    compile_seconds: float = 0.0

    @classmethod
    def of(
        cls,
        dataset: Dataset | TrainingData,
        *,
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
        checkpoint_seconds: float = 60.0,
        should_stop: Callable[[], bool] = lambda: False,
        epoch_steps: int | None = None,
        adaptation: Adaptation | None = None,
        source: Encoded | None = None,
    ) -> "Setup":
        """Checks the options and puts the data on the devices. All arguments are those of :func:`mtl_jax.train.fit`."""
        data = dataset.for_training() if isinstance(dataset, Dataset) else dataset
        _check_numbers(epochs=(epochs, 1), batch_size=(batch_size, 1), patience=(patience, 0),
                       steps_per_call=(steps_per_call, 1), checkpoint_seconds=(checkpoint_seconds, 0),
                       micro_batches=(micro_batches, 1))  # fmt: skip
        check_monitor(monitor, data.schema.tasks)
        where = Devices(parallel, devices)
        train, num_source = data.train, 0
        if adaptation is not None:
            adaptation = adaptation.simplified()
            _check_source(adaptation, source, training)
            if adaptation.needs_rows:
                weight = adaptation.source_row_weight
                train, num_source = concatenated(train, source, 1.0 if weight is None else weight), source.num_rows
        pooled = adaptation is not None and adaptation.source_row_weight is not None
        num_trained = data.train.num_rows + (num_source if pooled else 0)
        batch_size = min(batch_size, num_trained)
        if micro_batches > batch_size:
            raise ConfigError(
                f"trainer.micro_batches is {micro_batches} for batches of {batch_size} rows; expected at most one a row. "
                "Lower it"
            )
        trivial = metrics.baselines.evaluate_baselines(data, data.valid, names=("global_mean",))["global_mean"]
        return cls(
            data=data,
            train=where.replicate(as_batch(train)),
            valid=where.replicate(as_batch(data.valid)),
            stages=stages_of(training, monitor, data.schema.tasks, trivial, adaptation),
            objective=objective,
            options=options,
            epochs=epochs,
            batch_size=batch_size,
            patience=patience,
            steps_per_call=min(steps_per_call, max(epoch_steps or 1, math.ceil(num_trained / batch_size))),
            micro_batches=micro_batches,
            precision=precision,
            average=average,
            devices=where,
            checkpoint_seconds=checkpoint_seconds,
            table_updates=table_updates,
            should_stop=should_stop,
            epoch_steps=epoch_steps,
            adaptation=adaptation,
            num_source=num_source,
            num_trained=num_trained,
        )

    @property
    def num_batches(self) -> int:
        """Batches of a step: of the target, and of the source beside it."""
        return 1 + (self.adaptation.batches_beside if self.adaptation is not None else 0)

    def padded_size(self, member: Member) -> int:
        """Rows of a step with its padding, which devices, micro-batches and the batches of a balancer divide."""
        balancer = member.balancer
        parts = self.devices.number * self.micro_batches * balancer.num_batches * balancer.num_parts
        return math.ceil(self.batch_size / parts) * parts * self.num_batches

    def order(self, member: Member, epoch: int) -> np.ndarray:
        """Row numbers int32[steps, rows] of an epoch; -1 pads. With batches of the source, all take turns row by row.

        A function of the member's seed and the epoch alone, as :func:`mtl_jax.data.batching.epoch_order` is.
        """
        beside = self.num_batches - 1
        passes = math.ceil((self.epoch_steps or 1) / math.ceil(self.num_trained / self.batch_size))

        def passed(rows: int, first: int, number: int) -> np.ndarray:
            orders = [
                epoch_order(rows, self.batch_size, seed=member.order_seed, epoch=first + n) for n in range(number)
            ]
            return np.concatenate(orders)

        order = passed(self.num_trained, epoch * passes, passes)
        if not beside:
            return order
        needed = len(order) * beside
        each = math.ceil(self.num_source / self.batch_size)
        first = epoch * needed // each
        source = passed(self.num_source, first, math.ceil(needed / each) + 1)
        skipped = epoch * needed - first * each
        source = source[skipped : skipped + needed].reshape(len(order), beside, -1)
        source = np.where(source < 0, -1, source + self.data.train.num_rows)
        return np.concatenate([order[:, None], source], axis=1).transpose(0, 2, 1).reshape(len(order), -1)

    def build(
        self, member: Member, stage: Stage, model: MultiTaskModel, start: int = 0, *, study: bool = False
    ) -> tuple[Step, TrainState]:
        """The step of a stage, and the state before it, from the values of ``model`` after ``start`` steps.

        ``study`` says whether the stage begins: training rows are then looked at where its adaptation asks for it. A state
        that only is a template has zeros in that place.
        """
        model.link.check_labels(self.data.train.labels, self.data.train.mask)
        number = self.stages.index(stage)
        step, state = Step.of(
            model,
            self.data.schema.tasks,
            key=jax.random.key(member.seed),
            objective=self.objective,
            balancer=equal() if stage.by_task else member.balancer,
            options=BalancingOptions() if stage.by_task else self.options,
            optimizer=member.optimizer,
            table_updates=self.choose_tables(model),
            micro_batches=self.micro_batches,
            precision=self.precision,
            average=self.average,
            axis=self.devices.axis,
            trainable=stage.trainable,
            start=start,
            adaptation=None if member.adaptation is None else member.adaptation.in_phase(number),
            origin=member.origin,
            batches=self._deployment(member),
        )
        if member.adaptation is not None:  # in the first stage for all: a later one must not fail after it
            check_adaptation(member.adaptation.simplified(), step.functional, self.devices.axis)
        state = step.started(state) if start == number == 0 else state
        if step.adaptation is None or not step.adaptation.studies:
            return step, state
        found = self._studied(member, step, state, study)
        return step, state._replace(kept=state.kept._replace(arrays=state.kept.arrays | found))

    def _studied(self, member: Member, step: Step, state: TrainState, study: bool) -> dict[str, Params]:
        """What the adaptation of a stage learns of training rows; or zeros of its shape."""
        train, size = self.data.train, self.padded_size(member)
        order = epoch_order(train.num_rows, self.batch_size, seed=member.order_seed, epoch=STUDIED)
        order = order[: int(min(step.adaptation.studies, len(order)))]
        order = np.pad(order, ((0, 0), (0, size - order.shape[1])), constant_values=-1)

        def look(numbers, state, data, order):
            return step.with_numbers(numbers).study(state, data, order)

        if not study:
            shapes = jax.eval_shape(look, step.numbers(), state, self.train, order)
            return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        tasks = step.tasks
        counted = {task.name: np.asarray(label_weights(task, self.train) > 0)[: train.num_rows] for task in tasks}
        step.adaptation.check_labels(tasks, train.labels, counted)
        read = state._replace(opt=(), row_opt={}, slots={}, balancer=(), average={})
        arguments = *self.devices.replicate((step.numbers(), read)), self.train, self.devices.replicate(order)
        key = ("study", step.program(), shapes_of(arguments[1]))
        return self.program(key, lambda: jax.jit(look).lower(*arguments))(*arguments)

    def _deployment(self, member: Member) -> Any:
        """Batches of the source that the model is deployed with, the same in every epoch."""
        if self.adaptation is None or (number := self.adaptation.source_batches) == 0:
            return None
        size = min(self.batch_size, self.num_source)
        rows = np.random.Generator(np.random.PCG64([member.order_seed, DEPLOYED])).permutation(self.num_source)
        rows = np.resize(rows, number * size).reshape(number, size) + self.data.train.num_rows
        return jax.vmap(lambda rows: take(self.train, rows))(jnp.asarray(rows, jnp.int32))

    def program(self, key: Hashable, lower: Callable[[], Any]) -> Any:
        """The compiled program of a key; ``lower`` makes what there is to compile where there is none yet."""
        if key not in self.programs:
            start = time.perf_counter()
            self.programs[key] = lower().compile()
            self.compile_seconds += time.perf_counter() - start
        return self.programs[key]

    def claim_compile_seconds(self) -> float:
        """Time of compilation since the last result: the first member of many bears what all of them use."""
        seconds, self.compile_seconds = self.compile_seconds, 0.0
        return seconds

    def choose_tables(self, model: MultiTaskModel) -> dict[str, str]:
        """Vocabulary -> how its tables are updated, by its size and by the ids that one batch looks up in it."""
        return _table_updates(model, self.data.schema, self.batch_size * self.num_batches, self.table_updates)

    def checkpoints(self, path: str | Path | None, seed: Any) -> Checkpoints | None:
        """The checkpoints in a folder, which tell other data and seeds from these."""
        return None if path is None else Checkpoints(path, identity={"data": self.data.identity, "seed": str(seed)})

    def result(
        self,
        member: Member,
        model: MultiTaskModel,
        measured: tuple[dict[str, Any], dict[str, Any]],
        position: Position,
        *,
        steps: int,
        seconds: float,
        compiling: float,
        trainable: int,
    ) -> Result:
        """What a member ends in.

        Args:
          member: The run.
          model: With the selected parameters.
          measured: Its metrics on validation and what they were computed from.
          position: Where the run stands.
          steps: Updates of the whole run.
          seconds: It took.
          compiling: Seconds of compilation that it bears.
          trainable: Parameters that were trained in the last stage.
        """
        values, support = measured
        functional, params, rest = Functional.of(model)
        weighted = self.options.weighted_heads(member.balancer)
        return Result(
            model=model,
            metrics={"valid": values},
            support={"valid": support},
            history=position.history,
            monitor=position.selection(self.stages[0].monitors[0], values, by_task=self.stages[position.stage].by_task),
            timing={
                "examples_per_second": position.examples / max(position.train_seconds, 1e-9),
                "compile_seconds": compiling,
                "wall_seconds": seconds,
                "steps": steps,
            },
            params=count_parameters(params)
            | {"flops_per_example": flops_per_example(functional, params | rest, self.valid)}
            | ({} if member.adaptation is None else {"trainable": trainable * member.adaptation.trains}),
            diagnostics={
                "scope": self.options.scope,
                "head_gradient": "weighted" if weighted else "plain",
                "task_weights": position.last("weight"),
                "skipped_steps": position.skipped,
            },
            table_updates=self.choose_tables(model),
        )


def _table_updates(
    model: MultiTaskModel, schema: Schema, batch_size: int, override: str | Mapping[str, str]
) -> dict[str, str]:
    lookups: dict[str, int] = {}
    for feature in model.features:
        length = getattr(feature, "max_len", 1)
        lookups[feature.vocabulary] = lookups.get(feature.vocabulary, 0) + batch_size * length
    return tables.choose({name: schema.vocabulary(name).size for name in lookups}, lookups, override)


def _check_source(adaptation: Adaptation, source: Encoded | None, training: str) -> None:
    name = type(adaptation).__name__
    if adaptation.needs_rows and source is None:
        raise ConfigError(
            f"transfer '{name}' trains on rows of the source and there are none; expected some. Give source="
        )
    if training != "joint":
        raise ConfigError(f"transfer '{name}' with training={training}; expected joint, since it has stages of its own")


def _check_numbers(**bounds: tuple[float, float]) -> None:
    for name, (value, least) in bounds.items():
        if not value >= least:
            raise ConfigError(f"trainer.{name} is {value}; expected a number >= {least}. Change it")
