"""Job: a configured run as a folder, however it ends. Shared: what the jobs of one process need to do only once."""

import contextlib
import dataclasses
import datetime
import functools
import json
import resource
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import yaml

from mtl_jax import metrics
from mtl_jax.data.dataset import Dataset, Encoded
from mtl_jax.data.domains import joined
from mtl_jax.errors import Interrupted, MtlJaxError, RunFolderError, TrainingError
from mtl_jax.report.compare import below_baseline
from mtl_jax.report.folder import RunFolder, config_hash, run_id
from mtl_jax.report.record import RecordError, new_record, source_state, validate, versions
from mtl_jax.report.warned import warnings_kept
from mtl_jax.run_config import WATCH_KEYS, build_data, build_model, devices_of
from mtl_jax.source import Handover, target_of, whole_data
from mtl_jax.train import Optimizer, Result, fit
from mtl_jax.train.optimizer import as_optimizer
from mtl_jax.watch import observe

SELECTOR = "valid_best"
TUNING = "tuning"
"""Folder of the artefact of what a run changed of its base."""
METHOD = ("sharing", "link", "balancing", "pretraining", "transfer")
"""Groups whose choice is the method of a run."""


@dataclasses.dataclass
class Shared:
    """What runs of one process need not read, fit or compile again: data sets, baselines, and optimizers, which compiled
    programs are found by. With ``programs`` set, compiled programs are kept for later arms as well. Why the training of a
    source failed is kept by its run id: it would fail again for every target."""

    datasets: dict[str, Dataset] = dataclasses.field(default_factory=dict)
    fitted: dict[tuple[str, ...], dict[str, Any]] = dataclasses.field(default_factory=dict)
    optimizers: dict[str, Optimizer] = dataclasses.field(default_factory=dict)
    programs: dict[str, dict[Any, Any]] | None = None
    failed: dict[str, TrainingError] = dataclasses.field(default_factory=dict)

    def dataset(self, config: Mapping[str, Any]) -> Dataset:
        """The data set of a configuration: all of its data, or the domains that are its target."""
        key = _text([config["data"], config["allow"], config["target"]])
        if key not in self.datasets:
            if config["target"] is None:
                self.datasets[key] = build_data(config)
            else:
                whole = self.dataset(dict(config) | {"data": whole_data(config["data"]), "target": None})
                self.datasets[key] = target_of(whole, config)
        return self.datasets[key]

    def continuation(self, target: Dataset, source: Dataset) -> Dataset:
        """The target's data, encoded as a continuation of the source's (see :func:`mtl_jax.data.domains.joined`)."""
        key = _text([[one.identity, one.schema.task_names] for one in (target, source)])
        if key not in self.datasets:
            self.datasets[key] = dataclasses.replace(target, schema=joined(target.schema, source.schema))
        return self.datasets[key]

    def baselines(self, dataset: Dataset, part: str, rows_of: Callable[[Dataset], Encoded]) -> dict[str, Any]:
        """Metrics of the trivial predictors on a part, which ``rows_of`` gives."""
        key = (dataset.identity, *dataset.schema.task_names, part)
        if key not in self.fitted:
            self.fitted[key] = metrics.baselines.evaluate_baselines(dataset.for_training(), rows_of(dataset))
        return self.fitted[key]

    def optimizer(self, config: Mapping[str, Any], built: Any) -> Optimizer:
        """The optimizer of a configuration, with one transform for all configurations that describe the same one."""
        built = as_optimizer(built)
        node = dict(config["optimizer"])
        if isinstance(node.get("transform"), Mapping):
            node = node["transform"]
        known = self.optimizers.setdefault(_text(node), built)
        return dataclasses.replace(built, transform=known.transform)


class Job:
    """One run, inside its open folder.

    Args:
      config: Plain and checked.
      home: Its folder.
      dataset: Its data.
      shared: Of the process.
      names: Names of the chosen nodes (``sharing``, ``balancing``), for the record; the targets' names by default.
      sealed: Why the test part must stay closed.
      tuning_trials: Trials that chose the values of the configuration.

    Attributes:
      handover: What the run begins with where it has a target (see :func:`mtl_jax.handover.hand_over`); set before
        training.
    """

    handover: Handover | None = None

    def __init__(
        self,
        config: Mapping[str, Any],
        home: RunFolder,
        dataset: Dataset,
        shared: Shared,
        *,
        names: Mapping[str, str] | None = None,
        sealed: str | None = None,
        tuning_trials: int = 0,
    ):
        self.config, self.home, self.dataset, self.shared = config, home, dataset, shared
        self.known = _known(config, names or {}, dataset, name_of(config, dataset), sealed)
        self.known["tuning_trials"] = tuning_trials

    def earlier(self) -> dict[str, Any] | None:
        """The record that an earlier run left, None without one.

        Raises:
          RunFolderError: There is one and it is not whole.
        """
        record = self.home.read_json("result.json")
        try:
            if record is not None and record.get("status") in (None, "completed"):
                validate(record)
        except RecordError as error:
            raise RunFolderError(
                f"'{self.home.path / 'result.json'}' is not a whole record ({error}); expected one that a run wrote. "
                "Remove the file to run again"
            ) from error
        return record

    def begin(self) -> None:
        """Writes what is known before training."""
        self.home.write_yaml("config.yaml", yaml.safe_dump(dict(self.config), sort_keys=False))
        self.home.write_json("schema.json", self.encoded.schema.to_dict())
        self.home.log(f"start {self.known['run_id']}")

    def train(
        self, parts: Mapping[str, Any], *, kept: Callable[[Result], None] = lambda result: None
    ) -> dict[str, Any]:
        """Trains and evaluates; whatever happens, a valid record is written.

        Args:
          parts: As of :func:`mtl_jax.run_config.build_parts`, and ``should_stop``.
          kept: Is given the result before the test part is opened.
        """
        with self.recorded():
            self.begin()
            with warnings_kept(self.home):
                trainer = dict(self.config["trainer"])
                observer = observe(self.home, {key: trainer.pop(key) for key in WATCH_KEYS})
                handover = self.handover
                result = fit(
                    build_model(self.config, self.dataset) if handover is None else handover.model,
                    self.encoded.for_training(),
                    seed=self.config["seed"],
                    table_updates=trainer.pop("tables"),
                    checkpoints=self.home.path / "checkpoints",
                    observer=observer,
                    **trainer,
                    **parts,
                    **({} if handover is None else handover.for_fit()),
                )
                if parts["should_stop"]():
                    raise Interrupted("stopped after training, before the test part was opened")
                kept(result)
                return self.complete(result)

    @contextlib.contextmanager
    def recorded(self) -> Iterator[None]:
        """Whatever ends the work inside leaves a record that says so."""
        try:
            yield
        except (KeyboardInterrupt, Interrupted):
            self._end_begun("interrupted")
            raise
        except (MtlJaxError, OSError) as error:
            self._end_begun("failed", error)
            raise

    def _end_begun(self, status: str, error: BaseException | None = None) -> None:
        if not (self.home.path / "config.yaml").exists():  # before there was anything to train
            self.begin()
        self.end(status, error)

    @property
    def encoded(self) -> Dataset:
        """The data as the model reads them."""
        return self.dataset if self.handover is None else self.handover.dataset

    def complete(self, result: Result) -> dict[str, Any]:
        """Opens the test part for what was selected, and writes the record."""
        tuning = None
        if self.handover is not None:
            result = self.handover.deployed(result)
            tuning = self.handover.tuning(result, run_id=self.known["run_id"], seed=self.known["seed"])
        if tuning is not None:
            shutil.rmtree(self.home.path / TUNING, ignore_errors=True)  # of a run that was killed before its record
            tuning.save(self.home.path / TUNING)
        self.home.write_history(result.history)
        self.home.log(f"tables {result.table_updates}")
        selection = {
            "config_hash": self.known["config_hash"],
            "seed": self.known["seed"],
            "selector": SELECTOR,
            "step": result.monitor["step"],
        }
        openings = 0 if "sealed" in self.known else self.home.record_opening(selection)
        started = self.known["timing"]["started"]
        measured = _evaluated(result, self, openings, started)
        if self.handover is not None:
            measured |= self.handover.evaluated(result, tuning)
            measured["slices"] = measured["slices"] | measured.pop("source_slices")
        record = new_record(self.known | measured, status="completed")
        record["flags"]["below_baseline"] = bool(below_baseline(record))
        validate(record)
        self._write(record)
        return record

    def end(self, status: str, error: BaseException | None = None) -> None:
        """Writes the record of a run that did not come to its end. On a full disk there is none, and the error that ended
        the run is what the user must see."""
        with contextlib.suppress(RunFolderError):
            self._write(new_record(self.known, status=status, error=error))

    def _write(self, record: dict[str, Any]) -> None:
        self.home.write_json("result.json", record)
        self.home.log(f"end {record['status']}")


def name_of(config: Mapping[str, Any], dataset: Dataset) -> str:
    """The run id of a configuration on its data."""
    return run_id(config, seed=config["seed"], data_identity=dataset.identity)


def _evaluated(result: Result, job: Job, openings: int, started: str) -> dict[str, Any]:
    """What the test part says, opened here for the first time, with the mandatory baselines.

    With no opening (a sealed run) the validation part takes its place.
    """
    part = "test" if openings else "valid"

    def rows_of(dataset):
        return dataset.open_test() if openings else dataset.for_training().valid

    rows, tasks, domains = rows_of(job.encoded), job.encoded.schema.tasks, job.encoded.schema.domains
    outputs = result.predict(rows)
    values, support = metrics.evaluate(tasks, outputs, rows)
    slices = metrics.evaluate_slices(tasks, outputs, rows, domains)
    gates = result.gate_use(rows, domains)
    device = jax.devices()[0]
    memory = device.memory_stats() or {}
    peak = memory.get("peak_bytes_in_use") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "metrics": result.metrics | {"test": None} | {part: values},
        "support": result.support | {"test": {}} | {part: support},
        "slices": {name: {part: by_task} for name, by_task in slices.items()},
        "baselines": job.shared.baselines(job.dataset, part, rows_of),
        "params": result.params,
        "monitor": result.monitor,
        "timing": result.timing | {"peak_memory_bytes": int(peak), "started": started},
        "diagnostics": result.diagnostics | ({"gate_use": gates} if gates else {}),
        "test_openings": openings,
        "flags": {
            "transductive": False,
            "oracle": False,
            "reopened": job.home.reopened,
            "leak": any(job.dataset.info["leakage"]["flagged"].values()),
        },
    }


def _known(
    config: Mapping[str, Any], names: Mapping[str, str], dataset: Dataset, name: str, sealed: str | None
) -> dict[str, Any]:
    """The part of the record that does not depend on training."""
    commit, dirty = _source()
    device = jax.devices()[0]
    info = dataset.info
    summary = {} if sealed else dataset.summary()  # it counts the labels of the test part
    return ({"sealed": sealed} if sealed else {}) | {
        "run_id": name,
        "config": dict(config),
        "config_hash": config_hash(config),
        "method": {key: _node_name(config, names, key) for key in METHOD},
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
                for key in ("version", "source", "target_fraction", "split_sha256", "files", "leakage", "warnings")
                if key in info
            },
        },
        "seed": config["seed"],
        "split_seed": info.get("split_seed"),
        "selector": SELECTOR,
        "test_openings": 0,
        "timing": {"started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")},
        "versions": versions(),
        "commit": commit,
        "dirty": dirty,
        "device": {
            "kind": device.device_kind,
            "count": devices_of(config).number,
            "memory_bytes": (device.memory_stats() or {}).get("bytes_limit"),
        },
        "precision": config["trainer"]["precision"],
    }


def _node_name(config: Mapping[str, Any], names: Mapping[str, str], key: str) -> str | None:
    """Name of a chosen node, by default that of its target; None where it stands for nothing."""
    name = names.get(key) or str(config[key]["_target_"]).split(".")[-1]
    nothing = {"link": ("none", "Link"), **dict.fromkeys(("pretraining", "transfer"), ("scratch", "Scratch"))}
    return None if name in nothing.get(key, ()) else name


def _text(node: Any) -> str:
    return json.dumps(node, sort_keys=True, default=str)


@functools.cache
def _source() -> tuple[str | None, bool | None]:
    """Of the code as this process has loaded it."""
    return source_state(Path(__file__).parent)
