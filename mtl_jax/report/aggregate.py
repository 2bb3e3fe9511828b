"""The numbers of comparisons for machines: ``table.json`` and CSV, at full precision."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import polars as pl

from mtl_jax.report.ablation import Ablation
from mtl_jax.report.folder import plain
from mtl_jax.report.rows import Comparison, Row
from mtl_jax.report.selection import settings
from mtl_jax.report.statistics import LEVEL

AGGREGATE_VERSION = 1


def aggregate(ablation: Ablation, comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """The aggregate record: every number of the tables with the run ids that it comes from, plain JSON types.

    ``checks.identical`` lists arms that are equal in every seed and task.
    """
    facts = {key: ablation.facts.get(key) for key in ("id", "command", "created")}
    tables = [
        {
            **{
                key: getattr(one, key)
                for key in ("data", "tasks", "baseline", "single_task", "trivial", "friedman_p", "critical_difference")
            },
            "checks": {"identical": one.identical},
            "refused": one.refused,
            "notes": one.notes,
            "rows": [_row(row) for row in one.rows],
            "candidates": [dataclasses.asdict(candidate) for candidate in one.candidates],
        }
        for one in comparisons
    ]
    return plain({"schema_version": AGGREGATE_VERSION, **facts, "level": LEVEL, "comparisons": tables})


def results_frame(comparisons: Sequence[Comparison]) -> pl.DataFrame:
    """One row a data set, arm and task: mean, std, interval, n, and its standing."""
    rows = [
        {
            **_place(one, row, task),
            **_spread(row.metrics.get(task)),
            "planned": row.planned,
            "best": row.best.get(task),
            "tied_with_best": row.tied_with_best.get(task),
            "below_trivial": row.below_trivial.get(task),
            "mean_rank": row.mean_rank,
            "seed_rank": row.seed_rank,
            "delta_m": row.delta_m.mean if row.delta_m else None,
            "delta_m_c": row.delta_m_c.mean if row.delta_m_c else None,
            "parameters": row.parameters,
            "examples_per_second": row.examples_per_second,
            "compile_seconds": row.compile_seconds,
            "flags": " ".join(row.flags),
        }
        for one in comparisons
        for row in one.rows
        for task in one.tasks
    ]
    return pl.DataFrame(rows, infer_schema_length=None)


def differences_frame(comparisons: Sequence[Comparison]) -> pl.DataFrame:
    """One row a data set, arm and task: the paired difference to the baseline and its tests."""
    rows = [
        {
            **_place(one, row, task),
            "baseline": one.baseline,
            **_spread(found),
            "bootstrap_low": found.bootstrap[0] if found.bootstrap else None,
            "bootstrap_high": found.bootstrap[1] if found.bootstrap else None,
            "p": found.p,
            "p_holm": found.p_holm,
            "p_exact": found.p_exact,
        }
        for one in comparisons
        for row in one.rows
        for task, found in row.differences.items()
    ]
    return pl.DataFrame(rows, infer_schema_length=None)


def candidates_frame(comparisons: Sequence[Comparison]) -> pl.DataFrame:
    """One row a tried setting: validation numbers only."""
    rows = [
        {
            "data": one.data,
            "arm": candidate.arm,
            "values": settings(candidate.values),
            "monitor": candidate.monitor,
            **_spread(candidate.value),
            "finished": candidate.finished,
            "planned": candidate.planned,
            "chosen": candidate.chosen,
        }
        for one in comparisons
        for candidate in one.candidates
    ]
    return pl.DataFrame(rows, infer_schema_length=None)


def _place(comparison: Comparison, row: Row, task: str) -> dict[str, Any]:
    metric = comparison.tasks[task]["metric"]
    return {"data": comparison.data, "arm": row.arm, "values": settings(row.values), "task": task, "metric": metric}


def _spread(found: Any) -> dict[str, Any]:
    low, high = found.interval if found and found.interval else (None, None)
    mean, std, n = (found.mean, found.std, found.n) if found else (None, None, 0)
    return {"mean": mean, "std": std, "low": low, "high": high, "n": n}


def _row(row: Row) -> dict[str, Any]:
    return dataclasses.asdict(row) | {"finished": len(row.run_ids)}
