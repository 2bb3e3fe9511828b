"""All arms of an ablation side by side on each data set: means with intervals, paired differences, ties and failures."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from mtl_jax.errors import ConfigError, RunFolderError
from mtl_jax.metrics import delta_m, delta_m_c
from mtl_jax.report.ablation import Ablation
from mtl_jax.report.compare import AUCS, baseline_value
from mtl_jax.report.notes import notes, refusals
from mtl_jax.report.ranking import identical_rows, rank
from mtl_jax.report.rows import Candidate, Comparison, Row
from mtl_jax.report.selection import choose
from mtl_jax.report.statistics import Summary, difference, holm, summary
from mtl_jax.report.transfer import worth

__all__ = ["Candidate", "Comparison", "Row", "compare"]

SINGLE_TASK, SCRATCH = "single_task", "scratch"
MESSAGE_WIDTH = 300
UNRANKED_FLAGS = ("reopened", "leak", "oracle")
# What all records of one comparison must share: other rows of data or another metric are another question.
SHARED = {
    "data.sha256": lambda record: record["data"]["sha256"],
    "data.split": lambda record: record["data"]["split"],
    "tasks": lambda record: {task: [f["metric"], f["direction"], f["space"]] for task, f in record["tasks"].items()},
}


def compare(ablation: Ablation, *, baseline: str | None = None) -> tuple[Comparison, ...]:
    """One comparison a data set; where a tuned axis changes the data (``data.*``), one for each of its values.

    Args:
      ablation: As read by :func:`mtl_jax.report.ablation.read_ablation`.
      baseline: Arm that differences are taken against; that of the plan by default.

    Raises:
      ConfigError: No arm of that name.
      RunFolderError: Nothing finished yet, or records of one data set that cannot be compared.
    """
    members = ablation.facts["members"]
    arms = list(dict.fromkeys(member["arm"] for member in members))
    baseline = baseline if baseline is not None else ablation.facts["baseline"]
    if baseline is not None and baseline not in arms:
        raise ConfigError(
            f"unknown baseline '{baseline}'; the ablation has the arms {arms}. Choose one with --baseline"
        )
    if not any(_failure(ablation, member["run_id"]) is None for member in members):
        reasons = "".join(f"\n  {m['run_id']}: {_failure(ablation, m['run_id'])}" for m in members[:5])
        raise RunFolderError(
            f"no run of '{ablation.folder}' has finished (of {len(members)}); expected at least one. "
            f"Run the ablation again, it goes on where it stopped: {ablation.facts.get('command')}{reasons}"
        )
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for member in members:
        groups.setdefault(_name_of_data(member), []).append(member)
    return tuple(_compare(ablation, name, group, baseline) for name, group in groups.items())


def _compare(ablation: Ablation, data: str, members: Sequence[Mapping[str, Any]], baseline: str | None) -> Comparison:
    finished = {
        member["run_id"]: ablation.records[member["run_id"]]
        for member in members
        if _failure(ablation, member["run_id"]) is None
    }
    _check_shared(data, finished)
    by_arm: dict[str, list[Mapping[str, Any]]] = {}
    for member in members:
        by_arm.setdefault(member["arm"], []).append(member)
    first = next(iter(finished.values()), {"tasks": {}})
    tasks = {t: {key: facts[key] for key in ("metric", "direction")} for t, facts in first["tasks"].items()}
    trivial = _trivial(finished.values(), tasks)
    candidates = {arm: choose(group, finished) for arm, group in by_arm.items()}
    comparison = Comparison(
        data=data,
        tasks=tasks,
        baseline=baseline if baseline in by_arm else None,
        trivial=trivial,
        rows=tuple(_row(ablation, found, by_arm[arm], finished, tasks) for arm, found in candidates.items()),
        single_task=SCRATCH if baseline == SCRATCH and SCRATCH in by_arm else _single_task(by_arm, finished),
        candidates=tuple(one for found in candidates.values() if len(found) > 1 for one in found),
    )
    comparison = _mark_failures(comparison)
    comparison = dataclasses.replace(comparison, identical=identical_rows(comparison.rows, tasks))
    comparison = dataclasses.replace(comparison, refused=refusals(comparison, ablation.facts.get("command")))
    if not comparison.refused:
        comparison = rank(_with_delta_m(_with_differences(comparison)))
    if comparison.single_task == SCRATCH:
        found = worth(ablation, comparison, SCRATCH)
        rows = tuple(dataclasses.replace(row, transfer=found.get(row.arm, {})) for row in comparison.rows)
        comparison = dataclasses.replace(comparison, rows=rows)
    return dataclasses.replace(comparison, notes=notes(comparison))


def _row(
    ablation: Ablation,
    candidates: Sequence[Candidate],
    members: Sequence[Mapping[str, Any]],
    finished: Mapping[str, Mapping[str, Any]],
    tasks: Mapping[str, Any],
) -> Row:
    chosen = next(candidate for candidate in candidates if candidate.chosen)
    own = sorted((m for m in members if m["run_id"] in chosen.run_ids), key=lambda member: member["seed"])
    records = {m["seed"]: finished[m["run_id"]] for m in own if m["run_id"] in finished}
    metrics = {}
    for task, facts in tasks.items():
        by_seed = {
            seed: record["metrics"]["test"].get(task, {}).get(facts["metric"]) for seed, record in records.items()
        }
        metrics[task] = summary(by_seed)
    first = next(iter(records.values()), None)
    return Row(
        arm=chosen.arm,
        method=dict(first["method"]) if first else {},
        values=chosen.values,
        trials=len(candidates),
        run_ids=tuple(m["run_id"] for m in own if m["run_id"] in finished),
        planned=len(own),
        failed=tuple(f"{m['run_id']}: {_failure(ablation, m['run_id'])}" for m in own if m["run_id"] not in finished),
        metrics={task: found for task, found in metrics.items() if found.n},
        parameters=first["params"]["total"] if first else None,
        trainable=first["params"].get("trainable") if first else None,
        examples_per_second=_mean(record["timing"]["examples_per_second"] for record in records.values()),
        compile_seconds=_sum(record["timing"]["compile_seconds"] for record in records.values()),
        flags=tuple(flag for flag in UNRANKED_FLAGS if any(record["flags"][flag] for record in records.values())),
    )


def _with_differences(comparison: Comparison) -> Comparison:
    """Differences of every row to the baseline, Holm-corrected over all of them."""
    reference = comparison.row(comparison.baseline) if comparison.baseline is not None else None
    if reference is None:
        return comparison
    found = {
        (row.arm, task): difference(row.seeds(task), reference.seeds(task), higher_is_better=comparison.higher(task))
        for row in comparison.rows
        for task in comparison.tasks
        if row is not reference and row.seeds(task).keys() & reference.seeds(task).keys()
    }
    corrected = dict(zip(found, holm([one.p for one in found.values()]), strict=True))
    rows = [
        dataclasses.replace(
            row,
            differences={
                task: dataclasses.replace(one, p_holm=corrected[arm, task])
                for (arm, task), one in found.items()
                if arm == row.arm
            },
        )
        for row in comparison.rows
    ]
    return dataclasses.replace(comparison, rows=tuple(rows))


def _with_delta_m(comparison: Comparison) -> Comparison:
    single, tasks = comparison.row(comparison.single_task), list(comparison.tasks)
    higher = [comparison.higher(task) for task in tasks]
    is_auc = [comparison.tasks[task]["metric"] in AUCS for task in tasks]

    def gains(row: Row, gain: Any) -> Summary | None:
        by_seed = {
            seed: gain(
                [row.seeds(task).get(seed) for task in tasks], [single.seeds(t).get(seed) for t in tasks], higher
            )
            for seed in sorted({seed for task in tasks for seed in row.seeds(task)})
        }
        found = summary(by_seed)
        return found if found.n else None

    rows = [
        dataclasses.replace(
            row,
            delta_m=gains(row, delta_m),
            delta_m_c=gains(row, lambda *values: delta_m_c(*values, is_auc=is_auc)) if any(is_auc) else None,
        )
        if row is not single
        else row
        for row in comparison.rows
    ]
    return dataclasses.replace(comparison, rows=tuple(rows))


def _mark_failures(comparison: Comparison) -> Comparison:
    """Names the best trivial predictor where it is better than the mean of a row."""
    rows = []
    for row in comparison.rows:
        below = {}
        for task in row.metrics:
            sign = 1.0 if comparison.higher(task) else -1.0
            levels = {name: sign * values[task] for name, values in comparison.trivial.items() if task in values}
            best = max(levels, key=levels.get, default=None)
            if best is not None and sign * row.mean(task) < levels[best]:
                below[task] = best
        rows.append(dataclasses.replace(row, below_trivial=below))
    return dataclasses.replace(comparison, rows=tuple(rows))


def _trivial(records: Any, tasks: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Metrics of the trivial predictors. They do not depend on the run; the mean evens out what a seed changes."""
    records = list(records)
    names = dict.fromkeys(name for record in records for name in record["baselines"])
    table = {
        name: {task: _mean(baseline_value(record, name, task) for record in records) for task in tasks}
        for name in names
    }
    known = {name: {t: value for t, value in values.items() if value is not None} for name, values in table.items()}
    return {name: values for name, values in known.items() if values}


def _single_task(by_arm: Mapping[str, Sequence[Any]], finished: Mapping[str, Any]) -> str | None:
    """The arm that trains every task alone; with its plain name, or by what its records say."""
    if SINGLE_TASK in by_arm:
        return SINGLE_TASK
    for arm, members in by_arm.items():
        records = [finished[member["run_id"]] for member in members if member["run_id"] in finished]
        if records and all(record["method"]["sharing"] == SINGLE_TASK for record in records):
            return arm
    return None


def _failure(ablation: Ablation, run_id: str) -> str | None:
    """Why a planned run is not a finished one, None where it is."""
    record = ablation.records.get(run_id)
    if record is None:
        return ablation.problems.get(run_id, "no result yet")
    if record["status"] == "failed":
        message = " ".join(record["error"]["message"].split())
        return f"{record['error']['class']}: {message[:MESSAGE_WIDTH]}{'...' * (len(message) > MESSAGE_WIDTH)}"
    if record["status"] != "completed":
        return record["status"]
    return (
        None if record["metrics"]["test"] else f"no test metrics ({record.get('sealed', 'the test part is unopened')})"
    )


def _check_shared(data: str, finished: Mapping[str, Mapping[str, Any]]) -> None:
    for place, value in SHARED.items():
        found = {}
        for run_id, record in finished.items():
            found.setdefault(json.dumps(value(record), sort_keys=True), run_id)
        if len(found) > 1:
            (first, one), (second, other), *_ = found.items()
            raise RunFolderError(
                f"runs {one} and {other} on '{data}' differ in {place}: {first} and {second}; expected the same in all "
                "rows of a comparison. Run an ablation for each"
            )


def changes_data(key: str) -> bool:
    """Whether an axis is no tuning, since its values are trained and judged on other rows."""
    return key.startswith("data.") or key == "target"


def _name_of_data(member: Mapping[str, Any]) -> str:
    changed = {key: value for key, value in member["values"].items() if changes_data(key)}
    return ", ".join([member["data"], *(f"{key}={value}" for key, value in sorted(changed.items()))])


def _sum(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) if known else None


def _mean(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None
