"""Finished records under an outputs folder, and the run that a record is compared with: single-task, or from scratch."""

import json
import logging
import os
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mtl_jax.report.compare import reported_part
from mtl_jax.report.record import RecordError, validate

logger = logging.getLogger(__name__)

# What the command of the reference run must not take over: the nodes it replaces, and a folder that is taken.
FOLDERS = r"hydra\.run\.dir|hydra\.sweep\.(dir|subdir)"
REPLACED = re.compile(rf"^[+~]*(sharing|balancing|{FOLDERS})([.@=]|$)")
REPLACED_BY_SCRATCH = re.compile(rf"^[+~]*(transfer|pretraining|{FOLDERS})([.@=]|$)")


def records(root: str | os.PathLike) -> list[tuple[Path, dict[str, Any]]]:
    """All valid records under ``root`` with their run folders, in the order of the paths.

    A file that is broken or follows another schema is skipped, with a note in the log.
    """
    found = []
    for folder in _run_folders(Path(root)):
        try:
            record = json.loads((folder / "result.json").read_bytes())
            validate(record)
        except (OSError, ValueError, RecordError) as error:
            logger.warning("skipped '%s': %s", folder / "result.json", error)
        else:
            found.append((folder, record))
    return found


def single_task_reference(root: str | os.PathLike, record: Mapping[str, Any]) -> dict[str, Any] | None:
    """The latest completed single-task run that ``record`` may be compared with, None where there is none.

    Same data and split, same share of the target rows, same tasks, metrics and losses, same seed, same way of choosing
    the checkpoint, and evaluated on the same part; not the run itself.
    """
    return _latest(
        root, record, lambda other: other["method"]["sharing"] == "single_task" and not other["method"].get("transfer")
    )


def scratch_reference(root: str | os.PathLike, record: Mapping[str, Any]) -> dict[str, Any] | None:
    """The latest completed run of the same method without transfer, under the protocol of :func:`single_task_reference`."""
    without = dict.fromkeys(("pretraining", "transfer"))

    def fits(other):
        return not other["method"].get("transfer") and other["method"] | without == record["method"] | without

    return _latest(root, record, fits)


def scratch_command(record: Mapping[str, Any], overrides: Sequence[str]) -> str:
    """The command line that makes the run from scratch that a transfer is compared with; arguments as below."""
    kept = _with_seed(record, [override for override in overrides if not REPLACED_BY_SCRATCH.match(override)])
    return shlex.join(["python", "-m", "experiments.transfer", *kept, "transfer=scratch"])


def _latest(
    root: str | os.PathLike, record: Mapping[str, Any], fits: Callable[[Mapping[str, Any]], bool]
) -> dict[str, Any] | None:
    matches = [
        other
        for _, other in records(root)
        if other["status"] == "completed"
        and other["run_id"] != record["run_id"]
        and fits(other)
        and _protocol(other) == _protocol(record)
    ]
    return max(matches, key=lambda other: other["timing"].get("started") or "", default=None)


def single_task_command(record: Mapping[str, Any], overrides: Sequence[str]) -> str:
    """The command line that makes the single-task reference of a run.

    Args:
      record: Of the run; its seed is named where the overrides do not.
      overrides: What the user wrote after ``python -m experiments.train``. Those of sharing, balancing and the run
        folder are replaced, all others kept.
    """
    kept = _with_seed(record, [override for override in overrides if not REPLACED.match(override)])
    module = "experiments.train" if record["config"].get("target") is None else "experiments.transfer"
    return shlex.join(["python", "-m", module, *kept, "sharing=single_task", "balancing=equal"])


def _with_seed(record: Mapping[str, Any], overrides: list[str]) -> list[str]:
    named = any(override.lstrip("+").startswith("seed=") for override in overrides)
    return overrides if named else [*overrides, f"seed={record['seed']}"]


def _run_folders(root: Path) -> Iterator[Path]:
    for folder, subfolders, files in os.walk(root):
        subfolders.sort()
        if "result.json" in files:
            # What lies below belongs to that run: checkpoints with many small files.
            subfolders.clear()
            yield Path(folder)


def _protocol(record: Mapping[str, Any]) -> tuple[Any, ...]:
    data = record["data"]
    fraction = data.get("target_fraction")
    return (
        data["sha256"],
        data["split"],
        1.0 if fraction is None else fraction,
        record["tasks"],
        record["seed"],
        record["selector"],
        reported_part(record),
    )
