"""One arm of an ablation: the runs that one method has on one data set, over seeds and values of numbers.

What runs share is done once: data and baselines are read and fitted for the process, runs that differ in numbers only
share a compiled program (see :mod:`mtl_jax.train.vectorize`), and what is finished is not run again.
"""

import contextlib
import copy
import itertools
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mtl_jax.arguments import check_count, shown
from mtl_jax.errors import ConfigError, Interrupted, MtlJaxError, TrainingError
from mtl_jax.job import Job, Shared, name_of
from mtl_jax.report.folder import RunFolder
from mtl_jax.report.warned import warnings_kept
from mtl_jax.run_config import KEYS, MAX_SEED, OPTION_KEYS, WATCH_KEYS, build_model, build_parts, check_config
from mtl_jax.train.progress import Observers
from mtl_jax.train.setup import Member, Setup
from mtl_jax.train.vectorize import check_axis, plan_axis, program_of, train_members
from mtl_jax.watch import ProgressFile, observe

OWN_KEYS = ("seeds", "axis", "vectorize", "retry", "keep_checkpoints")
"""Keys of an arm beside those of a run."""
RUNS, STACKS = "runs", "stacks"


class Planned(NamedTuple):
    """One run of an arm.

    Attributes:
      config: As for :func:`mtl_jax.run.run`.
      values: Dotted key -> the value that this run has on the axis.
    """

    config: dict[str, Any]
    values: dict[str, Any]

    @property
    def seed(self) -> int:
        return self.config["seed"]


def runs_of(arm: Mapping[str, Any]) -> list[Planned]:
    """All runs of an arm: every value of every axis, with every seed.

    An axis whose key the arm does not have (a constant of another balancer, say) is none of this arm's.

    Args:
      arm: The keys of a run, and :data:`OWN_KEYS`.

    Raises:
      ConfigError: A list is empty, or a run cannot have these values.
    """
    seeds = seeds_of(arm["seeds"])
    axis = {key: values for key, values in flat_axis(arm["axis"]).items() if has_key(arm, key)}
    base = {key: arm[key] for key in KEYS if key in arm}
    planned = []
    for point in itertools.product(*axis.values()):
        values = dict(zip(axis, point, strict=True))
        for seed in seeds:
            config = copy.deepcopy(base) | {"seed": seed}
            for key, value in values.items():
                _put(config, key, value)
            check_config(config)
            planned.append(Planned(config, values))
    return planned


def plan_of(arms: Sequence[tuple[str, str, Mapping[str, Any]]], shared: Shared) -> list[dict[str, Any]]:
    """The members of an ablation, as ``ablation.json`` lists them. Data are loaded, because their content names runs.

    Args:
      arms: Name of the arm, name of its data, and its configuration.
      shared: What this process has loaded before.

    Raises:
      ConfigError: An arm cannot run as configured, or an axis is a key of no arm.
    """
    for key in {key for _, _, arm in arms for key in flat_axis(arm["axis"])}:
        if not any(has_key(arm, key) for _, _, arm in arms):
            raise ConfigError(f"axis.{key} names no key of any arm; expected one that --cfg job shows. Correct it")
    return [
        {"run_id": name_of(one.config, shared.dataset(one.config)), "arm": name, "values": one.values, "seed": one.seed}
        | {"data": data}
        for name, data, arm in arms
        for one in runs_of(arm)
    ]


def seeds_of(seeds: Any) -> list[int]:
    """The list of seeds, from a number of them or from a list."""
    if isinstance(seeds, list | tuple):
        for seed in seeds:
            check_count(seed, "seeds", least=0, most=MAX_SEED)
        if not seeds or len(set(seeds)) < len(seeds):
            raise ConfigError(
                f"seeds is {shown(seeds)}; expected a number of seeds or a list of different ones. Change it"
            )
        return list(seeds)
    check_count(seeds, "seeds")
    return list(range(seeds))


def flat_axis(axis: Any, prefix: str = "") -> dict[str, list[Any]]:
    """Dotted key -> values, from the nested mapping that ``axis.<key>=[...]`` makes."""
    flat: dict[str, list[Any]] = {}
    if not isinstance(axis, Mapping):
        raise ConfigError(
            f"axis is {shown(axis)}; expected lists of values by key, as axis.<key>=[...] makes. Change it"
        )
    for key, value in axis.items():
        if isinstance(value, Mapping):
            flat |= flat_axis(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple) and value:
            flat[f"{prefix}{key}"] = list(value)
        else:
            raise ConfigError(
                f"axis.{prefix}{key} is {shown(value)}; expected a list of values. Write axis.{prefix}{key}=[...]"
            )
    return flat


def has_key(config: Mapping[str, Any], key: str) -> bool:
    """Whether a dotted key is in a configuration."""
    for part in key.split("."):
        if not isinstance(config, Mapping) or part not in config:
            return False
        config = config[part]
    return True


def run_arm(
    arm: Mapping[str, Any],
    folder: str | Path,
    *,
    names: Mapping[str, str] | None = None,
    shared: Shared | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    told: Callable[[dict[str, Any]], None] = lambda record: None,
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

    Returns:
      Run id -> record, of the runs that were not finished before.

    Raises:
      Interrupted: ``should_stop`` said so.
      ConfigError: Nothing of the arm can run as configured.
    """
    folder, shared = Path(folder), shared or Shared()
    check_axis(arm["vectorize"]["axis"], arm["vectorize"]["chunk"])
    planned = runs_of(arm)
    records: dict[str, dict[str, Any]] = {}
    with contextlib.ExitStack() as stack:
        jobs = []
        for one in planned:
            dataset = shared.dataset(one.config)
            name = name_of(one.config, dataset)
            home = stack.enter_context(RunFolder.open(folder / RUNS / name))
            home.claim(name)
            job = Job(one.config, home, dataset, shared, names=names)
            earlier = job.earlier()
            status = earlier and earlier["status"]
            if status != "completed" and (status != "failed" or arm["retry"]):
                jobs.append(job)
        for setup, group in _together(jobs, shared, should_stop):
            for job, record in _train(setup, group, arm["vectorize"], folder / STACKS, should_stop):
                records[job.known["run_id"]] = record
                told(record)
                if not arm["keep_checkpoints"]:
                    shutil.rmtree(job.home.path / "checkpoints", ignore_errors=True)
    return records


def _together(
    jobs: Sequence[Job], shared: Shared, should_stop: Callable[[], bool]
) -> Iterator[tuple[Setup, list[tuple[Job, Member]]]]:
    """Jobs that share a compiled program, with what they share. A job that cannot be built ends with a record."""
    groups: dict[Any, list[tuple[Job, Member]]] = {}
    setups: dict[str, Setup] = {}
    programs: dict[str, Any] = {}
    for job in jobs:
        job.begin()
        with _recorded(job):
            parts = build_parts(job.config)
            options = _options(job.config, parts)
            key, config = _text(_of_setup(job.config)), _text(_of_program(job.config))
            if key not in setups:
                setups[key] = Setup.of(shared.training(job.dataset), should_stop=should_stop, **options)
            member = _member(job, parts, shared)
            if config not in programs:  # which the seeds of one configuration share for sure
                programs[config] = program_of(setups[key], member)
            groups.setdefault((key, programs[config]), []).append((job, member))
    for (key, _), group in groups.items():
        yield setups[key], group


def _options(config: Mapping[str, Any], parts: Mapping[str, Any]) -> dict[str, Any]:
    trainer = {key: value for key, value in config["trainer"].items() if key not in (*WATCH_KEYS, "order_seed")}
    trainer["table_updates"] = trainer.pop("tables")
    return trainer | {key: parts[key] for key in ("objective", "options", "parallel", "devices", "training")}


def _member(job: Job, parts: Mapping[str, Any], shared: Shared) -> Member:
    config = job.config
    watch = {key: config["trainer"][key] for key in WATCH_KEYS} | {"progress": False}  # one bar a run would be many
    return Member(
        lambda: build_model(config, job.dataset),
        seed=config["seed"],
        balancer=parts["balancer"],
        optimizer=shared.optimizer(config, parts["optimizer"]),
        order_seed=config["trainer"]["order_seed"],
        name=job.known["run_id"],
        checkpoints=job.home.path / "checkpoints",
        observer=Observers(observe(job.home, watch), ProgressFile(job.home)),
    )


def _train(
    setup: Setup,
    group: Sequence[tuple[Job, Member]],
    vectorize: Mapping[str, Any],
    stacks: Path,
    should_stop: Callable[[], bool],
) -> Iterator[tuple[Job, dict[str, Any]]]:
    """The records of jobs that share a program, one after the other."""
    left = dict(enumerate(job for job, _ in group))
    members = [member for _, member in group]
    try:
        with contextlib.ExitStack() as stack:
            for job in left.values():
                stack.enter_context(warnings_kept(job.home))
            plan = plan_axis(setup, members, axis=vectorize["axis"], chunk=vectorize["chunk"])
            for job in left.values():
                job.home.log(f"run axis {plan}")
            for number, result in train_members(setup, members, plan, stacks):
                job = left[number]
                if should_stop():
                    raise Interrupted("stopped after training, before the test part was opened")
                with _recorded(job):
                    if isinstance(result, TrainingError):
                        raise result
                    job.complete(result)
                yield left.pop(number), job.home.read_json("result.json")
    except (KeyboardInterrupt, Interrupted):
        for job in left.values():
            job.end("interrupted")
        raise
    except (MtlJaxError, OSError) as error:  # concerns all of them: a full disk, a damaged checkpoint
        for job in left.values():
            job.end("failed", error)
            yield job, job.home.read_json("result.json")


@contextlib.contextmanager
def _recorded(job: Job) -> Iterator[None]:
    """A mistake in one run ends that run alone, with a record."""
    try:
        yield
    except Interrupted:
        raise
    except MtlJaxError as error:
        job.end("failed", error)


def _of_setup(config: Mapping[str, Any]) -> list[Any]:
    """What runs have in common that share data on the device and options."""
    trainer = {key: value for key, value in config["trainer"].items() if key not in (*WATCH_KEYS, "order_seed")}
    options = {key: value for key, value in config["balancing"].items() if key in OPTION_KEYS}
    return [trainer, options, *(config[key] for key in ("data", "objective", "parallel", "training"))]


def _of_program(config: Mapping[str, Any]) -> dict[str, Any]:
    trainer = {key: value for key, value in config["trainer"].items() if key != "order_seed"}
    return {key: value for key, value in config.items() if key != "seed"} | {"trainer": trainer}


def _put(config: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        config = config[parent]
    config[last] = value


def _text(node: Any) -> str:
    return json.dumps(node, sort_keys=True, default=str)
