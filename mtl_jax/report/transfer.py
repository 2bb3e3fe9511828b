"""What a source was worth: curves of runs with it against those of the same seeds from scratch."""

import math
from collections.abc import Mapping

import numpy as np
import polars as pl

from mtl_jax.report.ablation import Ablation
from mtl_jax.report.folder import RunFolder
from mtl_jax.report.rows import Comparison
from mtl_jax.report.statistics import Summary, summary

JUMP = 0.01
"""Share of the step budget after which the first evaluation counts as the jump-start."""
QUANTITIES = ("forward_transfer", "jump_start", "area", "steps_to_scratch", "forgetting")


def paired(
    curve: Mapping[int, float], scratch: Mapping[int, float], *, higher_is_better: bool
) -> dict[str, float | None]:
    r"""Quantities of one task from its validation curves, step -> metric, signed so that positive = transfer helps.

    =====================  =================================================================================
    ``forward_transfer``   gain before the first step on the target
    ``jump_start``         gain at the first evaluation after 1 % of the steps of the longer run
    ``area``               mean gain over the steps that both were evaluated in, by the trapezoid rule
    ``steps_to_scratch``   first step that is as good as the best of scratch, over the step of that best
    =====================  =================================================================================

    None where a curve has no such point.
    """
    sign = 1.0 if higher_is_better else -1.0
    shared = sorted(curve.keys() & scratch.keys())
    gain = {step: sign * (curve[step] - scratch[step]) for step in shared}
    total = max([*curve, *scratch], default=0)
    later = [step for step in shared if step >= max(1, math.ceil(JUMP * total))]
    area = None
    if len(later) > 1 or len(shared) > 1:
        steps = np.array(shared, float)
        area = float(np.trapezoid([gain[step] for step in shared], steps) / (steps[-1] - steps[0]))
    best = max(scratch, key=lambda step: (sign * scratch[step], -step), default=None)
    reached = [step for step in sorted(curve) if best is not None and sign * curve[step] >= sign * scratch[best]]
    return {
        "forward_transfer": gain.get(0),
        "jump_start": gain[later[0]] if later else None,
        "area": area,
        "steps_to_scratch": reached[0] / best if reached and best else None,
    }


def fraction_to_scratch(values: Mapping[float, float], goal: float, *, higher_is_better: bool) -> float | None:
    """The smallest share of the target's rows at which a metric is as good as a goal, None where it never is.

    Args:
      values: Share -> metric; between two shares it is linear over the logarithm of the share.
      goal: The metric of training from scratch on all rows.
      higher_is_better: Of the metric.
    """
    sign = 1.0 if higher_is_better else -1.0
    before: tuple[float, float] | None = None
    for share, value in sorted(values.items()):
        missing = sign * (goal - value)
        if missing <= 0:
            if before is None:
                return share
            (last, lacked) = before
            return math.exp(math.log(last) + lacked / (lacked - missing) * math.log(share / last))
        before = share, missing
    return None


def curve_of(history: pl.DataFrame, task: str, metric: str) -> dict[int, float]:
    """Step -> value of a task's metric on validation."""
    rows = history.filter(part="valid", task=task, name=metric).drop_nulls("value")
    return dict(zip(rows["step"].to_list(), rows["value"].to_list(), strict=True))


def worth(ablation: Ablation, comparison: Comparison, reference: str) -> dict[str, dict[str, dict[str, Summary]]]:
    """Arm -> task -> quantity -> its summary over the seeds that both the arm and the reference have."""
    histories = {
        row.arm: {
            ablation.records[run_id]["seed"]: RunFolder(ablation.folder / "runs" / run_id).read_history()
            for run_id in row.run_ids
        }
        for row in comparison.rows
    }
    found: dict[str, dict[str, dict[str, Summary]]] = {}
    for row in comparison.rows:
        if row.arm == reference:
            continue
        records = {ablation.records[run_id]["seed"]: ablation.records[run_id] for run_id in row.run_ids}
        for task, facts in comparison.tasks.items():
            values: dict[str, dict[int, float | None]] = {name: {} for name in QUANTITIES}
            for seed, record in records.items():
                forgotten = record.get("transfer", {}).get("forgetting") or {}
                values["forgetting"][seed] = forgotten.get(task)
                read = [histories[arm].get(seed) for arm in (row.arm, reference)]
                if all(history is not None for history in read):
                    curves = (curve_of(history, task, facts["metric"]) for history in read)
                    for name, value in paired(*curves, higher_is_better=comparison.higher(task)).items():
                        values[name][seed] = value
            summaries = {name: summary(by_seed) for name, by_seed in values.items()}
            found.setdefault(row.arm, {})[task] = {name: one for name, one in summaries.items() if one.n}
    return found
