"""The parts of a comparison: its rows, the settings that were tried for each, and what holds for all."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mtl_jax.report.statistics import Difference, Summary


@dataclasses.dataclass(frozen=True)
class Row:
    """One arm on one data set, at the settings that validation chose for it.

    Attributes:
      arm: Its name in the plan.
      method: ``method`` of the records, empty where no run finished.
      values: Chosen point on the tuned axes.
      trials: How many points were tried.
      run_ids: Finished runs, by seed.
      planned: Number of seeds that should exist.
      failed: What became of each of the others, ``run id: class: message``.
      metrics: Task -> its metric on the test part; tasks without any value are absent.
      differences: Task -> against the baseline; empty for the baseline, without one, and where gains are refused.
      delta_m: Per seed against the single-task run of that seed, percent, positive = better.
      delta_m_c: The same with AUC - 1/2 in place of AUC; None without an AUC task.
      mean_rank: Mean over tasks of the rank of the mean, 1 = best.
      seed_rank: Mean over seeds of the rank within the seed: what the critical difference is about.
      best: Task -> has the best mean of all ranked rows.
      tied_with_best: Task -> its paired interval against the best holds 0.
      below_trivial: Task -> name of the best trivial predictor, where that one is better than the mean.
      transfer: Task -> quantity -> what a source was worth (see :mod:`mtl_jax.report.transfer`); empty without one.
      parameters: All of them.
      trainable: Those that were trained in the last stage, for a run with a target; None elsewhere.
      examples_per_second: Mean over the finished runs.
      compile_seconds: Sum over the finished runs, which share compiled programs.
      flags: Flags up in any finished run that keep the row out of every rank: reopened, leak, oracle.
    """

    arm: str
    method: dict[str, Any]
    values: dict[str, Any]
    trials: int
    run_ids: tuple[str, ...]
    planned: int
    failed: tuple[str, ...]
    metrics: dict[str, Summary]
    differences: dict[str, Difference] = dataclasses.field(default_factory=dict)
    delta_m: Summary | None = None
    delta_m_c: Summary | None = None
    mean_rank: float | None = None
    seed_rank: float | None = None
    best: dict[str, bool] = dataclasses.field(default_factory=dict)
    tied_with_best: dict[str, bool] = dataclasses.field(default_factory=dict)
    below_trivial: dict[str, str] = dataclasses.field(default_factory=dict)
    transfer: dict[str, dict[str, Summary]] = dataclasses.field(default_factory=dict)
    parameters: int | None = None
    trainable: int | None = None
    examples_per_second: float | None = None
    compile_seconds: float | None = None
    flags: tuple[str, ...] = ()

    def mean(self, task: str) -> float | None:
        """Mean of the task's metric, None where it has no value."""
        return self.metrics[task].mean if task in self.metrics else None

    def seeds(self, task: str) -> Mapping[int, float]:
        """Seed -> value of the task's metric."""
        return self.metrics[task].values if task in self.metrics else {}

    def can_rank(self, tasks: Mapping[str, Any]) -> bool:
        """Whether it has an interval in every task and no flag."""
        return not self.flags and all(task in self.metrics and self.metrics[task].n >= 2 for task in tasks)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One point on the tuned axes of an arm: validation numbers only.

    Attributes:
      arm: As in :class:`Row`.
      values: The point.
      monitor: Name of the monitored number, None where no run finished.
      value: The number over the seeds that all candidates of the arm finished.
      finished: Number of finished runs.
      planned: Number of planned runs.
      chosen: Whether it stands for its arm.
      run_ids: All planned runs.
    """

    arm: str
    values: dict[str, Any]
    monitor: str | None
    value: Summary
    finished: int
    planned: int
    chosen: bool
    run_ids: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All arms of an ablation on one data set.

    Attributes:
      data: Name of the data set, with the axis values that change the data.
      tasks: Task -> its ``metric`` and ``direction``.
      baseline: Arm that differences are taken against.
      single_task: Arm that ``delta_m`` is taken against.
      trivial: Trivial predictor -> task -> metric on the test part.
      rows: In the order of the plan.
      friedman_p: That all ranked rows are alike; see :mod:`mtl_jax.report.ranking`.
      critical_difference: Of ``seed_rank``.
      refused: Why gains, ranks and winners are withheld, and what to run; empty where they are not.
      identical: Groups of arms that are equal in every seed and task.
      candidates: What was tried for the arms with more than one point.
      notes: Plain sentences for the reader.
    """

    data: str
    tasks: dict[str, dict[str, str]]
    baseline: str | None
    trivial: dict[str, dict[str, float]]
    rows: tuple[Row, ...]
    friedman_p: float | None = None
    critical_difference: float | None = None
    notes: tuple[str, ...] = ()
    single_task: str | None = None
    refused: tuple[str, ...] = ()
    identical: tuple[tuple[str, ...], ...] = ()
    candidates: tuple[Candidate, ...] = ()

    def row(self, arm: str) -> Row | None:
        """The row of an arm."""
        return next((row for row in self.rows if row.arm == arm), None)

    def higher(self, task: str) -> bool:
        """Whether a higher metric of the task is better."""
        return self.tasks[task]["direction"] == "higher"
