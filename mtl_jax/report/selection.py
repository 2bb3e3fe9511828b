"""Which of the tried settings stands for an arm: the best on validation, never on test."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from mtl_jax.metrics.kinds import LOWER_IS_BETTER
from mtl_jax.report.rows import Candidate
from mtl_jax.report.statistics import summary

Member = Mapping[str, Any]
Record = Mapping[str, Any]


def choose(members: Sequence[Member], finished: Mapping[str, Record]) -> tuple[Candidate, ...]:
    """The settings of one arm with their validation numbers, one of them marked as chosen.

    The mean of the monitored number is taken over the seeds that all candidates finished; a candidate that finished no
    seed takes no part. Where the others have no seed in common, the one with most finished seeds is chosen, and among
    equals the first of the plan.

    Args:
      members: The planned members of the arm on one data set.
      finished: Run id -> record of the runs that completed.
    """
    points: dict[str, list[Member]] = {}
    for member in members:
        points.setdefault(json.dumps(member["values"], sort_keys=True), []).append(member)
    monitors = {
        point: {m["seed"]: finished[m["run_id"]]["monitor"] for m in group if m["run_id"] in finished}
        for point, group in points.items()
    }
    seeds = [set(by_seed) for by_seed in monitors.values() if by_seed]
    common = set.intersection(*seeds) if seeds else set()
    values = {
        point: summary({seed: monitor["value"] for seed, monitor in sorted(by_seed.items()) if seed in common})
        for point, by_seed in monitors.items()
    }
    records = [finished[member["run_id"]] for member in members if member["run_id"] in finished]
    sign = sign_of(records[0]) if records else 1.0

    def merit(point: str) -> tuple[bool, float, int]:
        found = values[point]
        # A seed without a monitored value (outputs that are not finite) is one that the candidate lost.
        whole = bool(common) and found.n == len(common)
        return whole, sign * found.mean if whole else -math.inf, len(monitors[point])

    chosen = max(points, key=merit)
    return tuple(
        Candidate(
            arm=group[0]["arm"],
            values=dict(group[0]["values"]),
            monitor=next((monitor["name"] for monitor in monitors[point].values()), None),
            value=values[point],
            finished=len(monitors[point]),
            planned=len(group),
            chosen=point == chosen,
            run_ids=tuple(member["run_id"] for member in group),
        )
        for point, group in points.items()
    )


def settings(values: Mapping[str, Any]) -> str:
    """``key=value`` of every tuned axis, as on the command line."""
    return ", ".join(f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items())


def sign_of(record: Record) -> float:
    """+1 where a higher monitored number is better."""
    task, _, metric = (record["monitor"]["name"] or "").rpartition("/")
    declared = record["tasks"].get(task, {})
    if declared.get("metric") == metric:
        return 1.0 if declared["direction"] == "higher" else -1.0
    return -1.0 if metric in LOWER_IS_BETTER else 1.0
