"""The run axis: seeds and numeric hyperparameters of one model, trained by one compiled program.

Members run together (``vmap``: every array has a leading run axis) or one after the other (``map``: the ordinary program,
compiled once, since numbers are its arguments). Either way a member equals the same run alone: its own initial values,
dropout, data order, early stop and selection. A GPU that a small model leaves idle gains from ``vmap``; a CPU rarely does.
"""

import dataclasses
import math
import os
import time
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mtl_jax.data.dataset import Dataset, TrainingData
from mtl_jax.errors import ConfigError, TrainingError
from mtl_jax.train.result import Result
from mtl_jax.train.run_stack import RunStack
from mtl_jax.train.session import Session
from mtl_jax.train.setup import Member, Setup
from mtl_jax.train.state import shapes_of

AXES = ("auto", "vmap", "map")
MEMORY_FRACTION = 0.8
"""Share of the free memory that the members of one chunk may take."""
MEASURED_STEPS = 4
MEASURED_CALLS = 2


@dataclasses.dataclass(frozen=True)
class Plan:
    """How members are trained.

    Attributes:
      axis: ``vmap`` or ``map``.
      chunk: Members trained together; 1 with ``map``.
      member_bytes: Predicted memory of one member, without the data; None where nothing was compiled to predict it.
      free_bytes: Memory that was free when it was predicted; None where it is not known.
      seconds: Axis -> measured seconds of a step of one member; empty without a measurement.
    """

    axis: str
    chunk: int
    member_bytes: int | None = None
    free_bytes: int | None = None
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)


def fit_many(
    members: Sequence[Member],
    dataset: Dataset | TrainingData,
    *,
    axis: str = "auto",
    chunk: int | None = None,
    checkpoints: str | Path | None = None,
    **options: Any,
) -> Iterator[tuple[int, Result | TrainingError]]:
    """Trains many runs of one model on one data set, which differ in seeds and numbers.

    Args:
      members: The runs. What is trained together may differ in numbers only: learning rates, decays > 0, clipping, dropout
        rates > 0, loss weights, constants of the balancer. The optax transform of their optimizers has to be one object.
      dataset: What to train and select on.
      axis: ``vmap``, ``map``, or ``auto``: what a short measurement finds faster here.
      chunk: Most members trained together; None: as many as fit into the memory that is free.
      checkpoints: Folder for checkpoints of members that run together.
      options: As for :func:`mtl_jax.train.fit`.

    Yields:
      The number of a member and its result, as soon as it is there; a :class:`~mtl_jax.errors.TrainingError` in place of
      the result of a member whose loss or gradient was not finite. The other members go on.

    Raises:
      ConfigError: As for ``fit``, or members differ in more than numbers.
      Interrupted: ``should_stop`` said so.

    Example:
      >>> import functools
      >>> from flax import nnx
      >>> import mtl_jax
      >>> from mtl_jax.sharing import SharedBottom
      >>> from mtl_jax.train import Member, fit_many
      >>> data = mtl_jax.data.load("synthetic", num_rows=600, dim=8)
      >>> sharing = functools.partial(SharedBottom, units=(8,))
      >>> def model(seed):
      ...     return mtl_jax.MultiTaskModel(data.schema, sharing=sharing, rngs=nnx.Rngs(seed))
      ...
      >>> members = [Member(lambda seed=seed: model(seed), seed=seed) for seed in range(2)]
      >>> results = dict(fit_many(members, data, epochs=1, batch_size=128, axis="map"))
      >>> sorted(results)
      [0, 1]
    """
    check_axis(axis, chunk)
    setup = Setup.of(dataset, **options)
    plan = plan_axis(setup, members, axis=axis, chunk=chunk)
    yield from train_members(setup, members, plan, checkpoints)


def train_members(
    setup: Setup, members: Sequence[Member], plan: Plan, checkpoints: str | Path | None = None
) -> Iterator[tuple[int, Result | TrainingError]]:
    """The work of :func:`fit_many` for a setup and a plan."""
    if plan.axis == "map":
        for number, member in enumerate(members):
            yield number, _alone(setup, member)
        return
    for first in range(0, len(members), plan.chunk):
        part = members[first : first + plan.chunk]
        stack = RunStack(setup, part, size=plan.chunk, checkpoints=checkpoints)
        for number, result in enumerate(stack.run()):
            yield first + number, result
        stack.forget()  # whoever asks for more has kept these results


def plan_axis(setup: Setup, members: Sequence[Member], *, axis: str = "auto", chunk: int | None = None) -> Plan:
    """How many members fit together, and whether it pays to train them so.

    Raises:
      ConfigError: ``vmap`` cannot be had.
    """
    check_axis(axis, chunk)
    if axis == "vmap" and setup.devices.axis is not None:
        raise ConfigError(
            "vectorize.axis is 'vmap' with parallel=pmap, which gives the devices to the rows of one run; expected "
            "parallel=jit, where the devices share the runs. Change one of them"
        )
    untrained = setup.adaptation is not None and not setup.adaptation.trains
    if axis == "map" or len(members) == 1 or setup.devices.axis is not None or untrained:
        return Plan("map", 1)
    if axis == "vmap":
        return _together(setup, members, chunk)
    alone = Session(setup, members[0])
    state = alone.enter(0, alone.model)
    alone.compile(state)
    each, free = _held_bytes(state) + _temporary_bytes(alone.program), _free_bytes()
    size = _places(setup, len(members), each, free, chunk)
    if size == 1:
        return Plan("map", 1, each, free)
    seconds = {"map": _measured(alone.program, setup, members[0], state, alone.numbers())}
    stack = RunStack(setup, members[:size], size=size)
    stacked = stack.enter(0)
    stack.compile(stacked)
    seconds["vmap"] = _measured(stack.program, setup, members[0], stacked, stack.numbers, stack) / min(
        size, len(members)
    )
    best = min(seconds, key=seconds.get)
    return Plan(best, size if best == "vmap" else 1, each, free, seconds)


def program_of(setup: Setup, member: Member) -> Hashable:
    """What members must have in common to be trained by one program."""
    step, state = setup.build(member, setup.stages[0], member.initial())
    return step.program(), shapes_of(state)


def check_axis(axis: str, chunk: int | None) -> None:
    """Raises a ConfigError for an unknown axis, or a chunk that is no number of members."""
    if axis not in AXES:
        raise ConfigError(f"vectorize.axis is {axis!r}; expected one of {list(AXES)}. Change it")
    if chunk is not None and (isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1):
        raise ConfigError(f"vectorize.chunk is {chunk!r}; expected a whole number >= 1, or null. Change it")


def _alone(setup: Setup, member: Member) -> Result | TrainingError:
    try:
        return Session(setup, member).run()
    except TrainingError as error:
        return error


def _together(setup: Setup, members: Sequence[Member], chunk: int | None) -> Plan:
    """The plan under ``vmap``: as many as their states let, fewer where the program they share needs more than that."""
    _, state = setup.build(members[0], setup.stages[0], members[0].initial())
    each, free = _held_bytes(state), _free_bytes()
    size = _places(setup, len(members), each, free, chunk)
    while size > 1:
        stack = RunStack(setup, members[:size], size=size)
        stack.compile(stack.enter(0))
        each = _held_bytes(state) + _temporary_bytes(stack.program) // size
        fitting = _places(setup, len(members), each, free, chunk)
        if fitting >= size:
            return Plan("vmap", size, each, free)
        size = fitting
    return Plan("map", 1, each, free)


def _places(setup: Setup, num_members: int, each: int, free: int | None, chunk: int | None) -> int:
    """Members of a chunk. Chunks of one size share a program; the last one is filled up with members that do not run."""
    fits = num_members if free is None else max(1, int(MEMORY_FRACTION * free / each))
    most = min(num_members, fits, chunk or num_members)
    return setup.devices.multiple(math.ceil(num_members / math.ceil(num_members / most)))


def _held_bytes(state: Any) -> int:
    """What one more member holds: its state, and the copy that selection keeps."""
    chosen = (state.params, state.tables, state.rest)
    return sum(leaf.nbytes for leaf in jax.tree.leaves((state, chosen)))


def _temporary_bytes(program: Any) -> int:
    """What a program needs on the side."""
    memory = program.memory_analysis()
    return memory.temp_size_in_bytes if memory else 0


def _free_bytes() -> int | None:
    """Free memory of the device, or of the machine where the device computes in it."""
    stats = jax.devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


def _measured(
    program: Any, setup: Setup, member: Member, state: Any, numbers: Any, stack: RunStack | None = None
) -> float:
    """Seconds of a step, from the fastest of a few short calls."""
    steps = min(MEASURED_STEPS, setup.steps_per_call)
    size = setup.padded_size(member)
    rows = np.tile(np.arange(size, dtype=np.int32) % setup.data.train.num_rows, (setup.steps_per_call, 1))
    if stack is None:
        order, count = setup.devices.spread(rows), setup.devices.replicate(np.int32(steps))
    else:
        order, count = stack.place_orders([rows] * len(stack.members)), np.int32(steps)
    best = math.inf
    for _ in range(MEASURED_CALLS + 1):  # the first one warms up
        start = time.perf_counter()
        state, sums = program(state, setup.train, order, count, numbers)
        jax.block_until_ready(sums)
        best = min(best, time.perf_counter() - start)
    return best / steps
