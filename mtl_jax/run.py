"""One configured run: data, model, training, the one look at the test part, and the run folder that is left."""

import datetime
import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import yaml
from flax import nnx
from rich.console import Console

from mtl_jax import metrics
from mtl_jax.config import build, check_keys, plain
from mtl_jax.data.dataset import Dataset
from mtl_jax.errors import ConfigError, MtlJaxError
from mtl_jax.model import MultiTaskModel
from mtl_jax.report.compare import below_baseline
from mtl_jax.report.find import single_task_command, single_task_reference
from mtl_jax.report.folder import RunFolder, config_hash, run_id
from mtl_jax.report.plot import plot_run
from mtl_jax.report.record import new_record, source_state, validate, versions
from mtl_jax.report.terminal import print_result
from mtl_jax.train import BalancingOptions, Bar, Quiet, Result, fit

KEYS = (
    "data", "sharing", "balancing", "optimizer", "trainer", "parallel", "objective", "encoder", "towers", "seed",
    "allow", "output_dir",
)  # fmt: skip
TRAINER_KEYS = (
    "epochs", "batch_size", "patience", "monitor", "tables", "steps_per_call", "checkpoint_seconds", "progress",
)  # fmt: skip
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
) -> dict[str, Any]:
    """Runs a configuration to its result record, or goes on where an earlier run of it stopped.

    Args:
      config: With the keys of ``conf/train.yaml``.
      names: Names of the chosen nodes (``sharing``, ``balancing``), for the record; the targets' names by default.
      folder: Run folder; ``<output_dir>/train/<run id>`` by default.
      overrides: The user's own, for the command that makes the single-task reference.
      console: Where the result is printed; standard output by default.

    Returns:
      The record, as in ``result.json``.

    Raises:
      MtlJaxError: What the user can mend; the record then says ``failed``, and checkpoints stay.
    """
    config = plain(config)
    console = console or Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    check_keys(config, KEYS)
    check_keys(config["trainer"], TRAINER_KEYS, place="trainer")
    parts = build_parts(config)
    dataset: Dataset = build(config["data"], allow=config["allow"])
    name = run_id(config, seed=config["seed"], data_identity=dataset.identity)
    root = Path(config["output_dir"]) / "train"
    with RunFolder.open(folder or root / name) as home:
        home.claim(name)
        known = _known(config, names or {}, dataset, name)
        record = home.read_json("result.json")
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


def build_parts(config: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that needs no data, so that a mistake shows before any is read."""
    balancing = dict(config["balancing"])
    options = {key: balancing.pop(key) for key in OPTION_KEYS if key in balancing}
    allow = config["allow"]
    for name in ("encoder", "sharing", "towers"):
        build(config[name], allow=allow)
    check_keys(config["parallel"], ("strategy",), place="parallel")
    return {
        "balancer": build(balancing, allow=allow),
        "options": BalancingOptions(**options),
        "optimizer": build(config["optimizer"], allow=allow),
        "objective": build(config["objective"], allow=allow),
        "parallel": config["parallel"]["strategy"],
    }


def build_model(config: Mapping[str, Any], dataset: Dataset) -> MultiTaskModel:
    """The model that a configuration describes, for a data set; its seed gives the initial values."""
    parts = {name: build(config[name], allow=config["allow"]) for name in ("encoder", "sharing", "towers")}
    return MultiTaskModel(dataset.schema, **parts, rngs=nnx.Rngs(config["seed"]))


def _finish(
    home: RunFolder, known: dict[str, Any], config: Mapping[str, Any], parts: Mapping[str, Any], dataset: Dataset
) -> dict[str, Any]:
    """Trains and evaluates; whatever happens, a valid record is written."""
    home.write_yaml("config.yaml", yaml.safe_dump(dict(config), sort_keys=False))
    home.write_json("schema.json", dataset.schema.to_dict())
    home.log(f"start {known['run_id']}")
    try:
        record = new_record(_train_and_test(home, known, config, parts, dataset), status="completed")
        record["flags"]["below_baseline"] = bool(below_baseline(record))
        validate(record)
    except KeyboardInterrupt:
        _write(home, new_record(known, status="interrupted"))
        raise
    except MtlJaxError as error:
        _write(home, new_record(known, status="failed", error=error))
        raise
    _write(home, record)
    return record


def _train_and_test(
    home: RunFolder, known: dict[str, Any], config: Mapping[str, Any], parts: Mapping[str, Any], dataset: Dataset
) -> dict[str, Any]:
    trainer = dict(config["trainer"])
    observer = _Recorder(home, _observer(trainer.pop("progress")))
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
    home.write_history(result.history)
    home.log(f"tables {result.table_updates}")
    selection = {
        "config_hash": known["config_hash"],
        "seed": known["seed"],
        "selector": SELECTOR,
        "step": result.monitor["step"],
    }
    openings = home.record_opening(selection)
    return known | _evaluated(result, dataset, openings, home.reopened, known["timing"]["started"])


def _evaluated(result: Result, dataset: Dataset, openings: int, reopened: bool, started: str) -> dict[str, Any]:
    """What the test part says, opened here for the first time, with the mandatory baselines."""
    training, test = dataset.for_training(), dataset.open_test()
    tasks = dataset.schema.tasks
    outputs = result.predict(test)
    values, support = metrics.evaluate(tasks, outputs, test)
    slices = metrics.evaluate_slices(tasks, outputs, test, dataset.schema.domains)
    device = jax.devices()[0]
    memory = device.memory_stats() or {}
    peak = memory.get("peak_bytes_in_use") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "metrics": result.metrics | {"test": values},
        "support": result.support | {"test": support},
        "slices": {name: {"test": by_task} for name, by_task in slices.items()},
        "baselines": metrics.baselines.evaluate_baselines(training, test),
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


def _known(config: Mapping[str, Any], names: Mapping[str, str], dataset: Dataset, name: str) -> dict[str, Any]:
    """The part of the record that does not depend on training."""
    commit, dirty = source_state(Path(__file__).parent)
    device = jax.devices()[0]
    info = dataset.info
    summary = dataset.summary()
    return {
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
            "count": jax.device_count(),
            "memory_bytes": (device.memory_stats() or {}).get("bytes_limit"),
        },
        "precision": "float32",
    }


def _write(home: RunFolder, record: dict[str, Any]) -> None:
    home.write_json("result.json", record)
    home.log(f"end {record['status']}")


def _observer(progress: bool | str) -> Bar | Quiet:
    if progress == "auto":
        return Bar.on_terminal()
    if isinstance(progress, bool):
        return Bar() if progress else Quiet()
    raise ConfigError(f"trainer.progress is '{progress}'; expected auto, true or false. Change it")


class _Recorder:
    """Passes progress on, and keeps the log of a run that nobody watches."""

    def __init__(self, home: RunFolder, inner: Bar | Quiet):
        self.home, self.inner = home, inner

    def started(self, **facts: Any) -> None:
        self.inner.started(**facts)

    def advanced(self, **facts: Any) -> None:
        self.inner.advanced(**facts)

    def evaluated(self, *, history: Sequence[Mapping[str, Any]], **facts: Any) -> None:
        self.home.write_history(history)
        values = "  ".join(f"{name} {_shown(value)}" for name, value in facts["values"].items())
        self.home.log(f"epoch {facts['epoch']}  {values}  monitor {_shown(facts['monitor'])}")
        self.inner.evaluated(history=history, **facts)

    def finished(self) -> None:
        self.inner.finished()


def _shown(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.5f}"
