"""One configured run: data, model, training, the one look at the test part, and the run folder that is left."""

import contextlib
import datetime
import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import optax
import yaml
from flax import nnx
from rich.console import Console

from mtl_jax import metrics
from mtl_jax.arguments import check_arguments, check_count, shown
from mtl_jax.balancing import Balancer
from mtl_jax.config import build, check_keys, check_sections, plain
from mtl_jax.data.dataset import Dataset
from mtl_jax.errors import ConfigError, Interrupted, MtlJaxError, RunFolderError
from mtl_jax.model import MultiTaskModel
from mtl_jax.report.compare import below_baseline
from mtl_jax.report.find import single_task_command, single_task_reference
from mtl_jax.report.folder import RunFolder, config_hash, run_id
from mtl_jax.report.plot import plot_run
from mtl_jax.report.record import RecordError, new_record, source_state, validate, versions
from mtl_jax.report.terminal import print_result
from mtl_jax.report.warned import warnings_kept
from mtl_jax.sharing import Strategy
from mtl_jax.train import BalancingOptions, Objective, Optimizer, Result, fit
from mtl_jax.train.parallel import Devices
from mtl_jax.train.stages import check_training
from mtl_jax.train.step import check_numerics
from mtl_jax.watch import OPTIONS as WATCH_KEYS
from mtl_jax.watch import check_options, observe

KEYS = (
    "data", "sharing", "balancing", "optimizer", "trainer", "parallel", "objective", "encoder", "towers", "training",
    "seed", "folds", "allow", "output_dir",
)  # fmt: skip
TRAINER_KEYS = (
    "epochs", "batch_size", "patience", "monitor", "tables", "steps_per_call", "checkpoint_seconds",
    "micro_batches", "precision", "average", *WATCH_KEYS,
)  # fmt: skip
PARALLEL_KEYS = ("strategy", "devices")
NODES = ("data", "sharing", "balancing", "optimizer", "objective", "encoder", "towers")
MODEL_PARTS = {"encoder": nnx.Module, "sharing": Strategy, "towers": nnx.Module}
MAX_SEED = 2**32 - 1
OPTION_KEYS = ("scope", "head_gradient", "jacobian")
SELECTOR = "valid_best"
PLAIN_WIDTH = 110
"""Columns of the printed result where standard output is not a terminal."""


def run(
    config: Any,
    *,
    names: Mapping[str, str] | None = None,
    folder: str | Path | None = None,
    overrides: Sequence[str] = (),
    console: Console | None = None,
    sealed: str | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Runs a configuration to its result record, or goes on where an earlier run of it stopped.

    Args:
      config: With the keys of ``conf/train.yaml``.
      names: Names of the chosen nodes (``sharing``, ``balancing``), for the record; the targets' names by default.
      folder: Run folder; ``<output_dir>/train/<run id>`` by default.
      overrides: The user's own, for the command that makes the single-task reference.
      console: Where the result is printed; standard output by default.
      sealed: Why the test part must stay closed. The run then ends with its validation part, and this in the record.
      should_stop: Is asked while training; True ends the run after a checkpoint.

    Returns:
      The record, as in ``result.json``.

    Raises:
      Interrupted: ``should_stop`` said so; the record then says ``interrupted``.
      MtlJaxError: What the user can mend; the record then says ``failed``, and checkpoints stay.
    """
    config = plain(config)
    console = console or Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    check_config(config)
    if config["folds"] is not None:
        raise ConfigError(f"folds is {config['folds']} in one run; expected null. Use mtl_jax.cross_validate for folds")
    parts = build_parts(config) | {"should_stop": should_stop}
    dataset: Dataset = _built(config, "data", Dataset)
    name = run_id(config, seed=config["seed"], data_identity=dataset.identity)
    root = Path(config["output_dir"]) / "train"
    with RunFolder.open(folder or root / name) as home:
        home.claim(name)
        known = _known(config, names or {}, dataset, name, sealed)
        record = _record_of(home)
        if record is None or record["status"] != "completed":
            record = _finish(home, known, config, parts, dataset)
        else:
            console.print(f"finished on {record['timing']['started']}; nothing to train")
        reference = single_task_reference(Path(config["output_dir"]), record)
        if record["method"]["sharing"] == "single_task":
            reference = None
        plot_run(record, home.read_history(), home.path / "result.png", reference=reference)
        command = single_task_command(record, list(overrides))
        print_result(record, console, reference=reference, reference_command=command, folder=home.path)
    return record


def _record_of(home: RunFolder) -> dict[str, Any] | None:
    """The record that an earlier run left, None without one."""
    record = home.read_json("result.json")
    try:
        if record is not None and record.get("status") in (None, "completed"):
            validate(record)
    except RecordError as error:
        raise RunFolderError(
            f"'{home.path / 'result.json'}' is not a whole record ({error}); expected one that a run wrote. Remove the "
            "file to run again"
        ) from error
    return record


def check_config(config: Mapping[str, Any]) -> None:
    """Raises a ConfigError for sections, keys and plain values that no run can have; nothing is built or read."""
    check_sections(config, KEYS, NODES)
    check_keys(config, KEYS)
    for place, keys in (("trainer", TRAINER_KEYS), ("parallel", PARALLEL_KEYS)):
        check_sections(config[place], keys, place=place)
        check_keys(config[place], keys, place=place)
    check_options(config["trainer"])
    given = {key: value for key, value in config["trainer"].items() if key not in WATCH_KEYS}
    check_arguments(fit, given, place="trainer", names={"tables": "table_updates"})
    for key in ("steps_per_call", "micro_batches"):  # arrays have these lengths
        check_count(config["trainer"][key], f"trainer.{key}")
    check_numerics(config["trainer"]["precision"], config["trainer"]["average"])
    check_arguments(fit, config["parallel"], place="parallel", names={"strategy": "parallel"})
    _devices(config)
    check_training(config["training"])
    check_count(config["seed"], "seed", least=0, most=MAX_SEED)
    if not isinstance(config["output_dir"], str) or not config["output_dir"] or "\0" in config["output_dir"]:
        raise ConfigError(f"output_dir is {shown(config['output_dir'])}; expected the path of a folder. Change it")


def build_parts(config: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that needs no data, so that a mistake shows before any is read."""
    balancing = dict(config["balancing"])
    options = {key: balancing.pop(key) for key in OPTION_KEYS if key in balancing}
    for name, kind in MODEL_PARTS.items():
        part = build(config[name], allow=config["allow"], place=name)
        made = getattr(part, "func", None)
        if made is None or (isinstance(made, type) and not issubclass(made, kind)):
            raise ConfigError(
                f"{name} has _target_ {shown(config[name]['_target_'])}; expected the constructor of a {kind.__name__}, "
                f"with _partial_: true. Choose one of conf/{name}, or a class of your own that is one"
            )
    return {
        "balancer": _built(config | {"balancing": balancing}, "balancing", Balancer),
        "options": BalancingOptions(**options),
        "optimizer": _built(config, "optimizer", (Optimizer, optax.GradientTransformation)),
        "objective": _built(config, "objective", Objective),
        "parallel": config["parallel"]["strategy"],
        "devices": config["parallel"]["devices"],
        "training": config["training"],
    }


def build_model(config: Mapping[str, Any], dataset: Dataset) -> MultiTaskModel:
    """The model that a configuration describes, for a data set; its seed gives the initial values."""
    parts = {name: build(config[name], allow=config["allow"], place=name) for name in MODEL_PARTS}
    return MultiTaskModel(dataset.schema, **parts, rngs=nnx.Rngs(config["seed"]))


def _built(config: Mapping[str, Any], key: str, kind: type | tuple[type, ...]) -> Any:
    made = build(config[key], allow=config["allow"], place=key)
    if not isinstance(made, kind):
        names = " or ".join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))
        raise ConfigError(
            f"{key} has _target_ {shown(config[key]['_target_'])}, which makes a {type(made).__name__}; expected a "
            f"{names}. Choose one of conf/{key}"
        )
    return made


def _finish(
    home: RunFolder, known: dict[str, Any], config: Mapping[str, Any], parts: Mapping[str, Any], dataset: Dataset
) -> dict[str, Any]:
    """Trains and evaluates; whatever happens, a valid record is written."""
    home.write_yaml("config.yaml", yaml.safe_dump(dict(config), sort_keys=False))
    home.write_json("schema.json", dataset.schema.to_dict())
    home.log(f"start {known['run_id']}")
    try:
        with warnings_kept(home):
            record = new_record(_train_and_test(home, known, config, parts, dataset), status="completed")
        record["flags"]["below_baseline"] = bool(below_baseline(record))
        validate(record)
    except (KeyboardInterrupt, Interrupted):
        _write_if_possible(home, new_record(known, status="interrupted"))
        raise
    except (MtlJaxError, OSError) as error:
        _write_if_possible(home, new_record(known, status="failed", error=error))
        raise
    _write(home, record)
    return record


def _train_and_test(
    home: RunFolder, known: dict[str, Any], config: Mapping[str, Any], parts: Mapping[str, Any], dataset: Dataset
) -> dict[str, Any]:
    trainer = dict(config["trainer"])
    observer = observe(home, {key: trainer.pop(key) for key in WATCH_KEYS})
    table_updates = trainer.pop("tables")
    result = fit(
        build_model(config, dataset),
        dataset.for_training(),
        seed=config["seed"],
        table_updates=table_updates,
        checkpoints=home.path / "checkpoints",
        observer=observer,
        **trainer,
        **parts,
    )
    if parts["should_stop"]():
        raise Interrupted("stopped after training, before the test part was opened")
    home.write_history(result.history)
    home.log(f"tables {result.table_updates}")
    selection = {
        "config_hash": known["config_hash"],
        "seed": known["seed"],
        "selector": SELECTOR,
        "step": result.monitor["step"],
    }
    openings = 0 if "sealed" in known else home.record_opening(selection)
    return known | _evaluated(result, dataset, openings, home.reopened, known["timing"]["started"])


def _evaluated(result: Result, dataset: Dataset, openings: int, reopened: bool, started: str) -> dict[str, Any]:
    """What the test part says, opened here for the first time, with the mandatory baselines.

    With no opening (a sealed run) the validation part takes its place.
    """
    training = dataset.for_training()
    part, rows = ("test", dataset.open_test()) if openings else ("valid", training.valid)
    tasks = dataset.schema.tasks
    outputs = result.predict(rows)
    values, support = metrics.evaluate(tasks, outputs, rows)
    slices = metrics.evaluate_slices(tasks, outputs, rows, dataset.schema.domains)
    device = jax.devices()[0]
    memory = device.memory_stats() or {}
    peak = memory.get("peak_bytes_in_use") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "metrics": result.metrics | {"test": None} | {part: values},
        "support": result.support | {"test": {}} | {part: support},
        "slices": {name: {part: by_task} for name, by_task in slices.items()},
        "baselines": metrics.baselines.evaluate_baselines(training, rows),
        "params": result.params,
        "monitor": result.monitor,
        "timing": result.timing | {"peak_memory_bytes": int(peak), "started": started},
        "diagnostics": result.diagnostics,
        "test_openings": openings,
        "flags": {
            "transductive": False,
            "oracle": False,
            "reopened": reopened,
            "leak": any(dataset.info["leakage"]["flagged"].values()),
        },
    }


def _known(
    config: Mapping[str, Any], names: Mapping[str, str], dataset: Dataset, name: str, sealed: str | None
) -> dict[str, Any]:
    """The part of the record that does not depend on training."""
    commit, dirty = source_state(Path(__file__).parent)
    device = jax.devices()[0]
    info = dataset.info
    summary = {} if sealed else dataset.summary()  # it counts the labels of the test part
    return ({"sealed": sealed} if sealed else {}) | {
        "run_id": name,
        "config": dict(config),
        "config_hash": config_hash(config),
        "method": {
            key: names.get(key) or str(config[key]["_target_"]).split(".")[-1] for key in ("sharing", "balancing")
        },
        "tasks": {
            t.name: {
                "kind": t.kind,
                "loss": t.loss,
                "space": t.space,
                "metric": t.metric,
                "direction": "higher" if t.higher_is_better else "lower",
            }
            for t in dataset.schema.tasks
        },
        "data": {
            "name": dataset.name,
            "recipe": dataset.recipe,
            "split": info["split"],
            "sha256": dataset.identity,
            "rows": {part: len(rows) for part, rows in dataset.splits.items()},
            "licence": dataset.licence,
            "summary": summary,
            **{
                key: info[key]
                for key in ("version", "source", "split_sha256", "files", "leakage", "warnings")
                if key in info
            },
        },
        "seed": config["seed"],
        "split_seed": info.get("split_seed"),
        "selector": SELECTOR,
        "tuning_trials": 0,
        "test_openings": 0,
        "timing": {"started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")},
        "versions": versions(),
        "commit": commit,
        "dirty": dirty,
        "device": {
            "kind": device.device_kind,
            "count": _devices(config).number,
            "memory_bytes": (device.memory_stats() or {}).get("bytes_limit"),
        },
        "precision": config["trainer"]["precision"],
    }


def _devices(config: Mapping[str, Any]) -> Devices:
    return Devices(config["parallel"]["strategy"], config["parallel"]["devices"])


def _write(home: RunFolder, record: dict[str, Any]) -> None:
    home.write_json("result.json", record)
    home.log(f"end {record['status']}")


def _write_if_possible(home: RunFolder, record: dict[str, Any]) -> None:
    """On a full disk there is no record, and the error that ended the run is what the user must see."""
    with contextlib.suppress(RunFolderError):
        _write(home, record)
