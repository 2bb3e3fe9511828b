"""The result record: what ``result.json`` holds, one a run."""

import importlib.metadata
import math
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mtl_jax.errors import MtlJaxError
from mtl_jax.report.folder import plain

SCHEMA_VERSION = 1
STATUSES = ("completed", "failed", "interrupted")
DIRECTIONS = ("higher", "lower")

# How to read the schema: a dict lists its keys, "key?" may be absent, "key|null" may be null, "*" stands for any key;
# [x] is a list of x; a leaf is int, number, text, bool, object (any JSON object) or any (any JSON value), "|null" where
# null is allowed.
PER_METRIC = {"*": {"*": "number|null"}}
PER_PART = {"valid": PER_METRIC, "test|null": PER_METRIC}
PER_SUPPORT = {
    "*": {
        "*": {
            "n": "int|null",
            "positives?": "number|null",
            "groups_used?": "int|null",
            "groups_skipped?": "int|null",
            "reason?": "text|null",
        }
    }
}
PER_TASK = {"*": "number|null"}

SCHEMA = {
    "schema_version": "int",
    "run_id": "text",
    "config": "object",
    "config_hash": "text",
    "status": "text",
    "error?": {"class": "text", "message": "text"},
    "metrics": PER_PART,
    "sealed?": "text",  # why metrics.test is null: this run must not open the test part
    "support": {"valid": PER_SUPPORT, "test": PER_SUPPORT},
    "slices?": {"*": {"valid?": PER_METRIC, "test?": PER_METRIC}},
    "baselines": {"*": PER_METRIC},
    "method": {
        "sharing": "text|null",
        "link": "text|null",
        "balancing": "text|null",
        "pretraining?": "text|null",
        "transfer": "text|null",
        "alignment": "text|null",
    },
    "tasks": {"*": {"kind": "text", "loss": "text", "space": "text", "metric": "text", "direction": "text"}},
    "data": {
        "name": "text|null",
        "recipe": "text|null",
        "split": "text|null",
        "sha256": "text|null",
        "rows": {"train": "int|null", "valid": "int|null", "test": "int|null"},
        "licence": "text|null",
        "version?": "text|null",
        "source?": "text|null",
        "target_fraction?": "number|null",
        "split_sha256?": "text|null",
        "files?": {"*": "text"},
        "summary?": "object",
        "vocabularies?": {"*": "text"},
        "leakage?": "object",
        "warnings?": ["text"],
    },
    "params": {
        "embedding": "int|null",
        "shared": "int|null",
        "task": "int|null",
        "total": "int|null",
        "flops_per_example": "number|null",
        "aux?": "int|null",
        "trainable?": "int|null",
    },
    "seed": "int",
    "split_seed": "int|null",
    "selector": "text|null",
    "tuning_trials": "int|null",
    "test_openings": "int|null",
    "monitor": {
        "name": "text|null",
        "value": "number|null",
        "step": "int|null",
        "tasks?": {"*": {"name": "text", "value": "number|null", "step": "int"}},
    },
    "timing": {
        "examples_per_second": "number|null",
        "compile_seconds": "number|null",
        "wall_seconds": "number|null",
        "peak_memory_bytes": "int|null",
        "started?": "text|null",
        "steps?": "int|null",
    },
    "versions": {
        "python": "text|null",
        "jax": "text|null",
        "jaxlib": "text|null",
        "flax": "text|null",
        "optax": "text|null",
        "orbax": "text|null",
        "numpy": "text|null",
        "mtl_jax": "text|null",
    },
    "commit": "text|null",
    "dirty": "bool|null",
    "device": {"kind": "text|null", "count": "int|null", "memory_bytes": "int|null"},
    "precision": "text|null",
    "stages?": [
        {
            "name": "text",
            "parent_hash": "text|null",
            "artefact_hash": "text|null",
            "artefact_numbers?": {"tuning": "int", "base": "int"},
            "loading_report": "any",
            "needs": "any",
            "steps": "int|null",
            "wall_seconds": "number|null",
        }
    ],
    "transfer?": {
        "reference": "text|null",
        "transfer_gain?": PER_TASK,
        "ntg?": PER_TASK,
        "forward_transfer?": PER_TASK,
        "jump_start?": PER_TASK,
        "area?": PER_TASK,
        "steps_to_scratch?": PER_TASK,
        "fraction_to_scratch?": PER_TASK,
        "forgetting?": PER_TASK,
    },
    "diagnostics?": {
        "scope?": "text|null",
        "head_gradient?": "text|null",
        "gradient_cosines?": "any",
        "conflict_rate?": "any",
        "gramian_condition?": "any",
        "task_weights?": "any",
        "skipped_steps?": "any",
        "solver_misses?": "any",
        "terms?": "any",
        "adversary_accuracy?": "any",
        "gate_entropy?": "any",
        "gate_use?": "any",
        "source_share?": {"*": "number"},
        "gradient_transfer?": {"norm?": "any", "sign?": "number|null"},
    },
    "flags": {
        "transductive": "bool|null",
        "oracle": "bool|null",
        "reopened": "bool|null",
        "below_baseline": "bool|null",
        "leak": "bool|null",
    },
    "parents?": ["text"],
}

DISTRIBUTIONS = {
    "jax": "jax",
    "jaxlib": "jaxlib",
    "flax": "flax",
    "optax": "optax",
    "orbax": "orbax-checkpoint",
    "numpy": "numpy",
    "mtl_jax": "mtl_jax",
}


class RecordError(MtlJaxError, ValueError):
    """A result record does not follow the schema."""


def new_record(known: Mapping[str, Any], *, status: str, error: BaseException | None = None) -> dict[str, Any]:
    """A record with every required key: what is known, and null or empty for the rest.

    Args:
      known: Part of a record, nested as in :data:`SCHEMA`; at least ``run_id``, ``config``, ``config_hash``, ``seed``.
      status: ``completed``, ``failed`` or ``interrupted``.
      error: What ended a failed run.

    Returns:
      Plain JSON types; call :func:`validate` before writing.
    """
    record = _fill(plain(known), SCHEMA)
    record |= {"schema_version": SCHEMA_VERSION, "status": status}
    if error is not None:
        record["error"] = {"class": type(error).__name__, "message": str(error)}
    return record


def validate(record: Mapping[str, Any]) -> None:
    """Checks keys and types at every level against :data:`SCHEMA`, then what the values owe each other.

    Raises:
      RecordError: Naming the first fault, its place, and what was expected there.
    """
    _check(record, SCHEMA, "")
    if record["schema_version"] != SCHEMA_VERSION:
        raise _fault("schema_version", record["schema_version"], str(SCHEMA_VERSION), "Use the version that wrote it")
    if record["status"] not in STATUSES:
        raise _fault("status", record["status"], f"one of {list(STATUSES)}", "Change the status")
    if ("error" in record) != (record["status"] == "failed"):
        state = "present" if "error" in record else "absent"
        raise _fault("error", state, f"it with status 'failed' only, not '{record['status']}'", "Change the status")
    for task, facts in record["tasks"].items():
        if facts["direction"] not in DIRECTIONS:
            raise _fault(f"tasks.{task}.direction", facts["direction"], f"one of {list(DIRECTIONS)}", "Change it")
    _check_values(record)
    if record["status"] == "completed":
        _check_completed(record)


def method_text(method: Mapping[str, str | None]) -> str:
    """Sharing and balancing, and link, pretraining and transfer where there are any, as in ``mmoe + esmm + equal``."""
    groups = ("sharing", "link", "balancing", "pretraining", "transfer")
    optional = ("link", "pretraining", "transfer")
    return " + ".join(method.get(group) or "?" for group in groups if group not in optional or method.get(group))


def data_text(data: Mapping[str, Any]) -> str:
    """Data set and recipe, as in ``complete_journey (cross_department)``, for ``data`` of a record.

    A recipe that has the name of the data set, or none, is left out.
    """
    name, recipe = data["name"] or "?", data.get("recipe")
    return name if recipe in (None, name) else f"{name} ({recipe})"


def domains_text(record: Mapping[str, Any]) -> str:
    """Where a run with a target goes from and to, as in ``, grocery to drug_gm``; empty for one without."""

    def names(key):
        found = record.get("config", {}).get(key)
        return " + ".join([found] if isinstance(found, str) else found or [])

    if not names("target"):
        return ""
    from_source = any(stage["name"] == "select" for stage in record.get("stages") or ())
    return f", {names('source')} to {names('target')}" if from_source else f", {names('target')}"


def versions() -> dict[str, str | None]:
    """Versions of what the numbers depend on; None for what is not an installed distribution."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name, distribution in DISTRIBUTIONS.items():
        try:
            found[name] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def source_state(root: str | os.PathLike) -> tuple[str | None, bool | None]:
    """Commit of the work tree that tracks the files of ``root``, and whether anything differs from it.

    Returns:
      (None, None) without git, without a commit, or where git does not track ``root``, as for an installed package.
    """
    commit = _git(root, "rev-parse", "HEAD")
    if not commit or not _git(root, "ls-files", "--", "."):
        return None, None
    changes = _git(root, "status", "--porcelain")
    return commit, None if changes is None else bool(changes)


def _git(root: str | os.PathLike, *arguments: str) -> str | None:
    # Inside a git hook GIT_DIR and its like point to another repository than `root`.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "--no-optional-locks", "-C", os.fspath(Path(root)), *arguments]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _fill(known: Any, schema: Any) -> Any:
    """``known`` with the missing required keys of ``schema`` added."""
    if not isinstance(schema, dict) or not isinstance(known, Mapping):
        return known
    filled = dict(known)
    for key, inner in schema.items():
        name = _name(key)
        if key == "*":
            filled = {name: _fill(value, inner) for name, value in known.items()}
        elif name in filled:
            filled[name] = _fill(filled[name], inner)
        elif not key.endswith("?"):
            filled[name] = _fill({}, inner) if isinstance(inner, dict) else None
    return filled


def _check(value: Any, schema: Any, path: str) -> None:
    if isinstance(schema, str):
        _check_leaf(value, schema, path)
    elif isinstance(schema, list):
        if not isinstance(value, list):
            raise _fault(path, value, "a list", "Change the type")
        for index, item in enumerate(value):
            _check(item, schema[0], f"{path}[{index}]")
    elif not isinstance(value, dict):
        raise _fault(path or "record", value, "an object", "Change the type")
    else:
        _check_object(value, schema, path)


def _check_object(value: dict[str, Any], schema: dict[str, Any], path: str) -> None:
    inner = {_name(key): rule for key, rule in schema.items()}
    for key, item in value.items():
        place = f"{path}.{key}" if path else str(key)
        if not isinstance(key, str):
            raise _fault(place, key, "keys as text", "Change the key")
        if key not in inner and "*" not in inner:
            raise RecordError(
                f"result record has unknown key '{place}'; expected one of {sorted(inner)}. "
                "Rename it, or extend SCHEMA in mtl_jax/report/record.py"
            )
        if item is not None or f"{key}|null" not in schema:
            _check(item, inner.get(key, inner.get("*")), place)
    for key in schema:
        if not key.endswith("?") and key != "*" and _name(key) not in value:
            place = f"{path}.{_name(key)}" if path else _name(key)
            raise RecordError(
                f"result record lacks '{place}'; expected every required key, null where it has no value. "
                "Build the record with new_record"
            )


def _name(key: str) -> str:
    return key.removesuffix("?").removesuffix("|null")


def _check_leaf(value: Any, rule: str, path: str) -> None:
    kind, _, null = rule.partition("|")
    if value is None and (null or kind == "any"):
        return
    number = isinstance(value, int | float) and not isinstance(value, bool)
    fits = {
        "int": number and isinstance(value, int),
        "number": number,
        "text": isinstance(value, str),
        "bool": isinstance(value, bool),
        "object": isinstance(value, dict),
        "any": True,
    }[kind]
    if not fits:
        raise _fault(path, value, f"{kind}{' or null' if null else ''}", "Change the value")
    _check_json(value, path)


def _check_json(value: Any, path: str) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            _check_json(key, f"{path} (key)")
            _check_json(item, f"{path}.{key}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _check_json(item, f"{path}[{index}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise _fault(path, value, "a finite number or null", "Write null, and the reason into support")
    elif not isinstance(value, str | int | float | bool | None):
        raise _fault(path, value, "JSON types only", "Convert it")


def _check_values(record: Mapping[str, Any]) -> None:
    """Known tasks, a sealed test part, and a reason for every null."""
    tables = {f"baselines.{name}": table for name, table in record["baselines"].items()}
    for part in ("valid", "test"):
        tables |= {f"metrics.{part}": record["metrics"][part] or {}, f"support.{part}": record["support"][part]}
    for place, table in tables.items():
        for task in table.keys() - record["tasks"].keys():
            raise _fault(f"{place}.{task}", task, f"a task of {sorted(record['tasks'])}", "Declare it under tasks")
    if record["metrics"]["test"] is None and "sealed" not in record:
        raise _fault("metrics.test", None, "values, or the reason under 'sealed'", "Give the reason")
    if "sealed" in record and record["metrics"]["test"]:
        raise _fault("metrics.test", record["metrics"]["test"], "null in a sealed run", "Do not open the test part")
    if "sealed" in record and record["test_openings"]:
        raise _fault("test_openings", record["test_openings"], "0 in a sealed run", "Do not open the test part")
    if record["metrics"]["test"] and not record["test_openings"]:
        openings = record["test_openings"]
        raise _fault("test_openings", openings, "at least 1 with test metrics", "Record the opening in the ledger")
    for part, table in record["metrics"].items():
        for task, metrics in (table or {}).items():
            for metric, value in metrics.items():
                reason = record["support"][part].get(task, {}).get(metric, {}).get("reason")
                if value is None and not reason:
                    place = f"metrics.{part}.{task}.{metric}"
                    raise _fault(place, value, f"a number, or a reason in support.{part}", "Give the reason")


def _check_completed(record: Mapping[str, Any]) -> None:
    for place in ("data.name", "data.split", "data.sha256", "selector", "method.sharing", "method.balancing"):
        section, _, key = place.partition(".")
        value = record[section][key] if key else record[section]
        if value is None:
            raise _fault(place, value, "a value in a completed run", "Fill it in")
    if not record["tasks"]:
        raise _fault("tasks", record["tasks"], "at least one task in a completed run", "Fill it in")
    for task, facts in record["tasks"].items():
        if facts["metric"] not in record["metrics"]["valid"].get(task, {}):
            place = f"metrics.valid.{task}.{facts['metric']}"
            raise _fault(place, "absent", "the monitored metric of every task in a completed run", "Evaluate the task")


def _fault(path: str, value: Any, expectation: str, fix: str) -> RecordError:
    shown = repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:57]}..."
    return RecordError(f"result record has {path} = {shown}; expected {expectation}. {fix}")
