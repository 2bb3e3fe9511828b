"""The folder of an ablation: what was planned, and the records that exist."""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl

from mtl_jax.errors import MissingFile, RunFolderError
from mtl_jax.report.record import RecordError, validate

PLAN = "ablation.json"
MEMBER_TYPES = {"run_id": str, "arm": str, "values": dict, "seed": int, "data": str}
FRAME_SCHEMA = {
    "run_id": pl.String,
    "arm": pl.String,
    "data": pl.String,
    "seed": pl.Int64,
    "values": pl.String,
    "status": pl.String,
    "part": pl.String,
    "task": pl.String,
    "metric": pl.String,
    "value": pl.Float64,
}


@dataclasses.dataclass(frozen=True)
class Ablation:
    """The plan of an ablation and what has come of it.

    Attributes:
      folder: Of the ablation; run folders are in ``runs/<run id>``.
      facts: Content of ``ablation.json``.
      records: Run id -> record, for the planned members whose record exists and is valid.
      problems: Run id -> why a record that exists is not in ``records``.
    """

    folder: Path
    facts: dict[str, Any]
    records: dict[str, dict[str, Any]]
    problems: dict[str, str] = dataclasses.field(default_factory=dict)


def read_ablation(folder: str | os.PathLike) -> Ablation:
    """Reads the plan and every record of it that is there.

    A record that is broken, follows another schema, or belongs to another run or seed than the plan says is left out
    and named in ``problems``.

    Raises:
      MissingFile: No such folder.
      RunFolderError: The folder is not that of an ablation, or its plan cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise MissingFile(f"'{folder}' is not a folder; expected one that experiments.ablate wrote. Correct the path")
    facts = _read_plan(folder)
    records, problems = {}, {}
    for member in facts["members"]:
        path = folder / "runs" / member["run_id"] / "result.json"
        try:
            record = json.loads(path.read_bytes())
            validate(record)
            held = {key: record[key] for key in ("run_id", "seed")}
            if held != {key: member[key] for key in held}:
                raise RecordError(f"the record is of run '{held['run_id']}', seed {held['seed']}")
        except FileNotFoundError:
            continue
        except (OSError, ValueError, RecordError) as error:
            problems[member["run_id"]] = f"{type(error).__name__}: {error}"
        else:
            records[member["run_id"]] = record
    return Ablation(folder, facts, records, problems)


def members_frame(ablation: Ablation) -> pl.DataFrame:
    """Every metric of every member in long form: ``run_id, arm, data, seed, values, status, part, task, metric, value``.

    ``values`` is JSON text, as Parquet has no open-ended mappings. A member without a metric has one row with its
    status, which is ``missing`` where there is no readable record.
    """
    rows = []
    for member in ablation.facts["members"]:
        record = ablation.records.get(member["run_id"])
        shared = {key: member[key] for key in ("run_id", "arm", "data", "seed")}
        shared |= {"values": json.dumps(member["values"], sort_keys=True)}
        shared |= {"status": record["status"] if record else "missing"}
        metrics = _metrics(record["metrics"]) if record else []
        rows += [shared | found for found in metrics or [dict.fromkeys(("part", "task", "metric", "value"))]]
    columns = {name: [row[name] for row in rows] for name in FRAME_SCHEMA}
    return pl.DataFrame(columns, schema=FRAME_SCHEMA, strict=False)


def _metrics(parts: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {"part": part, "task": task, "metric": metric, "value": value}
        for part, tasks in parts.items()
        for task, metrics in (tasks or {}).items()
        for metric, value in metrics.items()
    ]


def _read_plan(folder: Path) -> dict[str, Any]:
    path = folder / PLAN
    try:
        facts = json.loads(path.read_bytes())
        members = facts["members"]
        for member in members:
            for key, kind in MEMBER_TYPES.items():
                if not isinstance(member[key], kind):
                    raise TypeError(f"member {key} {member[key]!r}")
        # A run id names a folder below runs/, and nothing else.
        strange = [m["run_id"] for m in members if Path(m["run_id"]).name != m["run_id"] or m["run_id"] == ".."]
        places = {(m["data"], m["arm"], json.dumps(m["values"], sort_keys=True), m["seed"]) for m in members}
        doubled = min(len({member["run_id"] for member in members}), len(places)) < len(members)
        if strange or doubled or not members or not isinstance(facts["baseline"], str | None):
            raise ValueError(
                "no members, a run or a seed of an arm twice, a run id that is no file name, or a baseline that is no text"
            )
    except FileNotFoundError:
        raise RunFolderError(_not_an_ablation(folder)) from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise RunFolderError(
            f"'{path}' is not the plan of an ablation ({type(error).__name__}: {error}); expected what experiments.ablate "
            "wrote. Start the ablation again in another folder"
        ) from None
    return facts


def _not_an_ablation(folder: Path) -> str:
    message = f"'{folder}' has no {PLAN}; expected the folder of one ablation"
    if (folder / "result.json").exists() or any(folder.glob("*/result.json")):
        return (
            f"{message}, and it holds ordinary runs, which have no plan of what belongs together. Run the comparison with "
            "python -m experiments.ablate, which reports the same way"
        )
    below = sorted(path.parent.name for path in folder.glob(f"*/{PLAN}"))
    hint = f"one of its subfolders: {', '.join(below[:5])}" if below else "outputs/ablate/<id>"
    return f"{message}. Give {hint}"
