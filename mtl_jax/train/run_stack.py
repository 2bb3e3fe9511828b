"""RunStack: the members of a chunk, trained together along a leading run axis."""

import dataclasses
import hashlib
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from mtl_jax import metrics
from mtl_jax.errors import ConfigError, Interrupted, TrainingError
from mtl_jax.train.loop import run_steps
from mtl_jax.train.predict import predict_stack
from mtl_jax.train.result import Position, Result
from mtl_jax.train.session import nonfinite
from mtl_jax.train.setup import Member, Setup
from mtl_jax.train.stages import Stage
from mtl_jax.train.state import Params, TrainState, shapes_of
from mtl_jax.train.step import Numbers, Step, Sums

AXIS = "run"


@dataclasses.dataclass
class Clock:
    """Where the stack stands: its members move in step, and those that have ended wait.

    Attributes:
      stage: Number of the stage of training.
      epoch: Finished epochs of the stage.
      step: Finished steps of the epoch under way.
      calls: Finished calls to the device, which number the checkpoints.
    """

    stage: int = 0
    epoch: int = 0
    step: int = 0
    calls: int = 0


class RunStack:
    """One chunk of members on the run axis.

    A member that has ended stays in the arrays with ``live`` False: its updates are masked, nothing of a table's size is
    copied for it. What each member selects is kept beside the state, as its evaluated arrays at its best epoch.

    Args:
      setup: What the members share.
      members: At least one; they differ in numbers only.
      size: Places on the run axis, at least as many as members; the others hold a copy that does not run. A multiple of
        the devices, which share the places.
      checkpoints: Folder for the checkpoints of stacks, each in a folder of its own; None: none.
    """

    def __init__(
        self, setup: Setup, members: Sequence[Member], *, size: int | None = None, checkpoints: str | Path | None = None
    ) -> None:
        self.setup = setup
        self.members = tuple(members)
        self.size = setup.devices.multiple(size or len(self.members))
        self.stages, self.data = setup.stages, setup.data
        self.models = [member.initial() for member in self.members]
        self.shared_order = len({member.order_seed for member in self.members}) == 1
        names = repr([(m.name, m.seed, m.order_seed) for m in self.members])
        identity = hashlib.sha256(names.encode()).hexdigest()[:16]
        self.checkpoints = setup.checkpoints(checkpoints and Path(checkpoints) / identity, identity)
        self.saved = time.perf_counter()
        self.errors: dict[int, TrainingError] = {}

    def run(self) -> list[Result | TrainingError]:
        """Trains all members through all stages; in their order, a result or what ended the member."""
        started = time.perf_counter()
        state, best, positions, clock = self.resume()
        per_stage = self.setup.epochs * len(self.order(0, 0))
        for member, position in zip(self.members, positions, strict=True):
            done = position.stage * per_stage + position.epoch * len(self.order(0, 0)) + position.step
            member.observer.started(total_steps=per_stage * len(self.stages), done_steps=done)
        try:
            state, best = self.run_stage(state, best, positions, clock)
            while clock.stage < len(self.stages) - 1:
                state, best = self.begin_next(state, best, positions, clock)
                state, best = self.run_stage(state, best, positions, clock)
        finally:
            for member in self.members:
                member.observer.finished()
        seconds = (time.perf_counter() - started) / len(self.members)
        compiling = self.setup.claim_compile_seconds() / len(self.members)
        arrays = self.evaluated(state) | best
        values = self.measure(arrays, range(len(self.members)))
        return [
            self.errors.get(number) or self.result(number, arrays, values[number], state, position, seconds, compiling)
            for number, position in enumerate(positions)
        ]

    def resume(self) -> tuple[TrainState, Params, list[Position], Clock]:
        """The newest checkpoint of this stack, or the state at the beginning."""

        def like(progress: Mapping[str, Any]) -> Any:
            state = self.enter(progress["clock"]["stage"])
            return {"state": state, "best": self.evaluated(state)}

        found = self.checkpoints.latest(like) if self.checkpoints else None
        if found is None:
            state, positions = self.enter(0, study=True), [Position() for _ in self.members]
            arrays = self.evaluated(state)
            if self.setup.adaptation is not None:
                self.open(state, arrays, positions)
            return state, jax.tree.map(jnp.copy, arrays), positions, Clock()
        kept, progress = found
        self.errors = {int(number): TrainingError(text) for number, text in progress["errors"].items()}
        positions = [Position(**position) for position in progress["positions"]]
        return kept["state"], kept["best"], positions, Clock(**progress["clock"])

    def open(self, state: TrainState, arrays: Params, positions: list[Position]) -> None:
        """What came from a source is the first candidate of each member's selection."""
        monitor = self.stages[0].monitors[0]
        for number, (values, _) in self.measure(arrays, range(len(self.members))).items():
            positions[number].open(0, values, monitor)
            if self.setup.adaptation.needs_source:
                self.judge(positions[number], values, 0, state)

    def enter(
        self,
        number: int,
        models: Sequence[Any] | None = None,
        starts: Sequence[int] | None = None,
        *,
        study: bool = False,
    ) -> TrainState:
        """The stacked state at the beginning of a stage; ``study`` as for :meth:`Setup.build`.

        Raises:
          ConfigError: The members differ in more than numbers.
        """
        stage = self.stages[number]
        models, starts = models or self.models, starts or [0] * len(self.members)
        built = [
            self.setup.build(member, stage, model, start, study=study)
            for member, model, start in zip(self.members, models, starts, strict=True)
        ]
        steps, states = zip(*built, strict=True)
        for place, (step, state) in enumerate(zip(steps, states, strict=True)):
            if step.program() != steps[0].program() or shapes_of(state) != shapes_of(states[0]):
                raise ConfigError(
                    f"run {place} differs from run 0 in more than numbers; expected the same model, balancer and optimizer "
                    "but for rates, weights and constants above 0 (and one optax transform object for all), which share a "
                    "program. Train them apart"
                )
        self.step: Step = steps[0]
        deploy = jax.vmap(lambda numbers, state: steps[0].with_numbers(numbers).evaluated(state))
        adapts = self.setup.adaptation is not None and self.setup.adaptation.adapts
        self.deploy: Callable[[Numbers, TrainState], Params] = jax.jit(deploy) if adapts else deploy
        self.numbers: Numbers = self.place(stack_trees([step.numbers() for step in steps], self.size))
        return self.place(stack_trees(list(states), self.size))

    def begin_next(
        self, state: TrainState, best: Params, positions: list[Position], clock: Clock
    ) -> tuple[TrainState, Params]:
        """The next stage, each member from what it selected."""
        chosen = self.evaluated(state) | best
        models = [self.step.functional.merge(_of_member(chosen, number)) for number in range(len(self.members))]
        starts = [int(step) for step in jax.device_get(state.step)[: len(self.members)]]
        for position in positions:
            position.next_stage()
        clock.stage, clock.epoch, clock.step = clock.stage + 1, 0, 0
        state = self.enter(clock.stage, models, starts, study=True)
        for number in self.errors:
            positions[number].finished = True
        going = self.going(positions)
        arrays = self.evaluated(state)
        values = self.measure(arrays, going)
        for number in going:
            self.judge(positions[number], values[number][0], positions[number].start_step, state)
        return state, jax.tree.map(jnp.copy, arrays)

    def run_stage(
        self, state: TrainState, best: Params, positions: list[Position], clock: Clock
    ) -> tuple[TrainState, Params]:
        """The epochs of a stage, until every member has ended it."""
        if self.going(positions):
            self.compile(state)
        while self.going(positions):
            state = self.run_epoch(state, best, positions, clock)
            state = self.end_epoch(state)
            best = self.close_epoch(state, best, positions, clock)
            self.save(state, best, positions, clock)
        return state, best

    def going(self, positions: Sequence[Position]) -> list[int]:
        """Members that have not ended the stage."""
        return [number for number, position in enumerate(positions) if not position.finished]

    def compile(self, state: TrainState) -> None:
        """Finds or makes the program of the stage under way."""

        def lower() -> Any:
            run = jax.vmap(run_steps(self.step), in_axes=(0, None, None if self.shared_order else 0, None, 0))
            if self.setup.devices.number > 1:
                run = jax.shard_map(
                    run,
                    mesh=self.setup.devices.mesh,
                    in_specs=(self.spec, PartitionSpec(), self.order_spec, PartitionSpec(), self.spec),
                    out_specs=self.spec,
                    check_vma=False,
                )
            shape = (self.setup.steps_per_call, self.setup.padded_size(self.members[0]))
            order = self.place_orders([np.zeros(shape, np.int32)] * len(self.members))
            return jax.jit(run, donate_argnums=0).lower(state, self.setup.train, order, np.int32(0), self.numbers)

        key = (AXIS, self.size, self.shared_order, self.step.program(), shapes_of(state))
        self.program: Callable[..., tuple[TrainState, Sums]] = self.setup.program(key, lower)

    def run_epoch(self, state: TrainState, best: Params, positions: list[Position], clock: Clock) -> TrainState:
        """The steps of one epoch, from wherever the clock stands in it. Members that have fewer wait for the others."""
        epoch = clock.stage * self.setup.epochs + clock.epoch
        orders = [self.order(number, epoch) for number in range(1 if self.shared_order else len(self.members))]

        def left() -> dict[int, int]:
            steps = {number: len(orders[0 if self.shared_order else number]) for number in self.going(positions)}
            return {number: count - clock.step for number, count in steps.items() if count > clock.step}

        steps_per_call = self.setup.steps_per_call
        while going := left():
            start = time.perf_counter()
            count = min(steps_per_call, *going.values())
            parts = [order[clock.step : clock.step + count] for order in orders]
            examples = [int((part >= 0).sum()) for part in parts]
            width = self.setup.padded_size(self.members[0])
            padding = [((0, steps_per_call - len(part)), (0, width - part.shape[1])) for part in parts]
            rows = self.place_orders(
                [np.pad(part, pad, constant_values=-1) for part, pad in zip(parts, padding, strict=True)]
            )
            state = self.freeze(state, list(going))
            state, sums = self.program(state, self.setup.train, rows, np.int32(count), self.numbers)
            sums, live, at = jax.device_get((sums, state.live, state.step))  # the only look at the device
            seconds = time.perf_counter() - start
            clock.step, clock.calls = clock.step + count, clock.calls + 1
            for number in going:
                own: Sums = jax.tree.map(lambda leaf, number=number: leaf[number], sums)
                if live[number]:
                    seen = examples[0 if self.shared_order else number]
                    self.advance(number, positions[number], own, count, seen, seconds / len(going))
                else:
                    self.fail(number, positions[number], own, int(at[number]) + 1)
            if left() and time.perf_counter() - self.saved >= self.setup.checkpoint_seconds:
                self.save(state, best, positions, clock)
            if self.setup.should_stop():
                self.save(state, best, positions, clock)
                raise Interrupted(
                    f"stopped in epoch {clock.epoch + 1} after {clock.step} of {max(map(len, orders))} steps of "
                    f"{len(self.members)} runs"
                )
        return state

    def fail(self, number: int, position: Position, sums: Sums, at: int) -> None:
        """Ends a member whose loss or gradient was not finite; the others go on."""
        kept = "none of its own, it ran together with others"
        self.errors[number] = nonfinite(sums, self.data.schema.task_names, position.epoch + 1, at, kept)
        position.finished = True

    def advance(self, number: int, position: Position, sums: Sums, count: int, examples: int, seconds: float) -> None:
        """Books one call for one member."""
        position.step += count
        position.train_seconds += seconds
        position.examples += examples
        position.add(sums)
        losses, weights = (
            dict(zip(self.data.schema.task_names, values, strict=True))
            for values in (position.mean_losses(), position.mean_weights())
        )
        self.members[number].observer.advanced(
            steps=count,
            epoch=position.epoch + 1,
            losses=losses,
            weights=weights,
            examples_per_second=examples / seconds,
        )

    def close_epoch(self, state: TrainState, best: Params, positions: list[Position], clock: Clock) -> Params:
        """Evaluates the members that run, writes their histories, and keeps what is best for each."""
        going, stage = self.going(positions), self.stages[clock.stage]
        clock.epoch, clock.step = clock.epoch + 1, 0
        if not going:
            return best
        arrays = self.evaluated(state)
        values = {number: measured[0] for number, measured in self.measure(arrays, going).items()}
        steps = jax.device_get(state.step)
        monitor = self.stages[0].monitors[0]
        improved: dict[int, list] = {}
        for number in going:
            position, at = positions[number], int(steps[number])
            position.close_epoch(at, self.data.schema.task_names, values[number], monitor, weighted=not stage.by_task)
            improved[number] = self.judge(position, values[number], at, state)
            stopped = all(position.out_of_patience(m, self.setup.patience) for m in stage.monitors)
            position.finished = stopped or position.epoch >= self.setup.epochs
            self.members[number].observer.evaluated(
                epoch=position.epoch,
                values={
                    f"{task.name} {task.metric}": values[number][task.name][task.metric]
                    for task in self.data.schema.tasks
                },
                monitor=monitor.value(values[number]),
                best=bool(improved[number]),
                history=position.history,
            )
        return self.keep(best, arrays, stage, improved)

    def end_epoch(self, state: TrainState) -> TrainState:
        """Lets the balancer and the adaptation of each member know."""
        if not self.step.by_epoch:
            return state
        ended = jax.vmap(lambda numbers, state: self.step.with_numbers(numbers).end_epoch(state))
        return self.place(ended(self.numbers, state))

    def judge(self, position: Position, values: Mapping[str, Any], at: int, state: TrainState) -> list:
        """The monitors for which this evaluation is the member's best so far."""
        stage, patience = self.stages[position.stage], self.setup.patience_after(position.epoch, state)
        return [m for m in stage.monitors if position.judge(m, values, at, patience)]

    def keep(self, best: Params, arrays: Params, stage: Stage, improved: Mapping[int, list]) -> Params:
        """What is best so far, once an epoch: the new arrays of members that improved, the old ones of the others."""
        kept = {}
        for path, array in arrays.items():
            new = [
                bool(monitors) and (not stage.by_task or any(stage.selects(m, path) for m in monitors))
                for monitors in (improved.get(number, []) for number in range(self.size))
            ]
            mask = np.reshape(new, (self.size,) + (1,) * (array.ndim - 1))
            kept[path] = jnp.where(mask, array, best[path]) if any(new) else best[path]
        return kept

    def freeze(self, state: TrainState, going: Sequence[int]) -> TrainState:
        live = np.zeros(self.size, bool)
        live[list(going)] = True
        return state._replace(live=self.place(live))

    def evaluated(self, state: TrainState) -> Params:
        """Path -> stacked array as it is evaluated."""
        return self.deploy(self.numbers, state)

    def measure(self, arrays: Params, numbers: Sequence[int]) -> dict[int, tuple[dict, dict]]:
        """Metrics on validation and what they were computed from, by member."""
        outputs = predict_stack(self.step.functional, arrays, self.setup.valid)
        tasks, valid = self.data.schema.tasks, self.data.valid
        return {
            number: metrics.evaluate(tasks, {task: stacked[number] for task, stacked in outputs.items()}, valid)
            for number in numbers
        }

    def order(self, number: int, epoch: int) -> np.ndarray:
        return self.setup.order(self.members[number], epoch)

    @property
    def spec(self) -> PartitionSpec:
        """Of what has a run axis."""
        return PartitionSpec(self.setup.devices.mesh.axis_names[0])

    @property
    def order_spec(self) -> PartitionSpec:
        return PartitionSpec() if self.shared_order else self.spec

    def place(self, tree: PyTree) -> PyTree:
        """The stacked arrays, spread over the devices by member."""
        sharding = NamedSharding(self.setup.devices.mesh, self.spec)
        return jax.tree.map(lambda leaf: jax.device_put(leaf, sharding), tree)

    def place_orders(self, orders: Sequence[np.ndarray]) -> Array:
        """Row numbers int32[run, steps, batch]; int32[steps, batch] where all members see the same batches."""
        if self.shared_order:
            return jax.device_put(orders[0], NamedSharding(self.setup.devices.mesh, PartitionSpec()))
        return self.place(stack_trees(list(orders), self.size))

    def save(self, state: TrainState, best: Params, positions: Sequence[Position], clock: Clock) -> None:
        if self.checkpoints:
            progress = {
                "clock": dataclasses.asdict(clock),
                "positions": [dataclasses.asdict(position) for position in positions],
                "errors": {str(number): str(error) for number, error in self.errors.items()},
            }
            self.checkpoints.save(clock.calls, {"state": state, "best": best}, progress, best=None)
            for member in self.members:
                member.observer.saved(step=clock.calls)
        self.saved = time.perf_counter()

    def forget(self) -> None:
        """Removes the checkpoints: they are of no use once the results are kept."""
        if self.checkpoints:
            shutil.rmtree(self.checkpoints.path, ignore_errors=True)

    def result(
        self,
        number: int,
        stacked: Params,
        measured: Any,
        state: TrainState,
        position: Position,
        seconds: float,
        compiling: float,
    ) -> Result:
        """As of the same run alone; its seconds are its share of the stack's."""
        return self.setup.result(
            self.members[number],
            self.step.functional,
            jax.device_put(jax.device_get(_of_member(stacked, number))),
            measured,
            position,
            steps=int(jax.device_get(state.step)[number]),
            seconds=seconds,
            compiling=compiling,
            trainable=sum(array.size for array in (state.params | state.tables).values()) // self.size,
        )


def stack_trees(trees: list[PyTree], size: int) -> PyTree:
    """The leaves of the trees along a leading axis of this length; the last tree fills up."""
    trees = trees + [trees[-1]] * (size - len(trees))
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _of_member(arrays: Params, number: int) -> Params:
    return {path: array[number] for path, array in arrays.items()}
