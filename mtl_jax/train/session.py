"""Session: one run in one process, from wherever its checkpoints stand to its result."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax import metrics
from mtl_jax.errors import Interrupted, RunFolderError, TrainingError
from mtl_jax.model import MultiTaskModel
from mtl_jax.train.loop import run_steps
from mtl_jax.train.parallel import compile_step
from mtl_jax.train.predict import predict
from mtl_jax.train.result import Position, Result
from mtl_jax.train.setup import Member, Setup
from mtl_jax.train.state import Params, TrainState, shapes_of
from mtl_jax.train.step import Numbers, Step, Sums


@dataclasses.dataclass
class Session:
    """What does not change from epoch to epoch, and the compiled program of the stage under way.

    Attributes:
      setup: Data, options, and programs that other runs may have compiled.
      member: This run.
    """

    setup: Setup
    member: Member
    step: Step = dataclasses.field(init=False)
    program: Callable[..., tuple[TrainState, Sums]] = dataclasses.field(init=False)
    saved: float = dataclasses.field(default_factory=time.perf_counter)
    best: Params | None = None

    def __post_init__(self):
        self.stages, self.data, self.devices = self.setup.stages, self.setup.data, self.setup.devices
        self.model = self.member.initial()
        self.checkpoints = self.setup.checkpoints(self.member.checkpoints, self.member.seed)
        self.observer = self.member.observer

    def run(self) -> Result:
        """Trains through all stages."""
        started = time.perf_counter()
        state, position = self.resume()
        per_stage = self.setup.epochs * len(self.order(0))
        done = position.stage * per_stage + position.epoch * len(self.order(0)) + position.step
        self.observer.started(total_steps=per_stage * len(self.stages), done_steps=done)
        try:
            state = self.run_stage(state, position)
            while position.stage < len(self.stages) - 1:
                state = self.run_stage(self.begin_next(state, position), position)
        finally:
            self.observer.finished()
        return self.result(state, position, time.perf_counter() - started)

    def resume(self) -> tuple[TrainState, Position]:
        """The newest checkpoint of this run, or the state at the beginning."""

        def like(progress: Mapping[str, Any]) -> TrainState:
            if progress["stage"] >= len(self.stages):
                raise RunFolderError(
                    f"the checkpoints in '{self.checkpoints.path}' stand in stage {progress['stage'] + 1} of training; "
                    f"expected a run of {len(self.stages)}. Go back to training=staged, or start in a new run folder"
                )
            return self.enter(progress["stage"], self.model)

        found = self.checkpoints.latest(like) if self.checkpoints else None
        if found is None:
            state, position = self.enter(0, self.model, study=True), Position()
            return (state if self.member.adaptation is None else self.open(state, position)), position
        state, progress = found
        return state, Position(**progress)

    def open(self, state: TrainState, position: Position) -> TrainState:
        """What came from a source is the first candidate of the selection, and the only one where nothing is trained."""
        arrays = self.evaluated(state)
        values, _ = self.measure(arrays)
        position.open(0, values, self.stages[0].monitors[0])
        if self.member.adaptation.needs_source:
            state, _ = self.judge(state, position, arrays, values, 0)
            position.finished = not self.member.adaptation.trains
            self.save(state, position)
        return state

    def enter(self, number: int, model: MultiTaskModel, start: int = 0, *, study: bool = False) -> TrainState:
        """The state at the beginning of a stage, on the devices; ``study`` as for :meth:`Setup.build`."""
        stage = self.stages[number]
        self.step, state = self.setup.build(self.member, stage, model, start, study=study)
        if stage.by_task:
            state = state._replace(selected=state.params | state.tables)
        return self.devices.replicate(state)

    def begin_next(self, state: TrainState, position: Position) -> TrainState:
        """The next stage, from what the last one selected; that is also the first candidate of its selection."""
        chosen = self.selected(state, position)
        at = int(jax.device_get(state.step))
        position.next_stage()
        state = self.enter(position.stage, self.step.functional.merge(chosen), at, study=True)
        self.best = None
        arrays = self.evaluated(state)
        return self.judge(state, position, arrays, self.measure(arrays)[0], position.start_step)[0]

    def run_stage(self, state: TrainState, position: Position) -> TrainState:
        """The epochs of a stage, from wherever ``position`` stands in it."""
        if not position.finished:
            self.compile(state)
        while not position.finished:
            state = self.run_epoch(state, position)
            state = self.close_epoch(self.end_epoch(state), position)
            stopped = all(
                position.out_of_patience(m, self.setup.patience) for m in self.stages[position.stage].monitors
            )
            position.finished = stopped or position.epoch >= self.setup.epochs
            self.save(state, position)
        return state

    def compile(self, state: TrainState) -> None:
        """Finds or makes the program of the stage under way."""

        def lower() -> Any:
            order = self.devices.spread(
                np.zeros((self.setup.steps_per_call, self.setup.padded_size(self.member)), np.int32)
            )
            program = compile_step(run_steps(self.step), self.devices, rows=(2,))
            return program.lower(state, self.setup.train, order, self.devices.replicate(np.int32(0)), self.numbers())

        self.program = self.setup.program((self.step.program(), shapes_of(state)), lower)

    def numbers(self) -> Numbers:
        """The numeric hyperparameters, on the devices."""
        return self.devices.replicate(self.step.numbers())

    def order(self, epoch: int) -> np.ndarray:
        return self.setup.order(self.member, epoch)

    def run_epoch(self, state: TrainState, position: Position) -> TrainState:
        """The steps of one epoch, from wherever ``position`` stands in it."""
        order = self.order(position.stage * self.setup.epochs + position.epoch)
        steps_per_call, numbers = self.setup.steps_per_call, self.numbers()
        while position.step < len(order):
            start = time.perf_counter()
            part = order[position.step : position.step + steps_per_call]
            padding = ((0, steps_per_call - len(part)), (0, self.setup.padded_size(self.member) - part.shape[1]))
            rows = self.devices.spread(np.pad(part, padding, constant_values=-1))
            count = self.devices.replicate(np.int32(len(part)))
            state, sums = self.program(state, self.setup.train, rows, count, numbers)
            sums, live = jax.device_get((sums, state.live))  # the only look at the device
            if not live:
                self._raise_nonfinite(sums, state, position)
            seconds = time.perf_counter() - start
            position.step += len(part)
            position.train_seconds += seconds
            position.examples += int((part >= 0).sum())
            position.add(sums)
            losses, weights = (
                dict(zip(self.data.schema.task_names, values, strict=True))
                for values in (position.mean_losses(), position.mean_weights())
            )
            self.observer.advanced(
                steps=len(part),
                epoch=position.epoch + 1,
                losses=losses,
                weights=weights,
                examples_per_second=int((part >= 0).sum()) / seconds,
            )
            if position.step < len(order) and time.perf_counter() - self.saved >= self.setup.checkpoint_seconds:
                self.save(state, position)
            if self.setup.should_stop():
                self.save(state, position)
                raise Interrupted(f"stopped in epoch {position.epoch + 1} after {position.step} of {len(order)} steps")
        return state

    def close_epoch(self, state: TrainState, position: Position) -> TrainState:
        """Evaluates on validation, writes history, and remembers what is best."""
        arrays = self.evaluated(state)
        values, _ = self.measure(arrays)
        at = int(jax.device_get(state.step))
        monitor = self.stages[0].monitors[0]
        position.close_epoch(
            at, self.data.schema.task_names, values, monitor, weighted=not self.stages[position.stage].by_task
        )
        state, improved = self.judge(state, position, arrays, values, at)
        self.observer.evaluated(
            epoch=position.epoch,
            values={f"{task.name} {task.metric}": values[task.name][task.metric] for task in self.data.schema.tasks},
            monitor=monitor.value(values),
            best=improved,
            history=position.history,
        )
        if self.observer.wants_arrays:
            self.observer.parameters(at, arrays)
        return state

    def end_epoch(self, state: TrainState) -> TrainState:
        """Lets balancer and adaptation know; their numbers are those of the member."""
        ended = self.step.end_epoch(state)
        return jax.tree.map(lambda new, old: old if new is old else self.devices.replicate(new), ended, state)

    def judge(
        self, state: TrainState, position: Position, arrays: Params, values: Mapping[str, Any], at: int
    ) -> tuple[TrainState, bool]:
        """The state with what is best so far, and whether this evaluation, of step ``at``, is that for some monitor."""
        stage = self.stages[position.stage]
        patience = self.setup.patience_after(position.epoch, state)
        improved = [m for m in stage.monitors if position.judge(m, values, at, patience)]
        if improved and stage.by_task:
            chosen = {p: arrays[p] for p in state.selected if any(stage.selects(m, p) for m in improved)}
            state = state._replace(selected=state.selected | jax.tree.map(jnp.copy, chosen))
        elif improved and not self.checkpoints:  # which keep that of the best step
            self.best = jax.tree.map(jnp.copy, arrays)
        return state, bool(improved)

    def evaluated(self, state: TrainState) -> Params:
        return self.step.evaluated(state)

    def measure(self, arrays: Params) -> tuple[dict, dict]:
        """Metrics on validation, and what they were computed from."""
        outputs = predict(self.step.functional, arrays, self.setup.valid, self.devices)
        return metrics.evaluate(self.data.schema.tasks, outputs, self.data.valid)

    def selected(self, state: TrainState, position: Position) -> Params:
        """All arrays with the selected values."""
        if self.stages[position.stage].by_task:
            return self.evaluated(state) | state.selected
        if not self.checkpoints:
            return self.best
        step = self.step

        def like(progress: Mapping[str, Any]) -> TrainState:
            nonlocal step
            if progress["stage"] == position.stage:
                return state
            # What a stage began with, selected by the one before, may be better than all that came of it.
            step, template = self.setup.build(self.member, self.stages[progress["stage"]], self.model)
            return self.devices.replicate(template)

        found, _ = self.checkpoints.load(position.best_step, like)
        return step.evaluated(found)

    def save(self, state: TrainState, position: Position) -> None:
        if self.checkpoints:
            at = int(jax.device_get(state.step))
            by_task = self.stages[position.stage].by_task  # then the state itself holds what is selected
            best = None if by_task else position.best_step
            self.checkpoints.save(at, state, dataclasses.asdict(position), best=best)
            self.observer.saved(step=at)
        self.saved = time.perf_counter()

    def result(self, state: TrainState, position: Position, seconds: float) -> Result:
        """The model with the selected parameters, and everything that was measured."""
        functional, arrays = self.step.functional, self.selected(state, position)
        values, support = self.measure(arrays)
        if self.devices.number > 1:  # a model for one device
            arrays = jax.device_put(jax.device_get(arrays))
        return self.setup.result(
            self.member,
            functional,
            arrays,
            (values, support),
            position,
            steps=int(jax.device_get(state.step)),
            seconds=seconds,
            compiling=self.setup.claim_compile_seconds(),
            trainable=sum(array.size for array in (state.params | state.tables).values()),
        )

    def _raise_nonfinite(self, sums: Sums, state: TrainState, position: Position) -> None:
        at = int(jax.device_get(state.step)) + 1
        good = self.checkpoints.steps() if self.checkpoints else []
        kept = (
            f"checkpoint of step {good[-1]} in '{self.checkpoints.path}'" if good else "no checkpoint was written yet"
        )
        raise nonfinite(sums, self.data.schema.task_names, position.epoch + 1, at, kept)


def nonfinite(sums: Sums, tasks: Sequence[str], epoch: int, at: int, kept: str) -> TrainingError:
    """The error of a run whose loss or gradient was not finite in step ``at``."""
    names = [name for name, bad in zip(tasks, sums.nonfinite, strict=True) if bad]
    what = f"the loss of {names}" if names else "the gradient"
    return TrainingError(
        f"{what} is not finite in step {at} (epoch {epoch}); expected finite numbers. Last good state: {kept}. Lower "
        "optimizer.learning_rate, set optimizer.clip_norm, or leave such steps out by objective.nonfinite=skip"
    )
