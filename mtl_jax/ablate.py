"""One arm of an ablation: the runs that one method has on one data set, over seeds and values of numbers.

What runs share is done once: data and baselines are read and fitted for the process, runs that differ in numbers only
share a compiled program (see :mod:`mtl_jax.train.vectorize`), and what is finished is not run again.
"""

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mtl_jax.errors import Interrupted, MtlJaxError, NoSpace, TrainingError
from mtl_jax.handover import hand_over
from mtl_jax.job import Job, Shared, name_of
from mtl_jax.plan import runs_of
from mtl_jax.report.folder import RunFolder
from mtl_jax.report.warned import warnings_kept
from mtl_jax.run_config import OPTION_KEYS, WATCH_KEYS, build_model, build_parts
from mtl_jax.source import adaptation_of
from mtl_jax.stacks import Stacks
from mtl_jax.train import Result
from mtl_jax.train.adaptation import structure
from mtl_jax.train.progress import Observer, Observers
from mtl_jax.train.setup import Member, Setup
from mtl_jax.train.vectorize import Plan, plan_axis, program_of, train_members
from mtl_jax.watch import ProgressFile, observe

RUNS, STACKS = "runs", "stacks"
MOST_TOGETHER = 256
"""Runs trained together, at most: each holds a lock, and a process may have some thousand files open."""


def run_arm(
    arm: Mapping[str, Any],
    folder: str | Path,
    *,
    names: Mapping[str, str] | None = None,
    shared: Shared | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    told: Callable[[dict[str, Any]], None] = lambda record: None,
    sealed: str | None = None,
    tuning_trials: int = 0,
) -> dict[str, dict[str, Any]]:
    """Runs what is not finished of an arm.

    A run that fails leaves a record that says why, and the others go on; it is run again with ``retry``. A kill loses at
    most the epoch under way.

    Args:
      arm: As for :func:`runs_of`.
      folder: Of the ablation; runs go to ``runs/<run id>`` there.
      names: Names of the chosen nodes, for the records.
      shared: What this process has loaded before.
      should_stop: Is asked while training.
      told: Is given each record as soon as it is there.
      sealed: Why the test part must stay closed, as for :func:`mtl_jax.run.run`.
      tuning_trials: Trials that chose the values of this arm (see :mod:`mtl_jax.search`).

    Returns:
      Run id -> record, of the runs that were not finished before.

    Raises:
      Interrupted: ``should_stop`` said so.
      ConfigError: No run can have this configuration.
      RunFolderError: Another process is at one of the runs, or the folder takes no files. What was under way counts as
        interrupted.
    """
    folder, shared = Path(folder), shared or Shared()
    known = {"sealed": sealed, "tuning_trials": tuning_trials}
    jobs: dict[str, Job] = {}
    for one in runs_of(arm):
        dataset = shared.dataset(one.config)
        name = name_of(one.config, dataset)
        jobs[name] = Job(one.config, RunFolder(folder / RUNS / name), dataset, shared, names=names, **known)
    stacks = Stacks(folder / STACKS)
    records: dict[str, dict[str, Any]] = {}
    for job, record in _records(jobs, arm, stacks, shared, should_stop):
        if record["status"] == "completed" and not arm["keep_checkpoints"]:
            shutil.rmtree(job.home.path / "checkpoints", ignore_errors=True)
        records[job.known["run_id"]] = record
        told(record)
    for together in stacks.of(jobs):  # all of their runs have ended
        stacks.forget(together)
    return records


def _records(
    jobs: Mapping[str, Job],
    arm: Mapping[str, Any],
    stacks: Stacks,
    shared: Shared,
    should_stop: Callable[[], bool],
) -> Iterator[tuple[Job, dict[str, Any]]]:
    """Each unfinished run with its record, as soon as it is there."""
    axis, most = arm["vectorize"]["axis"], min(arm["vectorize"]["chunk"] or MOST_TOGETHER, MOST_TOGETHER)
    left = {name for name, job in jobs.items() if _unfinished(job, arm["retry"])}
    # What was trained together when an earlier process ended has its checkpoints together.
    begun = [names for names in stacks.of(jobs) if left.intersection(names)] if axis != "map" else []
    wanted = left.union(*begun)
    for setup, group in _groups([job for name, job in jobs.items() if name in wanted], shared, should_stop):
        if isinstance(setup, MtlJaxError):
            yield from ((job, _refused(job, setup)) for job, _ in group if job.known["run_id"] in left)
            continue
        by_name = {job.known["run_id"]: (job, member) for job, member in group}
        own = [names for names in begun if by_name.keys() >= set(names)]
        rest = [pair for name, pair in by_name.items() if name in left.difference(*own)]
        try:
            members = [member for _, member in rest]
            plan = plan_axis(setup, members, axis=axis, chunk=most) if rest else None
        except MtlJaxError as error:
            yield from ((job, _refused(job, error)) for job, _ in rest)
            plan, rest = None, []
        chunks = [(Plan("vmap", stacks.size(names)), [by_name[name] for name in names]) for names in own]
        chunks += [(plan, rest[first : first + plan.chunk]) for first in range(0, len(rest), plan.chunk if plan else 1)]
        for plan_of_chunk, part in chunks:
            yield from _train(setup, part, plan_of_chunk, stacks, arm["retry"], should_stop)


def _groups(
    jobs: Sequence[Job], shared: Shared, should_stop: Callable[[], bool]
) -> Iterator[tuple[Setup | MtlJaxError, list[tuple[Job, Member | None]]]]:
    """Jobs that share a compiled program, with what they share; or with what is wrong with them."""
    alike: dict[str, list[Job]] = {}
    for job in jobs:
        alike.setdefault(_text(_of_setup(job.config)), []).append(job)
    for some in alike.values():  # one setup at a time, because each holds its data on the devices
        setup: Setup | None = None
        groups: dict[Any, list[tuple[Job, Member]]] = {}
        programs: dict[str, Any] = {}
        for job in some:
            try:
                parts = build_parts(job.config)
                handover = job.handover = hand_over(job.config, shared, should_stop)
                if setup is None:
                    options = _options(job.config, parts) | (handover.for_setup() if handover else {})
                    setup = Setup.of(job.encoded.for_training(), should_stop=should_stop, **options)
                    if shared.programs is not None:
                        setup.programs = shared.programs.setdefault(_text(_of_setup(job.config)), {})
                member = _member(job, parts, shared)
                config = _text(_of_program(job.config))
                if config not in programs:  # which the seeds of one configuration share for sure
                    programs[config] = program_of(setup, member)
            except (Interrupted, NoSpace):  # while the source was trained: no fault of this run
                raise
            except MtlJaxError as error:
                yield error, [(job, None)]
            else:
                groups.setdefault(programs[config], []).append((job, member))
        for group in groups.values():
            yield setup, group


def _options(config: Mapping[str, Any], parts: Mapping[str, Any]) -> dict[str, Any]:
    trainer = {key: value for key, value in config["trainer"].items() if key not in (*WATCH_KEYS, "order_seed")}
    trainer["table_updates"] = trainer.pop("tables")
    return trainer | {key: parts[key] for key in ("objective", "options", "parallel", "devices", "training")}


def _member(job: Job, parts: Mapping[str, Any], shared: Shared) -> Member:
    """A member that leaves nothing in the run's folder, whose lock nobody holds yet."""
    handover = job.handover
    return Member(
        (lambda: build_model(job.config, job.dataset)) if handover is None else (lambda: handover.model),
        seed=job.config["seed"],
        balancer=parts["balancer"],
        optimizer=shared.optimizer(job.config, parts["optimizer"]),
        order_seed=job.config["trainer"]["order_seed"],
        name=job.known["run_id"],
        adaptation=handover and handover.adaptation,
        origin=handover and handover.origin,
    )


def _observer(job: Job) -> Observer:
    trainer = job.config["trainer"]
    watch = {key: trainer[key] for key in WATCH_KEYS} | {"progress": False}  # one bar a run would be many
    return Observers(observe(job.home, watch), ProgressFile(job.home, monitor=trainer["monitor"]))


def _train(
    setup: Setup,
    part: Sequence[tuple[Job, Member]],
    plan: Plan,
    stacks: Stacks,
    retry: bool,
    should_stop: Callable[[], bool],
) -> Iterator[tuple[Job, dict[str, Any]]]:
    """The records of jobs that are trained together, or of the one that is trained alone."""
    running: dict[int, Job] = {}
    members = []
    with contextlib.ExitStack() as stack:
        for number, (job, member) in enumerate(part):
            _enter(stack, job)
            if _unfinished(job, retry):  # with the lock, or another process might still have come first
                running[number] = job
                job.begin()
                job.home.log(f"run axis {plan}")
                stack.enter_context(warnings_kept(job.home))
                places = {"observer": _observer(job), "checkpoints": job.home.path / "checkpoints"}
                member = dataclasses.replace(member, **places)
            members.append(member)
        if not running:
            return
        together = [member.name for member in members]
        try:
            checkpoints = stacks.begin(together, plan.chunk) if plan.axis == "vmap" else None
            for number, result in train_members(setup, members, plan, checkpoints):
                if number in running:  # a member of a stack whose record was there before the others'
                    if should_stop():
                        raise Interrupted("stopped after training, before the test part was opened")
                    record = _ended(running[number], result)
                    yield running.pop(number), record
        except (KeyboardInterrupt, Interrupted, NoSpace, OSError):  # what other runs would meet as well
            for job in running.values():
                job.end("interrupted")
            raise
        except MtlJaxError as error:
            for job in running.values():
                yield job, _failed(job, error)
        stacks.forget(together)


def _enter(stack: contextlib.ExitStack, job: Job) -> None:
    """Holds the lock of a run's folder."""
    home = stack.enter_context(RunFolder.open(job.home.path))
    home.claim(job.known["run_id"])


def _unfinished(job: Job, retry: bool) -> bool:
    record = job.earlier() if job.home.path.is_dir() else None
    status = record and record["status"]
    return status != "completed" and (status != "failed" or retry)


def _ended(job: Job, result: Result | TrainingError) -> dict[str, Any]:
    """The record of a run that was trained."""
    if isinstance(result, TrainingError):
        return _failed(job, result)
    try:
        return job.complete(result)
    except NoSpace:
        raise
    except MtlJaxError as error:
        return _failed(job, error)


def _refused(job: Job, error: MtlJaxError) -> dict[str, Any]:
    """The record of a run that cannot begin."""
    with contextlib.ExitStack() as stack:
        _enter(stack, job)
        job.begin()
        return _failed(job, error)


def _failed(job: Job, error: MtlJaxError) -> dict[str, Any]:
    """A mistake in one run ends that run alone, with a record; where there can be no record it ends all."""
    job.end("failed", error)
    record = job.home.read_json("result.json")
    if record is None or record["status"] != "failed":
        raise error
    return record


def _of_setup(config: Mapping[str, Any]) -> list[Any]:
    """What runs have in common that share data on the device and options."""
    trainer = {key: value for key, value in config["trainer"].items() if key not in (*WATCH_KEYS, "order_seed")}
    options = {key: value for key, value in config["balancing"].items() if key in OPTION_KEYS}
    common = [
        config[key] for key in ("data", "objective", "parallel", "training", "source", "target", "select", "loading")
    ]
    adaptation = adaptation_of(config).simplified()
    apart = None if config["select"] == "given" else config["seed"]  # each seed may choose another source
    apart = config if adaptation.reads_outputs else apart  # each run of a source says something else of the rows
    return [trainer, options, common, apart, str(structure(adaptation))]


def _of_program(config: Mapping[str, Any]) -> dict[str, Any]:
    trainer = {key: value for key, value in config["trainer"].items() if key != "order_seed"}
    return {key: value for key, value in config.items() if key != "seed"} | {"trainer": trainer}


def _text(node: Any) -> str:
    return json.dumps(node, sort_keys=True, default=str)
