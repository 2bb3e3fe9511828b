"""Setup: what runs on the same data and with the same options have in common. Member: what is one run's own."""

import dataclasses
import math
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mtl_jax import metrics
from mtl_jax.balancing import Balancer, equal
from mtl_jax.data.batching import as_batch, episode_order, epoch_order, take
from mtl_jax.data.dataset import Dataset, Encoded, TrainingData, concatenated
from mtl_jax.data.schema import Schema
from mtl_jax.errors import ConfigError
from mtl_jax.model import MultiTaskModel
from mtl_jax.nn import stream
from mtl_jax.train import tables
from mtl_jax.train.adaptation import Adaptation, Origin
from mtl_jax.train.checkpoint import Checkpoints
from mtl_jax.train.checks import check_adaptation
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
from mtl_jax.train.step import Step

DEPLOYED, STUDIED = 2**31, 2**31 + 1
"""Numbers of the streams that batches for deployment and for a study are drawn from, which no epoch has."""
VISITS = 2
"""Number of the streams of epochs that pass through some rows after others."""


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

    def initial(self) -> MultiTaskModel:
        """The model that training begins with: with what the adaptation adds to it."""
        model = self.model()
        if self.adaptation is None:
            return model
        return self.adaptation.simplified().prepared(model, stream(jax.random.key(self.seed), "transfer/modules"))


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
      source_domain: Their domains, where there are any.
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
    source_domain: np.ndarray | None = None
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
            adaptation = _for_domains(adaptation.simplified(), data)
            _check_source(adaptation, source, training)
            if adaptation.needs_rows:
                weight = adaptation.source_row_weight
                train, num_source = concatenated(train, source, 1.0 if weight is None else weight), source.num_rows
        pooled = adaptation is not None and adaptation.source_row_weight is not None
        num_trained = data.train.num_rows + (num_source if pooled else 0)
        batch_size = min(batch_size, num_trained)
        if adaptation is not None and adaptation.episodes:
            batch_size = max(1, batch_size // math.prod(adaptation.episodes))
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
            source_domain=None if source is None else source.domain,
            num_trained=num_trained,
        )

    @property
    def num_batches(self) -> int:
        """Batches of a step: of the target, and of the source beside it; or of several domains."""
        if self.adaptation is None:
            return 1
        return math.prod(self.adaptation.episodes) if self.adaptation.episodes else 1 + self.adaptation.batches_beside

    def padded_size(self, member: Member) -> int:
        """Rows of a step with its padding, which devices, micro-batches and the batches of a balancer divide."""
        balancer = member.balancer
        parts = self.devices.number * self.micro_batches * balancer.num_batches * balancer.num_parts
        return math.ceil(self.batch_size / parts) * parts * self.num_batches

    def order(self, member: Member, epoch: int) -> np.ndarray:
        """Row numbers int32[steps, rows] of an epoch; -1 pads. With batches of the source, all take turns row by row.

        A function of the member's seed and the epoch alone, as :func:`mtl_jax.data.batching.epoch_order` is.
        """
        if self.adaptation is not None and self.adaptation.episodes:
            return self._episodes(member, epoch)
        draw = np.random.Generator(np.random.PCG64([member.order_seed, epoch, VISITS]))
        visits = self.adaptation and self.adaptation.visits(self.data.train.domain, self.source_domain, draw)
        if visits is not None:
            return self._visited(visits, draw)
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

    def _visited(self, visits: Sequence[np.ndarray], draw: np.random.Generator) -> np.ndarray:
        """Batches of one set of rows after the other, each as often as an epoch's least steps take."""
        steps = [math.ceil(len(rows) / self.batch_size) for rows in visits]
        passes = math.ceil((self.epoch_steps or 1) / sum(steps))
        order = [
            np.pad(draw.permutation(rows), (0, number * self.batch_size - len(rows)), constant_values=-1)
            for rows, number in zip(visits, steps, strict=True)
            for _ in range(passes)
        ]
        return np.concatenate(order).astype(np.int32).reshape(-1, self.batch_size)

    def _episodes(self, member: Member, epoch: int) -> np.ndarray:
        num_domains, blocks = self.adaptation.episodes
        steps = max(self.epoch_steps or 1, math.ceil(self.num_trained / (num_domains * blocks * self.batch_size)))
        order = episode_order(
            self.data.train.domain,
            steps=steps,
            num_domains=num_domains,
            blocks=blocks,
            block_size=self.batch_size,
            seed=member.order_seed,
            first=epoch * steps,
        )
        return order.reshape(steps, -1, self.batch_size).swapaxes(1, 2).reshape(steps, -1)

    def build(
        self, member: Member, stage: Stage, model: MultiTaskModel, start: int = 0, *, study: bool = False
    ) -> tuple[Step, TrainState]:
        """The step of a stage, and the state before it, from the values of ``model`` after ``start`` steps.

        ``study`` says whether the stage begins: training rows are then looked at where its adaptation asks for it. A state
        that only is a template has zeros in that place.
        """
        model.link.check_labels(self.data.train.labels, self.data.train.mask)
        number, adaptation = self.stages.index(stage), member.adaptation
        if adaptation is not None:
            adaptation = _for_domains(adaptation.in_phase(number), self.data)
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
            adaptation=adaptation,
            origin=member.origin,
            batches=self._deployment(member),
        )
        if member.adaptation is not None:  # in the first stage for all: a later one must not fail after it
            check_adaptation(self.adaptation, step.functional)
        self.patience_after(0, state)  # refuses too few epochs before anything is compiled
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

    def patience_after(self, epoch: int, state: TrainState) -> int:
        """``patience`` as an evaluation after so many epochs of a stage sees it: 0 while the adaptation still adds to what
        is trained.

        Raises:
          ConfigError: The adaptation needs more epochs than there are.
        """
        if self.adaptation is None:
            return self.patience
        first = self.adaptation.patient_from(state.params | state.tables, self.epochs)
        return self.patience if epoch >= first else 0

    def _deployment(self, member: Member) -> Any:
        """Batches that the model is deployed with, the same in every epoch."""
        if self.adaptation is None or (number := self.adaptation.source_batches) == 0:
            return None
        own = self.data.train.num_rows
        first, num_rows = (0, own) if self.adaptation.reads_target else (own, self.num_source)
        size = min(self.batch_size, num_rows)
        rows = np.random.Generator(np.random.PCG64([member.order_seed, DEPLOYED])).permutation(num_rows)
        rows = np.resize(rows, number * size).reshape(number, size) + first
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
        functional: Functional,
        arrays: Params,
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
          functional: Of its model.
          arrays: As they were selected (see :meth:`mtl_jax.train.Step.evaluated`).
          measured: Metrics of the model on validation and what they were computed from.
          position: Where the run stands.
          steps: Updates of the whole run.
          seconds: It took.
          compiling: Seconds of compilation that it bears.
          trainable: Parameters that were trained in the last stage.
        """
        values, support = measured
        own, model = functional.own(arrays), functional.merge(arrays)
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
            aux={path: array for path, array in arrays.items() if path not in own},
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


def _for_domains(adaptation: Adaptation, data: TrainingData) -> Adaptation:
    """The adaptation for the domains of the training rows, where it tells them apart."""
    if not adaptation.by_domain:
        return adaptation
    number = 0 if data.train.domain is None else len(np.unique(data.train.domain))
    if number < 2:
        raise ConfigError(
            f"transfer '{type(adaptation).__name__}' learns from several domains and the training rows have {number}; "
            "expected two at least. Name more (target=[...]; source=[...] where it is pretraining), or choose other data"
        )
    return adaptation.for_domains(number)


def _check_numbers(**bounds: tuple[float, float]) -> None:
    for name, (value, least) in bounds.items():
        if not value >= least:
            raise ConfigError(f"trainer.{name} is {value}; expected a number >= {least}. Change it")
